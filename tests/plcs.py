"""PLCs for the tests: the program that docs/plc.md asks of a controls engineer, in Python, in a process of its own.

    python -m tests.plcs modbus-server --at HOST:PORT --notes FILE     (the bridge writes into it)
    python -m tests.plcs modbus-client --at HOST:PORT --notes FILE     (it polls the bridge)
    python -m tests.plcs opcua-client --at opc.tcp://... --notes FILE

Each part that it lets pass, and each that it rejects, is a line of FILE. It shares no code with the bridge: registers are
taken apart here a second time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

SCAN_S = 0.01
ALIVE_S = 0.3  # as docs/plc.md says
UNIT = 1
PASS = 1


@dataclass(frozen=True)
class View:
    """What the PLC sees in one scan."""

    session: int
    alive: int
    ready: bool
    number: int
    outcome: int
    parts: int
    seq: int
    tag: str
    camera: int | str = 0
    reason: int | str = 0
    part_number: int = 0
    waiting: int = 0
    overrun: int = 0


def from_registers(registers: list[int]) -> View:
    """30 of them, as docs/plc.md tells."""
    tag = b"".join(register.to_bytes(2, "big") for register in registers[12:28]).rstrip(b"\0").decode("ascii")
    return View(
        session=registers[0], alive=registers[1], ready=registers[2] == 1, number=registers[3], outcome=registers[4],
        reason=registers[5], camera=registers[6], parts=registers[7], seq=registers[8] << 16 | registers[9],
        part_number=registers[10] << 16 | registers[11], tag=tag, waiting=registers[28], overrun=registers[29],
    )  # fmt: skip


class Program:
    """Judges each scan's view. `decided` gets a part's tag and whether it may pass; once a result, never again."""

    def __init__(self, decided: Callable[[View, bool], None]) -> None:
        self._decided = decided
        self._alive: tuple[int, int] | None = None
        self._alive_s = float("-inf")
        self._last: tuple[int, int] | None = None  # session and number of the result that was taken last

    def scan(self, view: View, now_s: float) -> tuple[int, int] | None:
        """What to acknowledge, None for nothing."""
        if self._alive != (view.session, view.alive):
            # The first sight of a session proves nothing: the registers may be of a bridge that is long gone.
            known = self._alive is not None and self._alive[0] == view.session
            self._alive_s = now_s if known else self._alive_s
            self._alive = (view.session, view.alive)
        result = (view.session, view.number)
        is_alive = now_s - self._alive_s < ALIVE_S
        if view.number == 0 or not is_alive:
            return None
        if result != self._last:
            self._last = result
            self._decided(view, view.ready and view.outcome == PASS)
        return result


def noting(path: Path) -> Callable[[View, bool], None]:
    def decided(view: View, passed: bool) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"atNs": time.time_ns(), "passed": passed, **asdict(view)}) + "\n")

    return decided


def read_notes(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def modbus_server(at: str, program: Program) -> None:
    from pymodbus.server import ModbusTcpServer
    from pymodbus.simulator import DataType, SimData, SimDevice

    host, _, port = at.rpartition(":")
    device = SimDevice(UNIT, [SimData(0, count=100, values=0, datatype=DataType.REGISTERS)])
    server = ModbusTcpServer([device], address=(host, int(port)))
    await server.serve_forever(background=True)
    try:
        while True:
            view = from_registers(await server.async_getValues(UNIT, 3, 0, 30))
            acknowledged = program.scan(view, time.monotonic())
            if acknowledged:
                await server.async_setValues(UNIT, 16, 40, list(acknowledged))
            await asyncio.sleep(SCAN_S)
    finally:
        await server.shutdown()


async def modbus_client(at: str, program: Program) -> None:
    from pymodbus.client import AsyncModbusTcpClient

    host, _, port = at.rpartition(":")
    client = AsyncModbusTcpClient(host, port=int(port), timeout=0.5, retries=0, reconnect_delay=0)
    while True:
        try:
            if not client.connected:
                await client.connect()
            answer = await client.read_holding_registers(0, count=30, device_id=UNIT)
            acknowledged = program.scan(from_registers(answer.registers), time.monotonic())
            if acknowledged:
                await client.write_registers(40, list(acknowledged), device_id=UNIT)
        except Exception:  # the bridge is away: nothing is seen, nothing passes
            client.close()
        await asyncio.sleep(SCAN_S)


async def opcua_client(at: str, program: Program) -> None:
    from asyncua import Client

    names = ("session", "alive", "ready", "number", "outcome", "parts", "seq", "partId", "camera", "reason")
    while True:
        client = Client(at, timeout=0.5)
        try:
            async with client:
                index = await client.get_namespace_index("urn:inspectd:plc")
                nodes = [client.get_node(f"ns={index};s={name}") for name in names]
                place = client.get_node(f"ns={index};s=inspection")
                while True:
                    view = View(*await client.read_values(nodes))
                    acknowledged = program.scan(view, time.monotonic())
                    if acknowledged:
                        await acknowledge(place, index, *acknowledged)
                    await asyncio.sleep(SCAN_S)
        except Exception:  # the bridge is away: nothing is seen, nothing passes
            await asyncio.sleep(0.05)


async def acknowledge(place: Any, index: int, session: int, number: int) -> bool:
    from asyncua import ua

    arguments = [ua.Variant(value, ua.VariantType.UInt16) for value in (session, number)]
    return bool(await place.call_method(f"{index}:acknowledge", *arguments))


KINDS: dict[str, Callable[[str, Program], Awaitable[None]]] = {
    "modbus-server": modbus_server,
    "modbus-client": modbus_client,
    "opcua-client": opcua_client,
}


@click.command()
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.option("--at", required=True)
@click.option("--notes", type=click.Path(path_type=Path), required=True)
def main(kind: str, at: str, notes: Path) -> None:
    """A PLC until it is killed."""
    asyncio.run(KINDS[kind](at, Program(noting(notes))))


if __name__ == "__main__":
    main()
