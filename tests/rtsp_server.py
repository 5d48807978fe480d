"""An RTSP server on loopback for tests, by GStreamer's own; run by Debian's Python, which has its bindings.

    /usr/bin/python3 tests/rtsp_server.py PORT [FRAMES]

rtsp://127.0.0.1:PORT/live is a ball that moves, 160x120, 25 pictures a second as JPEG; it ends after FRAMES pictures.
"""

from __future__ import annotations

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402 - the versions come first

PIPELINE = (
    "( videotestsrc is-live=true pattern=ball num-buffers={frames} ! video/x-raw,width=160,height=120,framerate=25/1 "
    "! videoconvert ! video/x-raw,format=I420 ! jpegenc ! rtpjpegpay name=pay0 pt=26 )"
)


def main() -> None:
    port, frames = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "-1"
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(PIPELINE.format(frames=frames))
    server.get_mount_points().add_factory("/live", factory)
    if not server.attach(None):
        raise SystemExit(f"port {port} cannot be had")
    print("listening", flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
