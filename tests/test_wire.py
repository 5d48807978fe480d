"""Wire protocol version 1: round trips, and that no bytes whatever end in anything but a frame or a known error."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.errors import FrameError, WireError
from daemon.line import wire
from daemon.types import EngineId, Outcome, PartKey, RawFrame, Reason, Refusal, Region, Timings, Verdict

TOPIC = b"frame/solar/cam1"
BYTES = {"Mono8": 1, "Mono16": 2, "RGB8": 3, "BGR8": 3, "BayerRG8": 1}
GOOD: dict[str, Any] = {
    "v": 1,
    "epoch": "e1",
    "seq": 7,
    "partId": "part-7",
    "capturedNs": 1_700_000_000_000_000_000,
    "encoding": "raw",
    "shape": [2, 3],
    "pixelFormat": "Mono8",
}


def message(payload: bytes = b"abcdef", *more: bytes, **header: Any) -> list[memoryview]:
    """A good message, with keys of its header replaced."""
    return parts(TOPIC, json.dumps({**GOOD, **header}).encode(), payload, *more)


def parts(*chunks: bytes) -> list[memoryview]:
    return [memoryview(chunk) for chunk in chunks]


def read(chunks: Sequence[memoryview]) -> RawFrame | None:
    """What a message is read as; None where it is refused in one of the two ways there are."""
    try:
        part = wire.decode_frame(chunks)
    except WireError:
        return None
    assert part.key.camera == part.camera
    assert 0 <= part.key.seq <= wire.MAX_SEQ
    assert 1 <= len(part.key.epoch) <= 128
    try:
        frame = part.frame()
    except FrameError:
        return None
    assert (frame.camera, frame.epoch, frame.seq) == (part.key.camera, part.key.epoch, part.key.seq)
    assert frame.payload.nbytes > 0
    assert math.prod(frame.shape) <= 3 * wire.MAX_PIXELS
    if frame.encoding == "raw":
        assert frame.payload.nbytes == frame.shape[0] * frame.shape[1] * BYTES[frame.pixel_format]
    return frame


def shapes(pixel_format: str) -> list[tuple[int, ...]]:
    return [(4, 5, 3)] if pixel_format in ("RGB8", "BGR8") else [(4, 5), (4, 5, 1)]


def every_kind() -> Iterator[RawFrame]:
    for encoding in wire.ENCODINGS:
        for pixel_format in wire.PIXEL_FORMATS:
            for shape in shapes(pixel_format):
                length = 20 * BYTES[pixel_format] if encoding == "raw" else 11
                payload = memoryview(bytes(range(length)))
                yield RawFrame(
                    "cam1", "e", 3, "p", 5, encoding, shape, pixel_format, "panel", payload, is_simulated=True
                )


# --- round trips


@pytest.mark.parametrize(
    "frame", list(every_kind()), ids=lambda frame: f"{frame.encoding}-{frame.pixel_format}-{frame.shape}"
)
def test_frame_of_every_kind_survives_the_wire(frame: RawFrame) -> None:
    for sent in (frame, replace(frame, part_id=None, product=None, is_simulated=False)):
        chunks = parts(*wire.encode_frame("solar", sent))
        part = wire.decode_frame(chunks)
        assert (part.line, part.camera, part.frame().product) == ("solar", "cam1", sent.product)
        assert part.payload_bytes == len(sent.payload)
        assert part.frame() == sent


def test_payload_is_handed_on_without_a_copy() -> None:
    payload = bytearray(b"abcdef")
    frame = wire.decode_frame([*message()[:2], memoryview(payload)]).frame()
    payload[0] = ord("z")
    assert bytes(frame.payload) == b"zbcdef"


PRINTABLE = st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])


@given(
    epoch=st.text(PRINTABLE, min_size=1, max_size=128),
    part_id=st.none() | st.text(PRINTABLE, min_size=1, max_size=128),
    seq=st.integers(0, wire.MAX_SEQ),
    captured_ns=st.integers(0, wire.MAX_SEQ),
    camera=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1, max_size=40),
)
def test_names_and_numbers_survive_the_wire(
    epoch: str, part_id: str | None, seq: int, captured_ns: int, camera: str
) -> None:
    sent = RawFrame(camera, epoch, seq, part_id, captured_ns, "raw", (1, 2), "Mono8", None, memoryview(b"ab"))
    assert wire.decode_frame(parts(*wire.encode_frame("solar", sent))).frame() == sent


# --- damaged messages


def test_message_cut_anywhere_is_read_or_refused() -> None:
    whole = message()
    for index, chunk in enumerate(whole):
        for length in range(len(chunk)):
            cut = [*whole[:index], chunk[:length], *whole[index + 1 :]]
            frame = read(cut)
            assert frame is None or index == 0, "only a shorter camera name is still a frame"
    for count in range(len(whole)):
        assert read(whole[:count]) is None


def test_message_extended_by_any_byte_is_read_or_refused() -> None:
    whole = message()
    for index, chunk in enumerate(whole):
        for byte in range(256):
            longer = memoryview(bytes(chunk) + bytes([byte]))
            frame = read([*whole[:index], longer, *whole[index + 1 :]])
            assert index < 2 or frame is None, "a raw payload of another length is refused"


def test_message_with_any_byte_changed_is_read_or_refused() -> None:
    whole = message()
    header = bytes(whole[1])
    refused = 0
    for index, chunk in enumerate(whole):
        for position in range(len(chunk)):
            for byte in (
                0x00,
                0x09,
                0x20,
                0x22,
                0x2D,
                0x2F,
                0x39,
                0x5C,
                0x5D,
                0x7D,
                0xC3,
                0xED,
                0xFF,
                chunk[position] ^ 1,
            ):
                damaged = bytearray(chunk)
                damaged[position] = byte
                refused += read([*whole[:index], memoryview(damaged), *whole[index + 1 :]]) is None
    assert refused > len(header)


@settings(max_examples=300, deadline=None)
@given(chunks=st.lists(st.binary(max_size=200), max_size=5))
def test_any_bytes_are_refused(chunks: list[bytes]) -> None:
    assert read(parts(*chunks)) is None


@settings(max_examples=300, deadline=None)
@given(topic=st.just(TOPIC) | st.binary(max_size=300), header=st.binary(max_size=300), payload=st.binary(max_size=9))
def test_any_bytes_as_a_header_are_refused(topic: bytes, header: bytes, payload: bytes) -> None:
    assert read(parts(topic, header, payload)) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
LIKELY = st.sampled_from(
    [1, 0, -1, 2**63, 2**63 - 1, 1.0, True, "raw", "png", "Mono8", "RGB8", [1, 6], [2, 3], [2, 3, 1], [2, 3, 3]]
)


@settings(max_examples=500, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from([*GOOD, "product", "isSimulated", "else"]), JSON | LIKELY, max_size=4),
    dropped=st.sets(st.sampled_from(list(GOOD)), max_size=2),
    payload=st.binary(max_size=20),
)
def test_any_json_in_the_header_is_read_or_refused(changes: dict[str, Any], dropped: set[str], payload: bytes) -> None:
    header = {key: value for key, value in {**GOOD, **changes}.items() if key not in dropped}
    frame = read(parts(TOPIC, json.dumps(header).encode(), payload))
    if frame is not None:
        assert dropped <= {"partId"}
        assert list(frame.shape) == header["shape"]


# --- headers in which no part is known


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"1",
        b'"text"',
        b"{'v': 1}",
        b'{"v": 1,}',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"v": 1} {"v": 1}',
        b'{"v": 1, "x": NaN}',
        b'{"v": 1, "x": Infinity}',
        b'{"v": 1, "x": -Infinity}',
        b'{"v": ' + b"1" * 5000 + b"}",
        b"[" * 60_000,
        b'{"v":' * 10_000,
        b'{"v":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    ],
    ids=lambda header: repr(header[:24]),
)
def test_header_that_is_not_a_json_object_is_refused(header: bytes) -> None:
    with pytest.raises(WireError, match="the header"):
        wire.decode_frame(parts(TOPIC, header, b"abcdef"))


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_number_that_json_does_not_have_is_refused_in_an_otherwise_good_header(constant: str) -> None:
    header = json.dumps({**GOOD, "extra": "?"}).replace('"?"', constant).encode()
    with pytest.raises(WireError, match=constant):
        wire.decode_frame(parts(TOPIC, header, b"abcdef"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("seq", value) for value in (True, False, 1.0, "1", -1, 2**63, 10**30, None, [1], {})],
        *[("v", value) for value in (2, 0, -1, "1", None, [1], 1.5)],
        *[("epoch", value) for value in ("", "x" * 129, 1, None, ["e"], "\ud800")],
        *[("partId", value) for value in ("", "x" * 129, 1, False, ["p"], "\ud800")],
    ],
)
def test_header_whose_part_cannot_be_known_is_refused_with_the_key_named(key: str, value: object) -> None:
    with pytest.raises(WireError, match=f"header key {key}"):
        wire.decode_frame(message(**{key: value}))


@pytest.mark.parametrize("version", [True, 1.0])
def test_version_that_is_no_integer_is_refused(version: object) -> None:
    with pytest.raises(WireError, match="header key v"):
        wire.decode_frame(message(v=version))


@pytest.mark.parametrize("key", ["v", "epoch", "seq"])
def test_header_without_a_key_that_names_the_part_is_refused(key: str) -> None:
    header = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(WireError, match=f"header key {key}"):
        wire.decode_frame(parts(TOPIC, json.dumps(header).encode(), b"abcdef"))


def test_part_id_may_be_null_or_absent() -> None:
    header = {name: value for name, value in GOOD.items() if name != "partId"}
    assert wire.decode_frame(message(partId=None)).part_id is None
    assert wire.decode_frame(parts(TOPIC, json.dumps(header).encode(), b"abcdef")).part_id is None


def test_header_of_64_kib_is_read_and_one_byte_more_is_refused() -> None:
    header = json.dumps(GOOD).encode()
    full = header.ljust(wire.MAX_HEADER_BYTES)
    assert wire.decode_frame(parts(TOPIC, full, b"abcdef")).frame().seq == 7
    with pytest.raises(WireError, match="65537 bytes, at most 65536"):
        wire.decode_frame(parts(TOPIC, full + b" ", b"abcdef"))


@pytest.mark.parametrize(
    "topic",
    [
        b"",
        b"frame",
        b"frame/solar",
        b"frame//cam1",
        b"frame/solar/",
        b"frame/solar/cam1/more",
        b"result/solar/cam1",
        b"frames/solar/cam1",
        b"Frame/solar/cam1",
        b"frame/solar/\xff",
        b"frame/solar/" + b"c" * 245,
    ],
)
def test_topic_that_names_no_camera_is_refused(topic: bytes) -> None:
    with pytest.raises(WireError, match="topic"):
        wire.decode_frame(parts(topic, json.dumps(GOOD).encode(), b"abcdef"))


@pytest.mark.parametrize("count", [0, 1])
def test_message_without_a_header_is_refused(count: int) -> None:
    with pytest.raises(WireError, match=f"found {count} message part"):
        wire.decode_frame(message()[:count])


def test_key_that_stands_twice_counts_once() -> None:
    header = json.dumps(GOOD).replace('"seq": 7', '"seq": 6, "seq": 7').encode()
    frame = read(parts(TOPIC, header, b"abcdef"))
    assert frame is None or frame.seq == 7


def test_unknown_keys_are_ignored() -> None:
    plain = wire.decode_frame(message()).frame()
    assert wire.decode_frame(message(exposureUs=120, nested={"a": [1, None]}, V=2)).frame() == plain


# --- known parts with a payload that cannot be


@pytest.mark.parametrize(
    ("header", "payload", "told"),
    [
        ({"shape": [0, 3]}, b"abcdef", "shape.0"),
        ({"shape": [2, -3]}, b"abcdef", "shape.1"),
        ({"shape": []}, b"abcdef", "shape"),
        ({"shape": [6]}, b"abcdef", "shape"),
        ({"shape": [1, 2, 3, 1]}, b"abcdef", "shape"),
        ({"shape": "2x3"}, b"abcdef", "shape"),
        ({"shape": [2.0, 3]}, b"abcdef", "shape.0"),
        ({"shape": [True, 6]}, b"abcdef", "shape.0"),
        ({"shape": None}, b"abcdef", "shape"),
        ({"shape": [2, 3, 3]}, b"abcdef", "channel"),
        ({"shape": [2, 3, 4], "pixelFormat": "RGB8"}, b"a" * 24, "channel"),
        ({"shape": [2, 1], "pixelFormat": "RGB8"}, b"abcdef", "channel"),
        ({"shape": [2, 3, 3], "pixelFormat": "BayerRG8"}, b"a" * 18, "channel"),
        ({"shape": [40_000, 25_000]}, b"abcdef", "1000000000 pixels"),
        ({"shape": [40_000, 25_000], "encoding": "png"}, b"abcdef", "1000000000 pixels"),
        ({"shape": [10**15, 10**15]}, b"abcdef", "shape"),
        ({"shape": [10**30, 1], "encoding": "jpeg"}, b"abcdef", "shape"),
        ({"shape": [10**2200, 10**2200]}, b"abcdef", "shape"),
        ({"shape": [2, 3]}, b"abcde", "5 bytes"),
        ({"shape": [2, 3]}, b"abcdefg", "7 bytes"),
        ({"shape": [2, 3], "pixelFormat": "Mono16"}, b"abcdef", "has 12"),
        ({"encoding": "png"}, b"", "empty"),
        ({}, b"", "empty"),
        ({"encoding": "tiff"}, b"abcdef", "encoding"),
        ({"encoding": None}, b"abcdef", "encoding"),
        ({"encoding": "RAW"}, b"abcdef", "encoding"),
        ({"pixelFormat": "Mono12"}, b"abcdef", "pixelFormat"),
        ({"pixelFormat": 8}, b"abcdef", "pixelFormat"),
        ({"capturedNs": -1}, b"abcdef", "capturedNs"),
        ({"capturedNs": 1.5}, b"abcdef", "capturedNs"),
        ({"capturedNs": "now"}, b"abcdef", "capturedNs"),
        ({"capturedNs": 2**63}, b"abcdef", "capturedNs"),
        ({"product": ""}, b"abcdef", "product"),
        ({"product": 5}, b"abcdef", "product"),
        ({"product": "\ud800"}, b"abcdef", "product"),
        ({"isSimulated": 1}, b"abcdef", "isSimulated"),
    ],
)
def test_known_part_with_a_bad_description_keeps_its_key_and_fails_as_a_frame(
    header: dict[str, Any], payload: bytes, told: str
) -> None:
    part = wire.decode_frame(message(payload, **header))
    assert part.key == PartKey("cam1", "e1", 7)
    assert part.part_id == "part-7"
    with pytest.raises(FrameError, match=told):
        part.frame()


@pytest.mark.parametrize("payloads", [[], [b"abcdef", b"abcdef"], [b"abc", b"def"]])
def test_known_part_with_no_or_two_payloads_fails_as_a_frame(payloads: list[bytes]) -> None:
    part = wire.decode_frame([*message()[:2], *parts(*payloads)])
    assert part.key == PartKey("cam1", "e1", 7)
    assert part.payload_bytes == sum(map(len, payloads))
    with pytest.raises(FrameError, match=f"found {len(payloads)} payload"):
        part.frame()


@pytest.mark.parametrize("text", ["\ud800", "a\nb", "\x1b[31m", "\u2028", ""])
def test_names_that_could_not_stand_in_one_line_of_a_log_are_refused(text: str) -> None:
    with pytest.raises(FrameError, match="product"):
        wire.decode_frame(message(product=text)).frame()
    for key in ("epoch", "partId"):
        with pytest.raises(WireError, match=key):
            wire.decode_frame(message(**{key: text}))


def test_header_that_claims_a_huge_frame_allocates_nothing() -> None:
    chunks = message(b"abcdef", shape=[11_585, 11_585])  # just below MAX_PIXELS: only the payload's size is wrong
    part = wire.decode_frame(chunks)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="134212225"):
            part.frame()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_largest_frame_is_taken_and_one_row_more_is_not() -> None:
    side = 1 << 13
    rows = wire.MAX_PIXELS // side
    assert wire.decode_frame(message(shape=[rows, side], encoding="png")).frame().shape == (rows, side)
    with pytest.raises(FrameError, match="pixels"):
        wire.decode_frame(message(shape=[rows + 1, side], encoding="png")).frame()


# --- what the daemon sends


@pytest.mark.parametrize("refusal", [None, *Refusal])
def test_answer_has_the_fields_of_the_protocol(refusal: Refusal | None) -> None:
    topic, data = wire.encode_answer("solar", PartKey("cam1", "e1", 7), refusal.value if refusal else None, 3)
    assert topic == b"answer/solar/cam1"
    assert strict_json(data) == {
        "v": 1,
        "epoch": "e1",
        "seq": 7,
        "status": "refused" if refusal else "accepted",
        "reason": refusal.value if refusal else None,
        "credit": 3,
    }


def test_answer_to_an_unknown_part_says_so_with_its_detail() -> None:
    _, data = wire.encode_answer("solar", None, "BAD_HEADER", 0, "the header is not JSON")
    header = strict_json(data)
    assert (header["epoch"], header["seq"], header["status"]) == (None, None, "refused")
    assert header["detail"] == "the header is not JSON"


ENGINE = EngineId("panel", "3", "ab" * 32)
DEFECT = Verdict(
    Outcome.REJECT,
    Reason.DEFECT,
    score=2.5,
    limit=2.0,
    p_value=0.01,
    regions=(Region(1, 2, 3, 4, 10, 2.5),),
    engine=ENGINE,
    timings=Timings(0.12345, 1.0, 2.0, 3.0, 4.0, 10.0),
    pictures={"mask": b"m", "frame": b"f"},
)
BOOK = {"run": "r", "epoch": "e1", "seq": 7, "partId": None, "capturedNs": 1, "decidedNs": 2, "isSimulated": False}


def strict_json(data: bytes) -> dict[str, Any]:
    """As a strict parser reads it: no NaN, no infinity, UTF-8."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    header: dict[str, Any] = json.loads(data.decode("utf-8"), parse_constant=refuse)
    return header


