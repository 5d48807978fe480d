"""Results handed to a PLC: one part at a time, and never a PASS that the lease does not give."""

import asyncio
import socket
import time
from contextlib import asynccontextmanager, closing

import click.testing
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters import plc_command
from adapters.plc import MOST_WAITING, TAG_BYTES, Handover, Shown
from adapters.plc_modbus import ModbusClient, ModbusServer, Place, encode_registers
from daemon.errors import UsageError
from daemon.line.permit import Lease
from tests import plcs
from tests.daemons import free_port

MS = 1_000_000
VALID_MS = 500


class Daemon:
    """The other end of a lease, on a clock that only moves when it is told."""

    def __init__(self, lease_ms=300):
        self.lease, self.now_ns, self.nonces = Lease(lease_ms), 10**9, 0
        self.hello()

    def hello(self, run="run1"):
        self.nonces += 1
        self.run = run
        self.lease.hello(f"n{self.nonces}", self.now_ns)
        self.lease.receive({"type": "BIRTH", "run": run}, self.now_ns)
        self.beat()

    def beat(self, state="RUNNING"):
        self.nonces += 1
        self.lease.ping(f"n{self.nonces}", self.now_ns)
        beat = {"type": "HEARTBEAT", "run": self.run, "state": state, "degraded": None, "nonce": f"n{self.nonces}"}
        self.lease.receive(beat, self.now_ns)

    def verdict(self, seq, outcome="PASS", *, part_id="", camera="cam1", reason=None, **more):
        header = {
            "type": "VERDICT", "run": self.run, "camera": camera, "epoch": "e", "seq": seq, "validMs": VALID_MS,
            "partId": part_id or f"part-{seq}", "outcome": outcome, "nonce": f"n{self.nonces}",
            "reason": reason or (None if outcome == "PASS" else "DEFECT"), **more,
        }  # fmt: skip
        assert self.lease.receive(header, self.now_ns) is not None
        return header

    def wait(self, milliseconds):
        self.now_ns += int(milliseconds * MS)


@pytest.fixture
def daemon():
    return Daemon()


def shown(handover, daemon, **more):
    return handover.show(daemon.lease, daemon.now_ns, **more)


def test_nothing_to_show_is_no_pass(daemon):
    output = shown(Handover(), daemon)
    assert (output.number, output.shown, output.is_ready) == (0, Shown.NOTHING, True)


def test_a_result_stays_until_it_is_acknowledged_then_the_next_comes(daemon):
    handover = Handover()
    for seq in (7, 8):
        handover.take(daemon.verdict(seq))
    first = shown(handover, daemon)
    assert (first.seq, first.part_id, first.shown, first.waiting) == (7, "part-7", Shown.PASS, 1)
    assert shown(handover, daemon).number == first.number
    assert handover.acknowledge(first.session, first.number)
    second = shown(handover, daemon)
    assert (second.seq, second.waiting) == (8, 0)
    assert second.number != first.number


@pytest.mark.parametrize("wrong", ["number", "session", "zero"])
def test_another_acknowledgement_moves_nothing(daemon, wrong):
    handover = Handover()
    handover.take(daemon.verdict(1))
    output = shown(handover, daemon)
    session, number = output.session, output.number
    given = {"number": (session, number + 1), "session": (session + 1, number), "zero": (0, 0)}[wrong]
    assert not handover.acknowledge(*given)
    assert shown(handover, daemon).seq == 1


def test_an_acknowledgement_counts_once(daemon):
    handover = Handover()
    for seq in (1, 2):
        handover.take(daemon.verdict(seq))
    output = shown(handover, daemon)
    assert handover.acknowledge(output.session, output.number)
    assert not handover.acknowledge(output.session, output.number)
    assert shown(handover, daemon).seq == 2


