"""`inspectd doctor`: what it says of machines that tests do not have, and what to do about each finding that is not good."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
import types
from pathlib import Path

import pytest
import yaml

from daemon import doctor, machine
from daemon.keys import make_peer
from daemon.machine import Finding
from tests.daemons import Site, free_port, make_site
from tests.fake_cuda import Gpu, install


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    site = make_site(tmp_path_factory.mktemp("doctor"))
    (site.folder / "keys").chmod(0o700)
    return site


@pytest.fixture
def site(shared_site, tmp_path):
    folder = tmp_path / "site"
    shutil.copytree(shared_site.folder, folder, symlinks=True)
    return Site(folder, yaml.safe_load(yaml.safe_dump(shared_site.config)))


def examined(site):
    return doctor.examine(site.write_config())


def told(findings, word):
    """Of each finding that names the word, its state and text."""
    return [(finding.state, finding.what) for finding in findings if word in finding.what]


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


# --- every finding


def test_what_is_not_good_says_what_to_do(site, monkeypatch):
    """Everything wrong at once: no finding is a bare statement."""
    monkeypatch.setattr(machine, "available_memory_gb", lambda: 0.5)
    monkeypatch.setattr(doctor, "available_memory_gb", lambda: 0.5)
    monkeypatch.setattr(doctor, "has_bf16", lambda: False)
    monkeypatch.setattr(machine, "is_clock_kept", lambda: False)
    monkeypatch.setattr(machine, "processor_flags", frozenset)
    monkeypatch.setattr(machine, "nvidia_gpus", list)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1e8))
    site.config["backend"] |= {"threads": 8, "precision": "bf16", "kind": "cuda"}
    site.config["queue_mb"] = 4000
    site.config["inputs"][0]["bind"] = "tcp://192.0.2.1:5550"
    (site.folder / "keys").chmod(0o755)
    (site.folder / "keys/peers.yaml").unlink()
    bad = [finding for finding in examined(site) if finding.state != "ok"]
    assert [str(finding) for finding in bad if "; " not in finding.what] == []  # behind which stands what to do
    for word in (
        "core(s)", "memory", "clock", "backend.threads", "backend.precision", "queue_mb", "gpu", "keys", "inputs[0]",
        "ledger", "recorder", "AVX2",
    ):  # fmt: skip
        assert told(bad, word), word


def test_a_machine_without_faults_has_none(site):
    assert [finding for finding in examined(site) if finding.state == "FAIL"] == []


# --- processor, memory, clock


def test_the_processors_abilities_are_read_as_the_kernel_tells_them(tmp_path):
    write(
        tmp_path, "proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    )
    assert machine.processor_flags(tmp_path) == {"fpu", "sse2", "avx2", "avx512f"}
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd sve\n")
    assert machine.processor_flags(tmp_path) == {"fp", "asimd", "sve"}
    assert machine.processor_flags(tmp_path / "none") == frozenset()


def test_a_processor_without_avx2_is_told(monkeypatch):
    monkeypatch.setattr(machine, "processor_flags", lambda: frozenset({"fpu", "sse2"}))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    ((state, _),) = told(machine.examine_machine(), "several times slower")
    assert state == "WARN"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert told(machine.examine_machine(), "several times slower") == []


def test_free_memory_is_what_programs_could_have(tmp_path):
    write(tmp_path, "proc/meminfo", "MemTotal: 8000000 kB\nMemFree: 100 kB\nMemAvailable: 2000000 kB\n")
    assert machine.available_memory_gb(tmp_path) == pytest.approx(2.048)


@pytest.mark.parametrize(
    ("state", "wanted"),
    [(0, True), (4, True), (machine._TIME_ERROR, False), (-1, None)],
    ids=["kept", "leap", "alone", "silent"],
)
def test_the_clock_is_what_the_kernel_says(monkeypatch, state, wanted):
    monkeypatch.setattr("ctypes.CDLL", lambda _: types.SimpleNamespace(adjtimex=lambda _: state))
    assert machine.is_clock_kept() is wanted
    assert machine._clock().state == ("ok" if wanted else "WARN")
    assert wanted or "timedatectl set-ntp true" in machine._clock().what


def test_a_c_library_without_adjtimex_says_nothing_of_the_clock(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda _: types.SimpleNamespace())
    assert machine.is_clock_kept() is None


def test_this_machines_clock_can_be_asked():
    assert machine.is_clock_kept() in {True, False, None}


# --- GPU


def machine_with_gpu(root: Path, *, driver: bool) -> Path:
    device = "sys/bus/pci/devices/0000:01:00.0"
    write(root, f"{device}/vendor", "0x10de\n")
    write(root, f"{device}/class", "0x030200\n")
    write(root, "sys/bus/pci/devices/0000:01:00.1/vendor", "0x10de\n")  # its sound
    write(root, "sys/bus/pci/devices/0000:01:00.1/class", "0x040300\n")
    write(root, "sys/bus/pci/devices/0000:00:02.0/vendor", "0x8086\n")
    write(root, "sys/bus/pci/devices/0000:00:02.0/class", "0x030000\n")
    if driver:
        write(
            root, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu\nGCC\n"
        )
    return root


class CudaLibrary:
    """libcuda.so.1."""

    def __init__(self, failure=0):
        self._failure = failure

    def cuInit(self, _):  # noqa: N802 - the driver's name
        return self._failure

    def cuDriverGetVersion(self, found):  # noqa: N802
        found._obj.value = 12040
        return 0


@pytest.fixture
def with_gpu(tmp_path, monkeypatch):
    """A machine as far as `examine_gpu` asks: PCI bus, driver, driver library."""

    def make(*, driver=True, failure=0):
        root = machine_with_gpu(tmp_path, driver=driver)
        gpus, version, cuda = machine.nvidia_gpus, machine.nvidia_driver, machine.cuda_version
        monkeypatch.setattr(machine, "nvidia_gpus", lambda: gpus(root))
        monkeypatch.setattr(machine, "nvidia_driver", lambda: version(root))
        monkeypatch.setattr(machine, "cuda_version", lambda: cuda(CudaLibrary(failure)))

    return make


def test_graphics_of_nvidia_are_found_on_the_bus(tmp_path):
    assert machine.nvidia_gpus(machine_with_gpu(tmp_path, driver=False)) == ["NVIDIA at 0000:01:00.0"]
    assert machine.nvidia_driver(tmp_path) is None
    machine_with_gpu(tmp_path, driver=True)
    assert machine.nvidia_driver(tmp_path) == "550.54.14"


def test_a_jetson_is_known_by_its_model(tmp_path):
    write(tmp_path, "proc/device-tree/model", "NVIDIA Jetson AGX Orin Developer Kit\0")
    assert machine.nvidia_gpus(tmp_path) == ["NVIDIA Jetson AGX Orin Developer Kit"]
    write(tmp_path, "proc/device-tree/model", "Raspberry Pi 5\0")
    assert machine.nvidia_gpus(tmp_path) == []


@pytest.mark.parametrize(("kind", "state"), [("auto", "ok"), ("cpu", "ok"), ("cuda", "FAIL")])
def test_no_gpu_is_a_fault_only_where_one_is_asked_for(tmp_path, monkeypatch, kind, state):
    monkeypatch.setattr(machine, "nvidia_gpus", list)
    (finding,) = machine.examine_gpu(kind)
    assert finding.state == state


@pytest.mark.parametrize(("kind", "state"), [("auto", "WARN"), ("cuda", "FAIL"), ("cpu", "WARN")])
def test_a_gpu_without_a_driver_is_told(with_gpu, kind, state):
    with_gpu(driver=False)
    (finding,) = machine.examine_gpu(kind)
    assert (finding.state, "install NVIDIA's" in finding.what) == (state, True)


def test_a_gpu_that_nobody_asked_for_is_good(with_gpu):
    with_gpu()
    (finding,) = machine.examine_gpu("cpu")
    assert finding == Finding("ok", "gpu: NVIDIA at 0000:01:00.0, driver 550.54.14; not used (backend.kind: cpu)")


def test_a_driver_that_finds_no_gpu_is_told(with_gpu):
    with_gpu(failure=100)
    (finding,) = machine.examine_gpu("auto")
    assert finding.state == "WARN"
    assert "nvidia-smi says why" in finding.what


def test_a_driver_without_its_library_is_told(monkeypatch):
    def absent(name):
        raise OSError(errno.ENOENT, name)

    monkeypatch.setattr("ctypes.CDLL", absent)
    assert machine.cuda_version() is None


def test_a_gpu_without_tensorrt_is_told(with_gpu, monkeypatch):
    with_gpu()
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    card, libraries = machine.examine_gpu("auto")
    assert card.what == "gpu: NVIDIA at 0000:01:00.0, driver 550.54.14, CUDA 12.4"
    assert (libraries.state, "pip install 'inspectd[gpu]'" in libraries.what) == ("WARN", True)


@pytest.mark.parametrize(
    ("version", "kind", "state"),
    [("10.3.0", "auto", "ok"), ("11.9", "cuda", "ok"), ("8.6.1", "auto", "WARN"), ("12.0.1", "cuda", "FAIL")],
)
def test_a_tensorrt_of_another_time_is_told(with_gpu, monkeypatch, version, kind, state):
    with_gpu()
    install(monkeypatch, Gpu())
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", version, raising=False)
    _, libraries = machine.examine_gpu(kind)
    assert libraries.state == state
    assert version in libraries.what
    assert state == "ok" or "wanted 10.3 to 11.x" in libraries.what


def test_an_engine_without_a_plan_on_a_machine_with_a_gpu_is_told(site, with_gpu, monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: ["NVIDIA at 0000:01:00.0"])
    site.config["backend"]["kind"] = "auto"
    ((state, what),) = told(examined(site), "the processor judges, not the GPU")
    assert state == "WARN"
    assert "--targets trt" in what


# --- keys


def test_a_key_folder_that_is_not_there_is_told_with_the_command(site):
    shutil.rmtree(site.folder / "keys")
    findings = examined(site)
    assert (
        "FAIL",
        f"keys: {site.folder / 'keys'} is not there; make it with: inspectd keygen server --keys {site.folder / 'keys'}",
    ) in told(findings, "keys")


def test_a_peer_of_another_line_is_told(site):
    make_peer(site.folder / "keys", "cam9", ["camera"], ["frame/other/cam1"])
    assert [state for state, what in told(examined(site), "peer cam9 as camera")] == ["WARN"]


def test_a_camera_that_no_key_may_speak_for_is_told_with_the_command(site):
    (site.folder / "keys/peers.yaml").unlink()
    make_peer(site.folder / "keys", "cam1", ["camera"], ["frame/test/cam1"])
    site.config["cameras"]["cam2"] = site.config["cameras"]["cam1"]
    ((state, what),) = told(examined(site), "may speak for")
    assert state == "WARN"
    assert "inspectd keygen peer cam2 --role camera --topic frame/test/cam2" in what


def test_a_camera_of_stock_senders_needs_no_key(site):
    (site.folder / "keys/peers.yaml").unlink()
    make_peer(site.folder / "keys", "cam1", ["camera"], ["frame/test/cam1"])
    site.config["cameras"]["cam2"] = site.config["cameras"]["cam1"]
    site.config["inputs"].append(
        {"kind": "imagezmq-rep", "bind": f"tcp://127.0.0.1:{free_port()}", "camera": "cam2", "plain": True}
    )
    assert told(examined(site), "may speak for") == []


def test_a_fault_that_two_checks_meet_is_told_once(site):
    (site.folder / "keys/peers.yaml").write_text("- {name: x}")
    faults = [str(finding) for finding in examined(site) if "peers.yaml" in finding.what]
    assert len(faults) == len(set(faults)) == 1


# --- ports, paths, disk


def test_a_port_that_is_taken_is_told_with_its_holder(site):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        site.config["results"]["bind"] = f"tcp://127.0.0.1:{port}"
        ((state, what),) = told(examined(site), "results: ")
    assert state == "FAIL"
    assert f"(pid {os.getpid()})" in what
    assert "choose another port" in what


def test_the_metrics_port_is_asked_too(site):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        site.config["metrics"] = {"bind": f"127.0.0.1:{holder.getsockname()[1]}"}
        assert [state for state, _ in told(examined(site), "metrics: ")] == ["FAIL"]


def test_ports_of_the_daemon_that_runs_are_no_fault(site):
    site.config["metrics"] = {"bind": f"127.0.0.1:{free_port()}"}
    site.start()
    findings = examined(site)
    assert site.stop() == 0
    assert [state for state, _ in told(findings, "is held by the daemon that runs")] == ["ok"] * 4
    assert told(findings, "is taken by") == []


def test_nobody_is_named_where_nobody_listens():
    assert machine.listener(free_port()) is None


def test_a_holder_that_this_user_may_not_see_is_not_named(tmp_path):
    write(tmp_path, "proc/net/tcp", "sl local\n 0: 0100007F:15AE 00000000:0000 0A 0:0 0:0 0 0 0 4242 1\n")
    (tmp_path / "proc/77/fd").mkdir(parents=True)
    write(tmp_path, "proc/77/comm", "camera\n")
    assert machine.listener(0x15AE, tmp_path) is None
    (tmp_path / "proc/77/fd/3").symlink_to("socket:[4242]")
    assert machine.listener(0x15AE, tmp_path) == "camera (pid 77)"
    assert machine.listener(0x15AF, tmp_path) is None


@pytest.mark.parametrize(
    ("number", "state", "advice"),
    [
        (errno.EADDRNOTAVAIL, "FAIL", "0.0.0.0 is all"),
        (errno.EACCES, "FAIL", "below 1024"),
        (errno.EINVAL, "WARN", "is it an address of this box?"),
    ],
)
def test_an_address_that_cannot_be_had_is_told(number, state, advice):
    finding = doctor._taken("results: host:80", 80, OSError(number, "no"), is_running=False)
    assert (finding.state, advice in finding.what) == (state, True)


def test_a_name_that_is_no_address_is_told(site):
    site.config["results"]["bind"] = "tcp://no..such..host:5551"
    ((state, what),) = told(examined(site), "results: ")
    assert (state, "is it an address of this box?" in what) == ("WARN", True)


def test_a_path_that_is_too_long_for_a_socket_is_told(site):
    site.config["control"]["bind"] = f"ipc://{'deep/' * 30}control.sock"
    ((state, what),) = told(examined(site), "control: ")
    assert (state, "107 characters" in what, "shorter path" in what) == ("FAIL", True, True)


def test_a_folder_that_is_a_file_is_told(site):
    (site.folder / "books").write_text("")
    site.config["ledger"]["dir"] = "books/ledger"
    ((state, what),) = told(examined(site), "ledger: ")
    assert (state, "name another folder" in what) == ("FAIL", True)