def test_result_has_the_fields_of_the_protocol_and_its_pictures_in_order() -> None:
    topic, data, *pictures = wire.encode_result("result/solar/cam1", BOOK, DEFECT)
    assert topic == b"result/solar/cam1"
    assert pictures == [b"m", b"f"]
    assert strict_json(data) == {
        **BOOK,
        "v": 1,
        "outcome": "REJECT",
        "reason": "DEFECT",
        "score": 2.5,
        "limit": 2.0,
        "pValue": 0.01,
        "regions": [{"x": 1, "y": 2, "w": 3, "h": 4, "area": 10, "peak": 2.5}],
        "engine": {"product": "panel", "version": "3", "digest": "ab" * 32},
        "timings": {
            "queueMs": 0.123, "decodeMs": 1.0, "preprocessMs": 2.0, "inferMs": 3.0, "postprocessMs": 4.0, "totalMs": 10.0,
        },
        "payloads": ["mask", "frame"],
    }  # fmt: skip


def test_result_of_a_part_that_never_arrived_has_every_key_and_no_numbers() -> None:
    _, data = wire.encode_result("result/solar/cam1", {**BOOK, "seqFrom": 8, "seqTo": 99}, wire.missing_verdict())
    header = strict_json(data)
    assert (header["outcome"], header["reason"]) == ("REJECT", "MISSING")
    assert [header[key] for key in ("score", "limit", "pValue", "engine")] == [None] * 4
    assert header["regions"] == []
    assert set(header["timings"].values()) == {None}


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_score_that_is_not_a_number_is_sent_as_null(score: float) -> None:
    _, data = wire.encode_result("result/solar/cam1", BOOK, Verdict(Outcome.REJECT, Reason.ENGINE_ERROR, score=score))
    assert strict_json(data)["score"] is None


def test_header_of_ours_that_json_cannot_hold_is_our_fault() -> None:
    with pytest.raises(ValueError, match="JSON"):
        wire.encode_header({"x": math.nan})


@given(
    score=st.none() | st.floats(),
    limit=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    reason=st.none() | st.sampled_from(Reason),
)
def test_every_result_is_valid_json(score: float | None, limit: float | None, reason: Reason | None) -> None:
    verdict = Verdict(Outcome.REJECT if reason else Outcome.PASS, reason, score=score, limit=limit)
    _, data = wire.encode_result("result/solar/cam1", BOOK, verdict)
    assert strict_json(data)["limit"] == limit