def test_a_repeated_verdict_is_one_result(daemon):
    handover = Handover()
    header = daemon.verdict(1)
    assert handover.take(header)
    assert not handover.take(header)
    output = shown(handover, daemon)
    handover.acknowledge(output.session, output.number)
    assert shown(handover, daemon).number == 0


def test_a_pass_that_has_expired_is_a_reject_and_stays_one(daemon):
    handover = Handover()
    handover.take(daemon.verdict(1))
    assert shown(handover, daemon).shown is Shown.PASS
    daemon.wait(VALID_MS)
    daemon.beat()
    output = shown(handover, daemon)
    assert (output.shown, output.reason, output.is_ready) == (Shown.REJECT, "EXPIRED", True)
    assert shown(handover, daemon).shown is Shown.REJECT


def test_a_pass_without_a_lease_is_a_reject_also_when_the_lease_comes_back(daemon):
    handover = Handover()
    handover.take(daemon.verdict(1))
    daemon.wait(301)
    output = shown(handover, daemon)
    assert (output.shown, output.reason, output.is_ready) == (Shown.REJECT, "NO_LEASE", False)
    daemon.beat()
    assert shown(handover, daemon).shown is Shown.REJECT


def test_a_paused_daemon_passes_nothing(daemon):
    handover = Handover()
    handover.take(daemon.verdict(1))
    daemon.wait(1)
    daemon.beat("PAUSED")
    assert shown(handover, daemon).shown is Shown.REJECT


def test_a_pass_must_outlive_the_time_that_it_stays_readable(daemon):
    handover = Handover()
    handover.take(daemon.verdict(1))
    daemon.wait(VALID_MS - 30)
    daemon.beat()
    assert shown(handover, daemon, margin_ns=20 * MS).shown is Shown.PASS
    assert shown(handover, daemon, margin_ns=40 * MS).shown is Shown.REJECT


def test_a_reject_needs_no_lease(daemon):
    handover = Handover()
    handover.take(daemon.verdict(1, "REJECT"))
    daemon.wait(10_000)
    output = shown(handover, daemon)
    assert (output.shown, output.reason) == (Shown.REJECT, "DEFECT")


@pytest.mark.parametrize("tag", ["x" * (TAG_BYTES + 1), "Teil-ä", "line\nbreak"])
def test_a_tag_that_the_plc_cannot_read_whole_does_not_pass(daemon, tag):
    handover = Handover()
    handover.take(daemon.verdict(1, part_id=tag))
    output = shown(handover, daemon)
    assert (output.shown, output.reason) == (Shown.REJECT, "BAD_TAG")


def test_other_cameras_are_not_taken(daemon):
    handover = Handover(["cam2"])
    assert not handover.take(daemon.verdict(1, camera="cam1"))
    assert handover.take(daemon.verdict(1, camera="cam2"))


def test_a_range_of_missing_parts_is_one_result(daemon):
    handover = Handover()
    handover.take(daemon.verdict(100, "REJECT", reason="MISSING", seqFrom=100, seqTo=299))
    output = shown(handover, daemon)
    assert (output.seq, output.parts, output.reason) == (100, 200, "MISSING")


def test_a_plc_that_acknowledges_nothing_loses_the_oldest_and_is_told(daemon):
    handover = Handover()
    handover.take(daemon.verdict(0))
    shown(handover, daemon)
    for seq in range(1, MOST_WAITING + 4):
        handover.take(daemon.verdict(seq))
    output = shown(handover, daemon)
    assert (output.seq, output.waiting, output.overrun) == (0, MOST_WAITING, 3)
    handover.acknowledge(output.session, output.number)
    assert shown(handover, daemon).seq == 4


def test_numbers_begin_again_behind_the_last_and_leave_zero_out(daemon):
    handover = Handover()
    handover._number = 0xFFFE
    numbers = []
    for seq in range(3):
        handover.take(daemon.verdict(seq, "REJECT"))
        output = shown(handover, daemon)
        numbers.append(output.number)
        handover.acknowledge(output.session, output.number)
    assert numbers == [0xFFFF, 1, 2]


