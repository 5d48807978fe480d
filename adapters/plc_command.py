"""`inspectd plc modbus | opcua`: the process between the daemon's permits and a PLC.

Whatever fails, the PLC is left without a PASS: the daemon's silence ends the lease, the network's silence ends it too,
and where this process stands still `alive` stands still. docs/plc.md is the controls engineer's page.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click
import zmq
import zmq.asyncio

from adapters.bridge import Bridge
from adapters.plc import Handover
from daemon.config import load_config
from daemon.errors import UsageError
from daemon.keys import PeerFile, load_peer_file
from daemon.line.notify import notify
from daemon.line.permit import Lease

log = logging.getLogger("inspectd.plc")

_STATE_EVERY_S = 0.1
_CANCEL_AGAIN_S = 0.2


@dataclass(frozen=True)
class Station:
    """Which daemon, which of its cameras (their order numbers them), and for how long its word is good."""

    line: str
    permits: str
    cameras: tuple[str, ...]
    keys: PeerFile | None
    lease_ms: int


Serve = Callable[[Lease], Awaitable[None]]


async def serve(station: Station, handover: Handover, plc: Serve) -> None:
    """Both sides until SIGTERM or SIGINT. What the PLC's side raises ends it."""
    context: zmq.Context[Any] = zmq.Context()
    bridge = Bridge(
        context, station.permits, station.keys, station.line, lease=Lease(station.lease_ms),
        hear=lambda header, _, taken: taken and handover.take(header),
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    tasks = [asyncio.ensure_future(work) for work in (
        keep_permits(bridge), plc(bridge.lease), tell_state(bridge.lease, handover), ended.wait())]  # fmt: skip
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await end_all(tasks)
        bridge.close()
        context.term()


async def end_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel until they have ended: asyncio.wait_for (before Python 3.12) loses a cancellation that meets an answer."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_S)


async def keep_permits(bridge: Bridge) -> None:
    """Ping, and take verdicts in as they come."""
    poller = zmq.asyncio.Poller()
    poller.register(bridge.socket, zmq.POLLIN)
    while True:
        due_ns = bridge.ping(time.monotonic_ns())
        await poller.poll(max(1, (due_ns - time.monotonic_ns()) // 1_000_000))
        bridge.take()


async def tell_state(lease: Lease, handover: Handover) -> None:
    """A line whenever the lease comes or goes, and whenever results were lost; a sign of life for systemd."""
    was_ready, overrun = None, 0
    notify("READY=1")
    while True:
        is_ready = lease.is_fresh(time.monotonic_ns())
        notify("WATCHDOG=1", f"STATUS=lease {'fresh' if is_ready else 'over'}, {handover.overrun} results lost")
        if is_ready != was_ready:
            log.warning("lease %s state=%s", "fresh" if is_ready else "over: the PLC holds REJECT", lease.state)
        if handover.overrun != overrun:
            log.error("results lost, the PLC does not acknowledge total=%d", handover.overrun)
        was_ready, overrun = is_ready, handover.overrun
        await asyncio.sleep(_STATE_EVERY_S)


def find_station(config: Path | None, peer: Path | None, line: str, permits: str, cameras: Sequence[str]) -> Station:
    """From a configuration where there is one, else from the options. Raises UsageError with what is lacking."""
    lease_ms = 300
    if config is not None:
        found = load_config(config)
        line, permits, lease_ms = line or found.line, permits or found.permits.bind, found.permits.lease_ms
        cameras = cameras or tuple(found.cameras)
        unknown = [name for name in cameras if name not in found.cameras]
        if unknown:
            raise UsageError(f"found cameras {unknown}, wanted some of {', '.join(found.cameras)} (--camera)")
    lacking = [name for name, value in (("--line", line), ("--permits", permits), ("--camera", cameras)) if not value]
    if lacking:
        raise UsageError(f"found neither --config nor {', '.join(lacking)}; wanted one of the two")
    if permits.startswith("tcp://") and peer is None:
        raise UsageError(
            f"{permits} speaks CURVE: wanted --peer FILE, made by `inspectd keygen peer NAME --role bridge "
            f"--topic permit/{line}` on the daemon's machine"
        )
    local = permits.replace("//*:", "//127.0.0.1:").replace("//0.0.0.0:", "//127.0.0.1:")
    return Station(line, local, tuple(cameras), load_peer_file(peer) if peer else None, lease_ms)


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT. Raises UsageError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"found {text!r}, wanted HOST:PORT")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def station_options(command: Callable[..., None]) -> Callable[..., None]:
    """What both bridges are told of the daemon."""
    options = [
        click.option("--config", type=click.Path(path_type=Path, exists=True), help="The daemon's, where it is here."),
        click.option("--peer", type=click.Path(path_type=Path), help="This bridge's key file, of role bridge."),
        click.option("--line", default="", help="The line's name; default: from --config."),
        click.option("--permits", default="", help="Where the daemon's permits are, tcp://HOST:PORT; from --config."),
        click.option("--camera", "cameras", multiple=True, help="Whose parts; may be repeated. Default: all."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group("plc")
def command() -> None:
    """Hand verdicts to a PLC, one part at a time."""


@command.command("modbus")
@station_options
@click.option("--plc", "plc", default="", help="HOST:PORT of the PLC's Modbus server: write into it.")
@click.option("--serve", "at", default="", help="HOST:PORT to listen at: the PLC reads from here.")
@click.option("--unit", type=click.IntRange(0, 255), default=1, show_default=True, help="Of the Modbus address.")
@click.option("--base", type=click.IntRange(0, 65493), default=0, show_default=True, help="The first holding register.")
@click.option("--cycle-ms", type=click.IntRange(5, 1000), default=20, show_default=True, help="With --plc.")
def modbus(  # noqa: PLR0917 - click hands every option over
    config: Path | None, peer: Path | None, line: str, permits: str, cameras: tuple[str, ...],
    plc: str, at: str, unit: int, base: int, cycle_ms: int,
) -> None:  # fmt: skip
    """Modbus TCP, as a client of the PLC (--plc) or as a server that it polls (--serve)."""
    try:
        from adapters.plc_modbus import ModbusClient, ModbusServer, Place
    except ImportError as error:
        raise UsageError(f"{error}; Modbus needs an extra: pip install 'inspectd[plc]'") from error

    if bool(plc) == bool(at):
        raise UsageError(f"found {'both' if plc else 'neither'} of --plc and --serve, wanted one of the two")
    station = find_station(config, peer, line, permits, cameras)
    handover = Handover(station.cameras)
    place = Place(*parse_address(plc or at), unit, base)
    logging.getLogger("pymodbus").setLevel(logging.CRITICAL)  # a line for each try while the PLC is away
    if at and not is_loopback(place.host):
        log.warning("modbus has no passwords: whoever reaches %s reads results and may acknowledge them", at)
    side = (
        ModbusClient(place, handover, station.cameras, cycle_ms / 1000)
        if plc
        else ModbusServer(place, handover, station.cameras)
    )
    asyncio.run(serve(station, handover, side.run))
    sys.exit(0)


@command.command("opcua")
@station_options
@click.option("--serve", "at", default="127.0.0.1:4840", show_default=True, help="HOST:PORT to listen at.")
@click.option(
    "--certificates", type=click.Path(path_type=Path), default=Path("keys/opcua"), show_default=True,
    help="Folder of the server's certificate and of those it trusts.",
)  # fmt: skip
@click.option("--insecure", is_flag=True, help="No encryption, and nobody is asked who they are.")
@click.option("--cycle-ms", type=click.IntRange(5, 1000), default=20, show_default=True, help="How often it is shown.")
def opcua(  # noqa: PLR0917 - click hands every option over
    config: Path | None, peer: Path | None, line: str, permits: str, cameras: tuple[str, ...],
    at: str, certificates: Path, insecure: bool, cycle_ms: int,  # noqa: FBT001 - click
) -> None:  # fmt: skip
    """An OPC UA server with one result object, which clients with a trusted certificate read and acknowledge."""
    try:
        from adapters.plc_opcua import Endpoint, OpcUaServer
    except ImportError as error:
        raise UsageError(f"{error}; OPC UA needs an extra: pip install 'inspectd[plc]'") from error

    station = find_station(config, peer, line, permits, cameras)
    handover = Handover(station.cameras)
    host, port = parse_address(at)
    if insecure and not is_loopback(host):
        log.warning("INSECURE: whoever reaches %s reads results and may acknowledge them", at)
    logging.getLogger("asyncua").setLevel(logging.ERROR)  # a line for each client that comes and goes
    endpoint = Endpoint(host, port, None if insecure else certificates)
    asyncio.run(serve(station, handover, OpcUaServer(endpoint, handover, cycle_ms / 1000).run))
    sys.exit(0)
