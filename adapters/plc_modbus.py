"""Modbus TCP: the bridge writes into a PLC's holding registers, or a PLC reads them from the bridge.

Registers from `base` on (docs/plc.md has the table and the timing): 30 that the bridge writes, and from `base` + 40 on
two that the PLC writes: session and number of the result that it has taken. 32-bit numbers are high word first.
As a client the bridge writes a result's facts first and its number in a transaction behind them, so that a PLC that
sees a new number has all that belongs to it. As a server it makes the registers anew for each reading.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pymodbus.client import AsyncModbusTcpClient
from pymodbus.constants import ExcCodes
from pymodbus.exceptions import ModbusException
from pymodbus.pdu import ModbusPDU
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from adapters.plc import TAG_BYTES, Handover, Output
from daemon.errors import InspectError, UsageError
from daemon.line.permit import Lease

log = logging.getLogger("inspectd.plc")

HEAD, REGISTERS, ACKNOWLEDGE_AT = 4, 30, 40
ACKNOWLEDGE = 2
_TIMEOUT_S = 0.5
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0


@dataclass(frozen=True)
class Place:
    """Where a Modbus server is, and where in it our registers begin."""

    host: str
    port: int
    unit: int = 1
    base: int = 0

    def __str__(self) -> str:
        return f"{self.host}:{self.port} unit {self.unit} register {self.base}"


def encode_registers(output: Output, cameras: Sequence[str]) -> list[int]:
    """30 registers; a camera's number is its place in `cameras`, from 1 on."""
    camera = 1 + cameras.index(output.camera) if output.camera in cameras else 0
    tag = output.part_id.encode("ascii", "replace")[:TAG_BYTES].ljust(TAG_BYTES, b"\0")
    facts = [output.shown, output.reason_code, camera, min(output.parts, 0xFFFF)]
    facts += [*_words(output.seq), *_words(output.part_number)]
    facts += [int.from_bytes(tag[at : at + 2], "big") for at in range(0, TAG_BYTES, 2)]
    facts += [output.waiting, output.overrun]
    return [output.session, output.alive, int(output.is_ready), output.number, *map(int, facts)]


def _words(number: int) -> tuple[int, int]:
    return number >> 16 & 0xFFFF, number & 0xFFFF


class ModbusClient:
    """Writes into a PLC for as long as `run` is awaited, and comes back whenever it goes."""

    def __init__(self, place: Place, handover: Handover, cameras: Sequence[str], cycle_s: float) -> None:
        self._place, self._handover, self._cameras, self._cycle_s = place, handover, cameras, cycle_s
        self._facts: list[int] | None = None  # as they lie in the PLC; None: not known
        self.is_connected = False

    async def run(self, lease: Lease) -> None:
        """Until cancelled."""
        wait_s = _FIRST_WAIT_S
        while True:
            # No reconnection of its own: after a pause the PLC may be another one, and all is written anew.
            client = AsyncModbusTcpClient(
                self._place.host, port=self._place.port, timeout=_TIMEOUT_S, retries=0, reconnect_delay=0
            )
            try:
                if not await client.connect():
                    raise ConnectionError("no connection")
                await self._serve(client, lease)
            except (ModbusException, InspectError, OSError, asyncio.TimeoutError) as error:
                if self.is_connected or wait_s == _FIRST_WAIT_S:
                    log.error("plc lost place=%s: %s; tried again", self._place, error)  # noqa: TRY400
                wait_s = _FIRST_WAIT_S if self.is_connected else min(2 * wait_s, _LONGEST_WAIT_S)
            finally:
                self.is_connected, self._facts = False, None
                client.close()
            await asyncio.sleep(wait_s)

    async def _serve(self, client: AsyncModbusTcpClient, lease: Lease) -> None:
        while True:
            began_s = time.monotonic()
            await self.exchange(client, lease)
            if not self.is_connected:
                self.is_connected = True
                log.warning("plc connected place=%s session=%d", self._place, self._handover.session)
            await asyncio.sleep(max(0.0, self._cycle_s - (time.monotonic() - began_s)))

    async def exchange(self, client: AsyncModbusTcpClient, lease: Lease) -> None:
        """One cycle: what the PLC acknowledges, then what it is to read."""
        base, unit = self._place.base, self._place.unit
        answer = await client.read_holding_registers(base + ACKNOWLEDGE_AT, count=ACKNOWLEDGE, device_id=unit)
        session, number = self._checked(answer).registers
        self._handover.acknowledge(session, number)
        output = self._handover.show(lease, time.monotonic_ns(), int(2e9 * self._cycle_s))
        registers = encode_registers(output, self._cameras)
        head, facts = registers[:HEAD], registers[HEAD:]
        if facts != self._facts:
            self._facts = None  # until the PLC has said that it took them
            self._checked(await client.write_registers(base + HEAD, facts, device_id=unit))
            self._facts = facts
        self._checked(await client.write_registers(base, head, device_id=unit))

    def _checked(self, answer: ModbusPDU) -> ModbusPDU:
        if answer.isError():
            wanted = f"{REGISTERS} holding registers from {self._place.base} and {ACKNOWLEDGE} behind +{ACKNOWLEDGE_AT}"
            raise InspectError(f"the PLC answers {answer}, wanted {wanted}; look at unit and base")
        return answer


class ModbusServer:
    """A PLC reads from it and acknowledges to it. Modbus knows no passwords: whoever reaches the port may do both."""

    def __init__(self, place: Place, handover: Handover, cameras: Sequence[str]) -> None:
        self._place, self._handover, self._cameras = place, handover, cameras
        self._lease: Lease | None = None

    async def run(self, lease: Lease) -> None:
        """Until cancelled. Raises UsageError where the address cannot be had."""
        self._lease = lease
        end = self._place.base + ACKNOWLEDGE_AT + ACKNOWLEDGE
        registers = SimData(self._place.base, count=end - self._place.base, values=0, datatype=DataType.REGISTERS)
        device = SimDevice(self._place.unit, [registers], action=self._act)
        server = ModbusTcpServer([device], address=(self._place.host, self._place.port))
        try:
            await server.serve_forever(background=True)
        except (RuntimeError, OSError) as error:
            raise UsageError(f"cannot listen at {self._place}: {error}; is the port taken, or below 1024?") from error
        log.warning("plc server listens place=%s session=%d", self._place, self._handover.session)
        try:
            await asyncio.Event().wait()
        finally:
            await server.shutdown()

    async def _act(
        self, _function: int, start: int, address: int, count: int, registers: list[int],
        values: list[int] | list[bool] | None,
    ) -> ExcCodes | None:  # fmt: skip
        """Before each reading the registers are made anew; only the acknowledgement may be written."""
        if values is None:
            assert self._lease is not None
            output = self._handover.show(self._lease, time.monotonic_ns())
            registers[:REGISTERS] = encode_registers(output, self._cameras)
            return None
        first = address - start - ACKNOWLEDGE_AT
        if first < 0 or first + count > ACKNOWLEDGE:
            return ExcCodes.ILLEGAL_ADDRESS
        written = registers[ACKNOWLEDGE_AT : ACKNOWLEDGE_AT + ACKNOWLEDGE]
        written[first : first + count] = [int(value) for value in values]
        self._handover.acknowledge(*written)
        return None