@pytest.mark.parametrize(("tag", "number"), [("12", 12), ("0012", 12), ("4294967295", 2**32 - 1), ("4294967296", 0),
                                             ("part-1", 0), ("", 0), ("²", 0)])  # fmt: skip
def test_a_tag_of_digits_is_also_a_number(daemon, tag, number):
    handover = Handover()
    handover.take(daemon.verdict(1, "REJECT") | {"partId": tag})
    assert shown(handover, daemon).part_number == number


def test_registers_say_what_the_page_says(daemon):
    handover = Handover(["cam1", "cam2"])
    handover.take(daemon.verdict(70_000, "REJECT", camera="cam2", part_id="A-17", reason="LATE"))
    output = shown(handover, daemon)
    view = plcs.from_registers(encode_registers(output, ["cam1", "cam2"]))
    assert view == plcs.View(
        session=output.session, alive=output.alive, ready=True, number=1, outcome=2, reason=8, camera=2, parts=1,
        seq=70_000, tag="A-17", part_number=0, waiting=0, overrun=0,
    )  # fmt: skip


@hypothesis_settings(max_examples=150, stateful_step_count=60, deadline=None)
class Handing(RuleBasedStateMachine):
    """Whatever is lost, delayed, acknowledged or not: what the PLC reads as PASS is that part's own, valid PASS."""

    @initialize()
    def begin(self):
        self.daemon, self.handover = Daemon(), Handover()
        self.seq, self.issued, self.of_number, self.rejected = 0, {}, {}, set()
        self.last = None

    @rule(outcome=st.sampled_from(["PASS", "PASS", "REJECT"]))
    def judge(self, outcome):
        if self.daemon.lease.needs_hello(self.daemon.now_ns):
            self.daemon.hello(self.daemon.run)
        self.issued[self.seq] = (outcome, self.daemon.now_ns + VALID_MS * MS)
        self.handover.take(self.daemon.verdict(self.seq, outcome))
        self.seq += 1

    @rule(seq=st.integers(0, 50), outcome=st.sampled_from(["PASS", "REJECT"]))
    @precondition(lambda self: self.seq > 0 and not self.daemon.lease.needs_hello(self.daemon.now_ns))
    def repeat(self, seq, outcome):
        """Also one that says something else: the first verdict stands. It is valid for what is left, as on the wire."""
        left_ms = max(0, (self.issued[seq % self.seq][1] - self.daemon.now_ns) // MS)
        self.handover.take(self.daemon.verdict(seq % self.seq, outcome, validMs=left_ms))

    @rule(milliseconds=st.integers(1, 400))
    def wait(self, milliseconds):
        self.daemon.wait(milliseconds)

    @rule()
    def beat(self):
        self.daemon.beat()

    @rule(run=st.sampled_from(["run1", "run2"]))
    def restart(self, run):
        self.daemon.hello(run)

    @rule()
    @precondition(lambda self: self.last is not None)
    def acknowledge(self):
        self.handover.acknowledge(self.last.session, self.last.number)

    @rule(session=st.integers(0, 3), number=st.integers(0, 5))
    def acknowledge_wrongly(self, session, number):
        self.handover.acknowledge(self.handover.session + 1 + session, number)

    @invariant()
    def what_is_shown_is_true(self):
        if not hasattr(self, "handover"):
            return
        output = self.last = shown(self.handover, self.daemon)
        if output.number == 0:
            assert output.shown is Shown.NOTHING
            return
        assert self.of_number.setdefault(output.number, output.seq) == output.seq
        assert output.part_id == f"part-{output.seq}"
        outcome, expires_ns = self.issued[output.seq]
        if output.shown is Shown.PASS:
            assert outcome == "PASS"
            assert self.daemon.now_ns < expires_ns
            assert self.daemon.lease.is_fresh(self.daemon.now_ns)
            assert output.is_ready
            assert output.number not in self.rejected
        else:
            self.rejected.add(output.number)


TestHanding = Handing.TestCase


# The PLC's own program, as docs/plc.md asks for it


def test_the_program_passes_nothing_at_the_first_sight_of_a_session():
    """Registers may be of a bridge that is long gone."""
    decided = []
    program = plcs.Program(lambda view, passed: decided.append(passed))
    view = plcs.View(session=9, alive=4, ready=True, number=3, outcome=1, parts=1, seq=1, tag="a")
    assert program.scan(view, 100.0) is None
    assert program.scan(view, 100.1) is None
    assert decided == []


def test_the_program_stops_when_alive_stands_still():
    decided = []
    program = plcs.Program(lambda view, passed: decided.append((view.seq, passed)))
    for alive, now_s, number in ((1, 0.0, 1), (2, 0.1, 1), (2, 0.3, 2), (2, 0.5, 3)):
        view = plcs.View(session=9, alive=alive, ready=True, number=number, outcome=1, parts=1, seq=number, tag="a")
        program.scan(view, now_s)
    assert decided == [(1, True), (2, True)]


# On the wire


class Live(Daemon):
    """The same on the real clock: what the sides below are given as the lease."""

    def __init__(self):
        super().__init__(lease_ms=120_000)
        self.now_ns = time.monotonic_ns()
        self.hello()


async def until(condition, what):
    end_s = time.monotonic() + 60  # an OPC UA server makes its address space for seconds
    while not condition():
        assert time.monotonic() < end_s, f"{what} did not come"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def running(*work):
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        yield
        for task in tasks:
            assert not task.done() or task.exception() is None, task
    finally:
        await plc_command.end_all(tasks)


def serve_parts(side_of, plc_of, parts=20):
    """Verdicts into a handover, over the wire into the PLC's program; what the PLC decided, in order."""
    daemon, handover, decided = Live(), Handover(["cam1"]), []
    program = plcs.Program(lambda view, passed: decided.append((view.seq, view.tag, passed)))

    async def work():
        async with running(side_of(handover).run(daemon.lease), plc_of(program)):
            for seq in range(parts):
                daemon.now_ns = time.monotonic_ns()
                daemon.beat()
                # The first is a REJECT: it waits for the other side to be there.
                handover.take(daemon.verdict(seq, "PASS" if seq % 3 else "REJECT", validMs=60_000))
                await until(lambda: len(decided) > seq, f"result {seq}")  # noqa: B023 - awaited within the round

    asyncio.run(work())
    assert decided == [(seq, f"part-{seq}", seq % 3 != 0) for seq in range(parts)]


def test_modbus_into_a_plc():
    at = f"127.0.0.1:{free_port()}"
    place = Place("127.0.0.1", int(at.rpartition(":")[2]))
    serve_parts(
        lambda handover: ModbusClient(place, handover, ["cam1"], 0.01), lambda program: plcs.modbus_server(at, program)
    )


def test_modbus_read_by_a_plc():
    at = f"127.0.0.1:{free_port()}"
    place = Place("127.0.0.1", int(at.rpartition(":")[2]))
    serve_parts(
        lambda handover: ModbusServer(place, handover, ["cam1"]), lambda program: plcs.modbus_client(at, program)
    )


def test_opc_ua_without_encryption():
    from adapters.plc_opcua import Endpoint, OpcUaServer

    endpoint = Endpoint("127.0.0.1", free_port(), None)
    serve_parts(
        lambda handover: OpcUaServer(endpoint, handover, 0.01),
        lambda program: plcs.opcua_client(endpoint.url, program),
        parts=10,
    )


def test_modbus_server_lets_nothing_be_written_but_the_acknowledgement():
    from pymodbus.client import AsyncModbusTcpClient

    port = free_port()
    daemon, handover = Live(), Handover()
    handover.take(daemon.verdict(1, validMs=60_000))

    async def work():
        server = ModbusServer(Place("127.0.0.1", port, base=10), handover, ["cam1"])
        async with running(server.run(daemon.lease)):
            client = AsyncModbusTcpClient("127.0.0.1", port=port, timeout=2)
            end_s = time.monotonic() + 10
            while not await client.connect():
                assert time.monotonic() < end_s
            for address, values in ((10, [1]), (13, [7, 1]), (49, [1, 1]), (51, [1, 1]), (52, [1])):
                assert (await client.write_registers(address, values)).isError(), address
            view = plcs.from_registers((await client.read_holding_registers(10, count=30)).registers)
            assert (view.seq, view.outcome) == (1, 1)
            # One register at a time, as PLCs without FC16 do.
            assert not (await client.write_register(50, view.session)).isError()
            assert not (await client.write_register(51, view.number)).isError()
            after = plcs.from_registers((await client.read_holding_registers(10, count=30)).registers)
            assert after.number == 0
            client.close()

    asyncio.run(work())


def test_a_plc_that_goes_and_comes_back_gets_the_result_again():
    """Killed in the middle of the line: its registers are zero afterwards, and all is written anew."""
    at = f"127.0.0.1:{free_port()}"
    place = Place("127.0.0.1", int(at.rpartition(":")[2]))
    daemon, handover, decided = Live(), Handover(), []
    side = ModbusClient(place, handover, ["cam1"], 0.01)

    async def work():
        async with running(side.run(daemon.lease)):
            handover.take(daemon.verdict(0, "REJECT"))
            for life in range(3):
                program = plcs.Program(lambda view, passed: decided.append((view.seq, passed)))
                if life == 1:
                    program.scan = lambda view, now_s: None  # it never acknowledges
                async with running(plcs.modbus_server(at, program)):
                    await until(lambda: side.is_connected, "the connection")
                    if life != 1:
                        await until(lambda: decided, "the result")
                    await until(lambda: life == 1 or handover._current is None, "the acknowledgement")  # noqa: B023
                await until(lambda: not side.is_connected, "the loss")
                decided.clear()
                handover.take(daemon.verdict(life + 1, "REJECT"))

    asyncio.run(work())


def test_a_plc_with_too_few_registers_is_told(caplog):
    from pymodbus.server import ModbusTcpServer
    from pymodbus.simulator import DataType, SimData, SimDevice

    port = free_port()

    async def work():
        server = ModbusTcpServer(
            [SimDevice(1, [SimData(0, count=20, values=0, datatype=DataType.REGISTERS)])], address=("127.0.0.1", port)
        )
        await server.serve_forever(background=True)
        side = ModbusClient(Place("127.0.0.1", port), Handover(), ["cam1"], 0.01)
        async with running(side.run(Live().lease)):
            await until(lambda: "wanted 30 holding registers" in caplog.text, "the message")
        await server.shutdown()

    asyncio.run(work())


def test_a_taken_port_is_told():
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = Place("127.0.0.1", other.getsockname()[1])
        with pytest.raises(UsageError, match="cannot listen at 127"):
            asyncio.run(ModbusServer(place, Handover(), ["cam1"]).run(Live().lease))


# OPC UA: who may


async def client_certificate(folder, name):
    from asyncua.crypto.cert_gen import setup_self_signed_certificate
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key, certificate = folder / f"{name}.pem", folder / f"{name}.der"
    await setup_self_signed_certificate(
        key, certificate, f"urn:test:{name}", "localhost", [ExtendedKeyUsageOID.CLIENT_AUTH], {}
    )
    return key, certificate


async def secured(url, folder, name):
    from asyncua import Client
    from asyncua.crypto.security_policies import SecurityPolicyBasic256Sha256

    key, certificate = await client_certificate(folder, name)
    client = Client(url, timeout=5)
    client.application_uri = f"urn:test:{name}"
    await client.set_security(SecurityPolicyBasic256Sha256, str(certificate), str(key))
    return client, certificate


def test_opc_ua_lets_in_whom_it_trusts_and_keeps_the_certificate_of_whom_it_does_not(tmp_path):
    from asyncua import Client, ua

    from adapters.plc_opcua import Endpoint, OpcUaServer, field_names

    keys = tmp_path / "opcua"
    endpoint = Endpoint("127.0.0.1", free_port(), keys)
    daemon, handover = Live(), Handover()
    handover.take(daemon.verdict(5, validMs=120_000))
    side = OpcUaServer(endpoint, handover, 0.01)

    async def work():
        async with running(side.run(daemon.lease)):
            await until(lambda: side._told.get("number"), "the server")
            client, certificate = await secured(endpoint.url, tmp_path, "plc")
            with pytest.raises(ua.UaStatusCodeError):
                async with client:
                    pass
            rejected = list((keys / "rejected").iterdir())
            assert [path.read_bytes() for path in rejected] == [certificate.read_bytes()]
            rejected[0].rename(keys / "trusted" / "plc.der")
            client, _ = await secured(endpoint.url, tmp_path, "plc")
            async with client:
                index = await client.get_namespace_index("urn:inspectd:plc")
                values = {name: await client.get_node(f"ns={index};s={name}").read_value() for name in field_names()}
                assert (values["partId"], values["outcome"], values["resultState"]) == ("part-5", 1, 1)
                assert values["resultId"] == "cam1/e/5"
                with pytest.raises(ua.UaStatusCodeError):
                    await client.get_node(f"ns={index};s=outcome").write_value(1, ua.VariantType.Byte)
                place = client.get_node(f"ns={index};s=inspection")
                assert not await plcs.acknowledge(place, index, values["session"], values["number"] + 1)
                assert await plcs.acknowledge(place, index, values["session"], values["number"])
            with pytest.raises((ua.UaError, TimeoutError, asyncio.TimeoutError)):  # there is no open endpoint
                async with Client(endpoint.url, timeout=5):
                    pass

    asyncio.run(work())
    assert (keys / "server.pem").stat().st_mode & 0o077 == 0


def test_a_file_that_is_no_certificate_trusts_nobody(tmp_path, caplog):
    from adapters.plc_opcua import load_certificates

    (tmp_path / "plc.der").write_bytes(b"nothing of the kind")
    assert load_certificates(tmp_path) == set()
    assert "no certificate in" in caplog.text
    assert load_certificates(tmp_path / "absent") == set()


# The command


def test_a_task_that_loses_a_cancellation_is_ended_all_the_same():
    lost = []

    async def stubborn():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            lost.append(True)
        await asyncio.sleep(60)

    async def work():
        task = asyncio.ensure_future(stubborn())
        await asyncio.sleep(0)
        await plc_command.end_all([task])
        assert task.cancelled()

    asyncio.run(work())
    assert lost


@pytest.mark.parametrize(("arguments", "told"), [
    (["modbus"], "neither of --plc and --serve"),
    (["modbus", "--plc", "h:1", "--serve", "h:2"], "both of --plc and --serve"),
    (["modbus", "--plc", "h:502"], "--line, --permits, --camera"),
    (["modbus", "--plc", "h:502", "--line", "l", "--permits", "tcp://127.0.0.1:1", "--camera", "c"], "--role bridge"),
    (["modbus", "--plc", "host", "--line", "l", "--permits", "ipc://x", "--camera", "c"], "wanted HOST:PORT"),
    (["opcua", "--serve", "h:99999", "--line", "l", "--permits", "ipc://x", "--camera", "c"], "wanted HOST:PORT"),
])  # fmt: skip
def test_what_is_lacking_is_told(arguments, told):
    result = click.testing.CliRunner().invoke(plc_command.command, arguments)
    assert isinstance(result.exception, UsageError)
    assert told in str(result.exception)
