"""The parsers as functions of bytes. Only what a parser documents may leave it; anything else is a crash.

A target gives True where it took the input, so that the tests can see that its seeds go all the way through.
tests/test_fuzz.py runs them by hypothesis, `python -m tests.fuzz` by atheris. Seeds are made by the real encoders
at each start: there is no corpus that could grow old.
"""

from __future__ import annotations

import atexit
import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from daemon.bundle import _is_plain, _parse_manifest
from daemon.config import parse_config
from daemon.errors import BundleError, ConfigError, FrameError, WireError
from daemon.hub import HubPart, split_envelope
from daemon.inspection.decode import decode, encoded_size, lossless, to_plain
from daemon.keys import Peer, _load
from daemon.line import shm
from daemon.line.control import COMMANDS, decode_request
from daemon.line.parts import Entry, PartBook
from daemon.line.permit import Lease, PermitDesk
from daemon.line.wire import (
    ENCODINGS,
    PIXEL_FORMATS,
    decode_frame,
    decode_header,
    encode_answer,
    encode_frame,
    encode_header,
)
from daemon.record.journal import decode_record, encode_record, last_run, read_records
from daemon.records import accept_record, missing_record, replay, snapshot, verdict_record
from daemon.types import Outcome, PartKey, RawFrame, Reason, Verdict

ROOT = Path(__file__).resolve().parents[2]
CUT = b"\0|\0"  # between the parts of a message, and between messages
MOST_PIXELS = 1 << 18  # an image target that inflates megapixels finds nothing more, only slower
BYTES = {"Mono8": 1, "Mono16": 2, "RGB8": 3, "BGR8": 3, "BayerRG8": 1}
IMAGE = {"capturedNs": 1, "encoding": "raw", "shape": [2, 3], "pixelFormat": "Mono8"}


@dataclass(frozen=True)
class Target:
    """`expected` are the documented errors; `words` help a fuzzer to guess what a mutation rarely makes."""

    name: str
    run: Callable[[bytes], bool]
    expected: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    words: tuple[str, ...] = ()
    most_bytes: int = 1024

    def __call__(self, data: bytes) -> bool:
        """Whether the input was taken. What leaves is a crash."""
        try:
            return self.run(data)
        except self.expected as error:
            refusal = str(error)
        assert refusal, "a refusal says why"
        return False


MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
PLACE = [MEMORY]  # where `scratch` makes its folder


@cache
def scratch() -> Path:
    """A folder in memory, for parsers that read files; gone with the process (atheris ends without that: see PLACE)."""
    folder = Path(tempfile.mkdtemp(prefix="inspectd-fuzz-", dir=PLACE[0]))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# --- frames


def read_frame(data: bytes) -> bool:
    """A message as the loop reads it, its answer made of whatever it said."""
    parts = [memoryview(part) for part in data.split(CUT)]
    try:
        part = decode_frame(parts)
    except WireError as error:
        encode_answer("line", None, "BAD_HEADER", 0, str(error))
        raise
    decode_header(encode_answer(part.line, part.key, "FORBIDDEN", 0, f"frame/{part.line}/{part.camera}")[1])
    frame = part.frame()
    assert (frame.camera, frame.epoch, frame.seq) == (part.key.camera, part.key.epoch, part.key.seq)
    if frame.encoding == "raw":
        assert frame.payload.nbytes == frame.shape[0] * frame.shape[1] * BYTES[frame.pixel_format]
    return True


def frame_seeds() -> list[bytes]:
    frames = []
    for encoding in ENCODINGS:
        for pixel_format, size in BYTES.items():
            shape = (2, 3, 3) if size == 3 else (2, 3)
            payload = memoryview(bytes(range(6 * size)))
            frames.append(RawFrame("c", "e", 1, "p", 5, encoding, shape, pixel_format, "x", payload, is_simulated=True))
    return [CUT.join(bytes(part) for part in encode_frame("l", frame)) for frame in frames]


def read_header(data: bytes) -> bool:
    assert isinstance(decode_header(data), dict)
    return True


def header_seeds() -> list[bytes]:
    header = {"v": 1, "epoch": "e", "seq": 1, "partId": None, "x": [1.5, True, {"y": "\U0001f600\u2028"}]}
    return [encode_header(header), json.dumps(header, ensure_ascii=False, indent=1).encode(), b"{}"]


