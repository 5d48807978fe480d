"""A GenICam camera (GigE Vision, USB3 Vision) through Aravis, as a source of `inspectd camera`.

Aravis has no Python package of its own: it is reached through GObject introspection, as Debian ships it, and imported
only when a GenICam camera is asked for. The camera's settings are left as they are (a hardware trigger among them) but
for those that `features` names, and for the software trigger.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from adapters.sources import Captured, PictureLostError, SourceError
from daemon.errors import DeviceError
from daemon.types import PixelArray

log = logging.getLogger("inspectd.camera")

_DEBIAN_GI = Path("/usr/lib/python3/dist-packages/gi/__init__.py")
_BUFFERS = 8
_WAIT_US = 1_000_000
_MOST_SOCKET_BYTES = 64 << 20
# By GenICam's name: what it is on the wire, bytes of a pixel, channels, and how far to shift up to 16 bit.
_FORMATS = {
    "Mono8": ("Mono8", 1, 1, 0),
    "Mono10": ("Mono16", 2, 1, 6),
    "Mono12": ("Mono16", 2, 1, 4),
    "Mono14": ("Mono16", 2, 1, 2),
    "Mono16": ("Mono16", 2, 1, 0),
    "BayerRG8": ("BayerRG8", 1, 1, 0),
    "RGB8": ("RGB8", 1, 3, 0),
    "RGB8Packed": ("RGB8", 1, 3, 0),
    "BGR8": ("BGR8", 1, 3, 0),
    "BGR8Packed": ("BGR8", 1, 3, 0),
}


def load_aravis() -> tuple[Any, type[Exception]]:
    """Aravis, and the class of its errors. Raises DeviceError where it is not installed."""
    try:
        _import_gi()
        import gi

        gi.require_version("Aravis", "0.8")
        from gi.repository import Aravis, GLib
    except (ImportError, ValueError) as error:
        raise DeviceError(
            f"GenICam cameras need Aravis, and {error}; apt install gir1.2-aravis-0.8 python3-gi aravis-tools (on "
            f"Debian's own Python: this one is {sys.version_info.major}.{sys.version_info.minor})"
        ) from error
    return Aravis, GLib.Error


def _import_gi() -> None:
    """A virtual environment does not see Debian's packages; of these gi alone is let in."""
    if "gi" in sys.modules or importlib.util.find_spec("gi") is not None or not _DEBIAN_GI.exists():
        return
    spec = importlib.util.spec_from_file_location("gi", _DEBIAN_GI, submodule_search_locations=[str(_DEBIAN_GI.parent)])
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["gi"] = module
    try:
        spec.loader.exec_module(module)
    except ImportError:  # it was made for another version of Python
        del sys.modules["gi"]
        raise


class GenICam:
    """`device` is a name as `arv-tool-0.8` lists it, an IP address, or nothing for the first camera that is found."""

    is_replay = False
    rate: float | None = None

    def __init__(self, device: str, features: str, *, is_triggered: bool) -> None:
        self.name = f"genicam:{device}"
        self._device, self._features, self._is_triggered = device, features, is_triggered
        self._camera: Any = None
        self._stream: Any = None
        self._format = _FORMATS["Mono8"]
        self._is_lost = False
        self._aravis: Any = None
        self._error: type[Exception] = Exception

    def open(self) -> None:
        self._aravis, self._error = load_aravis()
        self._is_lost = False
        try:
            self._camera = self._aravis.Camera.new(self._device or None)
            self._start()
        except self._error as error:
            self.close()
            raise SourceError(f"{self.name}: {error}; found {self._found()}") from error

    def _start(self) -> None:
        camera = self._camera
        if camera is None:
            raise SourceError(f"{self.name}: no such camera; found {self._found()}")
        if self._features and not camera.get_device().set_features_from_string(self._features):
            raise SourceError(f"{self.name}: does not take the features {self._features!r}")
        if self._is_triggered:
            camera.set_trigger("Software")
        pixel_format = camera.get_pixel_format_as_string()
        if pixel_format not in _FORMATS:
            raise SourceError(
                f"{self.name}: sends {pixel_format}, wanted one of {', '.join(_FORMATS)}; "
                "set it on the camera, or with --features PixelFormat=Mono8"
            )
        self._format = _FORMATS[pixel_format]
        camera.get_device().connect("control-lost", self._on_lost)
        if camera.is_gv_device():
            # Aravis reads raw packets where it may (as root, not as a service): one way for all can be relied on.
            camera.gv_set_stream_options(self._aravis.GvStreamOption.PACKET_SOCKET_DISABLED)
        self._stream = camera.create_stream(None, None)
        if self._stream is None:
            raise SourceError(f"{self.name}: gives no stream; does another program hold the camera?")
        payload = camera.get_payload()
        if camera.is_gv_device():  # the kernel gives up to net.core.rmem_max
            self._stream.set_property("socket-buffer", self._aravis.GvStreamSocketBuffer.FIXED)
            self._stream.set_property("socket-buffer-size", min(_MOST_SOCKET_BYTES, _BUFFERS * payload))
        for _ in range(_BUFFERS):
            self._stream.push_buffer(self._aravis.Buffer.new_allocate(payload))
        camera.start_acquisition()

    def _on_lost(self, _device: object) -> None:
        self._is_lost = True

    def _found(self) -> str:
        self._aravis.update_device_list()
        names = [self._aravis.get_device_id(index) for index in range(self._aravis.get_n_devices())]
        return ", ".join(names) or "no camera at all (`arv-tool-0.8` looks for them; is it on this network?)"

    def read(self) -> Captured | None:
        if self._is_lost:
            raise SourceError(f"{self.name}: does not answer any more")
        try:
            if self._is_triggered:
                self._forget_old()
                self._camera.software_trigger()
        except self._error as error:
            raise SourceError(f"{self.name}: {error}") from error
        buffer = self._stream.timeout_pop_buffer(_WAIT_US)
        if buffer is None:
            return None
        try:
            return self._picture(buffer)
        finally:
            self._stream.push_buffer(buffer)

    def _forget_old(self) -> None:
        """A picture that came after its trigger was given up must not be taken for the next part's."""
        while (buffer := self._stream.try_pop_buffer()) is not None:
            self._stream.push_buffer(buffer)

    def _picture(self, buffer: Any) -> Captured:
        status = buffer.get_status()
        if status != self._aravis.BufferStatus.SUCCESS:
            told = f"{self.name}: a picture came incomplete ({status.value_nick})"
            raise PictureLostError(
                f"{told}; are net.core.rmem_max and the network's packets large enough? docs/cameras.md"
            )
        name, depth, channels, shift = self._format
        height, width = buffer.get_image_height(), buffer.get_image_width()
        data = buffer.get_data()
        wanted = height * width * channels * depth
        if len(data) < wanted:
            raise PictureLostError(f"{self.name}: found a picture of {len(data)} bytes, wanted {wanted}")
        values = np.frombuffer(data, "<u2" if depth == 2 else np.uint8, wanted // depth)
        pixels: PixelArray = values.reshape((height, width, 3) if channels == 3 else (height, width))
        return Captured(pixels << shift if shift else pixels, name, int(buffer.get_system_timestamp()))

    def idle(self) -> bool:
        if self._is_lost:
            raise SourceError(f"{self.name}: does not answer any more")
        return False

    def close(self) -> None:
        if self._camera is not None and self._stream is not None:
            try:
                self._camera.stop_acquisition()
            except self._error as error:
                log.debug("while stopping %s: %s", self.name, error)
        self._stream = self._camera = None