def read_hub(data: bytes) -> bool:
    """A message at an endpoint of stock imageZMQ senders."""
    envelope, parts = split_envelope([memoryview(part) for part in data.split(CUT)])
    assert envelope[-1] == b""
    frame = HubPart("line", PartKey("c", "e", 1), parts).frame()
    assert frame.payload.nbytes > 0
    if frame.encoding == "raw":
        assert frame.payload.nbytes == frame.shape[0] * frame.shape[1] * BYTES[frame.pixel_format]
    return True


def hub_seeds() -> list[bytes]:
    shapes = [("uint8", [2, 3], 1), ("uint8", [2, 3, 1], 1), ("uint8", [2, 3, 3], 3), ("uint16", [2, 3], 2)]
    raw = [({"msg": "rpi1", "dtype": d, "shape": s}, bytes(range(6 * size))) for d, s, size in shapes]
    jpeg = cv2.imencode(".jpg", np.arange(80, dtype=np.uint8).reshape(8, 10))[1].tobytes()
    messages = [*raw, ({"msg": "rpi1"}, jpeg)]
    return [CUT.join([b"", json.dumps(header).encode(), payload]) for header, payload in messages]


# --- images


def read_image(data: bytes) -> bool:
    """Two bytes choose encoding, pixel format, whether a PNG's checksums are put right, and a raw frame's width."""
    if len(data) < 3:
        return False
    choice = data[0] & 0x7F
    encoding, pixel_format = ENCODINGS[choice % 3], PIXEL_FORMATS[choice // 3 % 5]
    payload = checked_png(data[2:]) if data[0] & 0x80 else data[2:]
    channels = (3,) if pixel_format in ("RGB8", "BGR8") else ()
    if encoding == "raw":
        width = data[1] + 1
        height = len(payload) // (width * BYTES[pixel_format])
        if height == 0:
            return False
        payload, size = payload[: height * width * BYTES[pixel_format]], (height, width)
    else:
        size = encoded_size(payload) or (data[1] + 1, 1)
        if not 0 < size[0] * size[1] <= MOST_PIXELS:
            return False
    shape = (*size, *channels)
    raw = RawFrame("c", "e", 1, None, 1, encoding, shape, pixel_format, None, memoryview(payload))
    pixels = to_plain(decode(raw)).pixels
    assert pixels.shape[:2] == size
    assert pixels.shape[2:] in ((1,), (3,))
    assert pixels.dtype in (np.uint8, np.uint16)
    assert lossless(raw)[1]
    return True


def checked_png(payload: bytes) -> bytes:
    """The PNG with the right checksum on each chunk, so that what a mutation changed inside is looked at."""
    pieces, position = [payload[:8]], 8
    while position + 12 <= len(payload):
        length = struct.unpack_from(">I", payload, position)[0]
        body = payload[position + 4 : position + 8 + length]
        if len(body) < 4 + length:
            break
        pieces += [payload[position : position + 4], body, struct.pack(">I", zlib.crc32(body))]
        position += 12 + length
    return b"".join(pieces) + payload[position:]


def image_seeds() -> list[bytes]:
    gray = np.arange(80, dtype=np.uint8).reshape(8, 10)
    color = np.stack([gray, gray[::-1], gray[:, ::-1]], 2)
    deep = gray.astype(np.uint16) * 700
    jpeg = {
        "plain": [cv2.IMWRITE_JPEG_QUALITY, 80],
        "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
        "restarts": [cv2.IMWRITE_JPEG_RST_INTERVAL, 1],
    }
    pngs = [cv2.imencode(".png", pixels)[1].tobytes() for pixels in (gray, color, deep, np.dstack([color, gray]))]
    jpegs = [
        cv2.imencode(".jpg", pixels, options)[1].tobytes() for pixels in (gray, color) for options in jpeg.values()
    ]
    kinds = range(5)  # as PIXEL_FORMATS
    seeds = [bytes([0 + 3 * kind, 9]) + bytes(range(240)) for kind in kinds]
    seeds += [bytes([1 + 3 * kind, 0]) + jpeg for kind in kinds for jpeg in jpegs]
    return seeds + [bytes([check | 2 + 3 * kind, 0]) + png for kind in kinds for check in (0, 0x80) for png in pngs]


# --- what a person or a build wrote


def read_manifest(data: bytes) -> bool:
    manifest = _parse_manifest(Path("manifest.json"), data)
    assert all(_is_plain(name) for name in manifest.files)
    assert all(frame.file in manifest.files for frame in manifest.golden.frames)
    return True


def manifest_seeds() -> list[bytes]:
    side = {"size": [64, 64], "mean": [1.0, 2.0, 3.0], "std": [1.0, 1.0, 1.0]}
    product = {"limit": 1.0, "mapLimit": 1.0, "targetFalseReject": 0.1, "supportedFalseReject": 0.1, "n": 9}
    fields = {
        "format": 1, "kind": "fused", "name": "p", "version": "1", "created": "2025", "preprocessing": side,
        "branches": ["ldknn"], "grid": [8, 8], "k": 3, "alpha": 0.2, "distance": "squared-l2",
        "fusion": {"weights": {"ldknn": 1}, "standardisation": {"ldknn": {"centre": 0, "scale": 1}}, "smoothingSigma": 4},
        "scoreRule": "max", "products": {"p": {**product, "bound95": 0.2, "medianGood": 0.5}}, "metrics": {},
        "training": {}, "golden": {"frames": [{"file": "g/a", "product": "p", "score": 0, "outcome": "PASS"}],
        "tolerance": {"f32": 0.1}},
        "files": dict.fromkeys(["networks.onnx", "calibration.safetensors", "bank.safetensors", "g/a"], "0" * 64),
    }  # fmt: skip
    return [json.dumps(fields, separators=(",", ":")).encode()]


def read_config(data: bytes) -> bool:
    config = parse_config(data.decode("utf-8", "replace"), "config.yaml", Path("/etc/inspectd"))
    assert config.cameras
    assert config.ledger.dir.is_absolute()
    return True


def config_seeds() -> list[bytes]:
    least = """{version: 1, line: l, inputs: [{kind: router, bind: "tcp://*:5550"}], results: {bind: "ipc://r"},
permits: {bind: "ipc://p"}, control: {bind: "ipc://c"}, cameras: {c: {product: x, deadline_ms: 9, valid_ms: 9}}, %s}
"""
    more = (
        "queue_mb: 0x10", "metrics: {bind: '127.0.0.1:9464'}, security: {keys: k, insecure: true}",
        "backend: {kind: cpu, threads: 2, hang_ms: 5000}", "recorder: {keep_gb: 1.5}, ledger: {keep_days: 9}",
    )  # fmt: skip
    return [(least % text).encode() for text in more]


def read_keys(data: bytes) -> bool:
    """The public list of peers; what stands in the secret files is read by the same code."""
    path = scratch() / "peers.yaml"
    path.write_bytes(data)
    for peer in _load(path, list[Peer]):
        peer.may("camera", "frame/l/c")
    return True


def key_seeds() -> list[bytes]:
    peer = "- {name: %s, publicKey: '%s', roles: [camera, bridge], topics: ['frame/l/*', 'permit/[lx]']}\n"
    return [((peer % ("a", "c" * 40)) + (peer % ("b", "0123456789" * 4))).encode(), b"[]"]


# --- the line


def read_control(data: bytes) -> bool:
    assert decode_request(data.split(CUT)).command in COMMANDS
    return True


def control_seeds() -> list[bytes]:
    swaps = [{"command": "activate", "engine": "part/2", "shadow": 5}, {"command": "rollback", "engine": "part"}]
    plain = [{"command": command} for command in COMMANDS if command not in ("activate", "mark")]
    part = {"camera": "c", "epoch": "e", "seq": 1, "decidedNs": 2}
    said = {"user": "olga", "mark": "defect", "name": "scratch", "decision": "0" * 16, "parts": [part]}
    return [encode_header(request) for request in (*plain, *swaps, {"command": "mark", **said})]


def exchange_permits(data: bytes) -> bool:
    """Each message goes to a desk (its first byte says which bridge speaks) and to a lease, 10 ms after the one before.

    The lease knows the run r and the nonces n0 and n1; nothing may be believed when they have grown old.
    """
    desk, lease = PermitDesk("r", {"cameras": ["c"]}, 100), Lease(300)
    desk.receive(b"0", {"type": "HELLO", "nonce": "n0"}, 0)
    lease.hello("n0", 0)
    lease.ping("n1", 0)
    lease.receive({"type": "BIRTH", "run": "r"}, 0)
    now_ns, taken = 0, False
    for message in data.split(CUT):
        now_ns += 10_000_000
        header = decode_header(message[1:])
        outgoing = desk.receive(message[:1], header, now_ns) + desk.tick(now_ns)
        verdict = {"camera": "c", "epoch": "e", "seq": now_ns, "outcome": "PASS"}
        for _, said in [*outgoing, *desk.verdict(verdict, 50, now_ns)]:
            decode_header(encode_header(said))
        answer = lease.receive(header, now_ns)
        if answer is not None:
            taken = True
            desk.receive(b"0", decode_header(encode_header(answer)), now_ns)
            part = (answer["camera"], answer["epoch"], answer["seq"])
            lease.may_pass(*part, now_ns)
            assert not lease.may_pass(*part, now_ns + 301_000_000), "believed without a heartbeat"
    assert desk.unacked <= len(desk._bridges) * 1024
    return taken


def permit_seeds() -> list[bytes]:
    verdict = {"type": "VERDICT", "run": "r", "camera": "c", "epoch": "e", "seq": 1, "partId": None, "outcome": "PASS"}
    said = [
        {"type": "HELLO", "nonce": "n0"},
        {"type": "PING", "nonce": "n1"},
        {"type": "HEARTBEAT", "run": "r", "state": "RUNNING", "nonce": "n1"},
        {**verdict, "validMs": 500, "nonce": "n1"},
        {"type": "ACK", "run": "r", "epoch": "e", "seq": 10_000_000, "camera": "c"},
        {"type": "BIRTH", "run": "other"},
    ]
    return [CUT.join(b"0" + encode_header(header) for header in order) for order in (said, said[::-1], said[3:4])]


def read_ring(data: bytes) -> bool:
    """The head of a ring's file, one slot's header, two bytes for the file's size, and what lies in the slots."""
    head, slot, size, rest = data[: shm.HEAD.size], data[32:48], data[48:50], data[50:]
    name = scratch().name
    path = shm.ring_path(name, "c")
    pages = 1 + int.from_bytes(size, "little") % 16
    content = bytearray(shm.PAGE * pages)
    for offset, piece in ((0, head), (shm.PAGE, slot), (shm.PAGE + shm.SLOT_HEADER_BYTES, rest)):
        content[offset : offset + len(piece)] = piece
    path.write_bytes(content[: shm.PAGE * pages])
    rings = shm.Rings()
    try:
        taken = [rings.read(name, "c", epoch="e", seq=7, slot=0)]
        assert all(memory.nbytes < len(content) for memory in taken)
    finally:
        rings.close()
        path.unlink()
    return True


def ring_seeds() -> list[bytes]:
    rings = [(1, 4000, 9, 2), (2, 100, 100, 3), (3, 4096, 4096, 15)]
    return [
        shm.HEAD.pack(shm.MAGIC, slots, most) + shm.SLOT.pack(7, held) + struct.pack("<H", pages) + bytes(range(64))
        for slots, most, held, pages in rings
    ]


# --- what is kept


def read_journal(data: bytes) -> bool:
    """One segment. Where the first byte is odd, each line's checksum is put right: then its JSON is looked at."""
    lines = data[1:]
    if data[:1] and data[0] & 1:
        lines = b"\n".join(b"%08x %s" % (zlib.crc32(line[9:]), line[9:]) for line in lines.split(b"\n"))
    folder = scratch() / "journal"
    folder.mkdir(exist_ok=True)
    path = folder / "journal-00000000000000000001.log"
    path.write_bytes(lines)
    records = [record for _, record in read_records(path)]
    assert len(records) <= lines.count(b"\n")
    assert all(decode_record(encode_record(record)[:-1]) is not None for record in records if is_plain_json(record))
    known = last_run(folder)
    assert not known or known[0].get("t") == "run"
    return any(record is not None for record in records)


def is_plain_json(record: object) -> bool:
    """Python's JSON also reads infinities, which no record of ours holds."""
    try:
        json.dumps(record, allow_nan=False)
    except ValueError:
        return False
    return record is not None


@cache
def genuine_journal() -> tuple[bytes, ...]:
    """What a daemon wrote about five parts: a gap, its whole state once more, a part without a verdict."""
    book, lines = PartBook(), []
    lines.append(encode_record(snapshot(book, "r")))
    for seq in (0, 1, 4, 5, 6):
        entry = Entry(PartKey("c", "e", seq), f"p{seq}", 1, 2)
        admission = book.admit(entry.key, "")
        missing = [missing_record(piece, 1) for piece in admission.gap.pieces()] if admission.gap else []
        book.open(entry)
        lines += [encode_record(record) for record in (*missing, accept_record(entry, 1))]
        if seq != 6:
            book.settle(entry.key)
            lines.append(encode_record(verdict_record(entry, Verdict(Outcome.REJECT, Reason.LATE), 2)))
        if seq == 4:
            lines.append(encode_record(snapshot(book, "r")))
    return tuple(lines)


def damage_books(data: bytes) -> bool:
    """A genuine journal, damaged in steps of three bytes (what to do, where in the line, which line), is replayed."""
    lines = list(genuine_journal())
    for step in range(0, len(data) - 2, 3):
        kind, place, number = data[step] % 6, data[step + 1], data[step + 2] % len(lines)
        line = lines[number]
        if kind == 0:  # a line is lost (the last one stays, so that there is always one)
            lines[number : number + 1] = [] if len(lines) > 1 else [line]
        elif kind == 1:  # a byte is changed
            at = place % max(len(line), 1)
            lines[number] = line[:at] + bytes([data[step]]) + line[at + 1 :]
        elif kind == 2:  # torn
            lines[number] = line[: place % (len(line) + 1)]
        elif kind == 3:  # written twice
            lines.insert(number, line)
        elif kind == 4:  # moved
            lines.insert(place % len(lines), lines.pop(number))
        else:  # ends its half and goes on
            lines[number] = line[: place % (len(line) + 1)] + b"\n" + line
    folder = scratch() / "books"
    folder.mkdir(exist_ok=True)
    (folder / "journal-00000000000000000001.log").write_bytes(b"".join(lines))
    book = replay(last_run(folder))
    assert {key.seq for key in book.in_flight} <= {0, 1, 4, 5, 6}, "a part that never was"
    return bool(book.streams)


def book_seeds() -> list[bytes]:
    return [bytes([1, 12, 1]), bytes([0, 0, 11]), bytes([2, 30, 11, 4, 2, 3]), bytes(range(30))]


_FRAME_WORDS = ("frame/", "epoch", "seq", "partId", "capturedNs", "encoding", "shape", "pixelFormat", "product", "slot")
_YAML_WORDS = (
    "!!int ",
    "!!float ",
    "!!bool ",
    "!!binary ",
    "!!timestamp ",
    "!!merge ",
    "<<: ",
    "&a ",
    "*a",
    "? ",
    "|",
    ">",
)
_LINE_WORDS = ("HELLO", "PING", "ACK", "BIRTH", "VERDICT", "HEARTBEAT", "validMs", "nonce", "RUNNING", "PAUSED", "run")
_JSON_WORDS = ("null", "true", "1e999", "-0.0", '"\\ud800"', "9007199254740993", "[[[[[[[[", "{}")

TARGETS = {
    target.name: target
    for target in (
        Target("frame", read_frame, (WireError, FrameError), frame_seeds, _FRAME_WORDS + _JSON_WORDS),
        Target("hub", read_hub, (FrameError,), hub_seeds, ("msg", "dtype", "shape", "uint8", "uint16", *_JSON_WORDS)),
        Target("header", read_header, (WireError,), header_seeds, _JSON_WORDS),
        Target(
            "image", read_image, (FrameError,), image_seeds, ("IHDR", "IDAT", "acTL", "fcTL", "tRNS", "PLTE", "Exif")
        ),
        Target("manifest", read_manifest, (BundleError,), manifest_seeds, _JSON_WORDS, 2048),
        Target("config", read_config, (ConfigError,), config_seeds, _YAML_WORDS),
        Target("keys", read_keys, (ConfigError,), key_seeds, _YAML_WORDS, 512),
        Target(
            "control",
            read_control,
            (WireError,),
            control_seeds,
            ("command", "engine", "shadow", *COMMANDS, *_JSON_WORDS),
            256,
        ),
        Target("permit", exchange_permits, (WireError,), permit_seeds, _LINE_WORDS + _JSON_WORDS),
        Target("ring", read_ring, (FrameError,), ring_seeds, ("inspectd-shm-1",), 256),
        Target(
            "journal", read_journal, (), lambda: [b"\1" + b"".join(genuine_journal())], ("pending", "streams"), 4096
        ),
        Target("books", damage_books, (), book_seeds, (), 90),
    )
}
