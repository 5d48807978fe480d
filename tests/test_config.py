"""config.yaml: what is taken, what is refused, and that every fault is told at once with its path."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon import config as schema
from daemon.config import Config, load_config, parse_config
from daemon.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
BASE = Path("/srv/line")
TEXT = """
version: 1
line: solar
inputs:
  - {kind: router, bind: "tcp://127.0.0.1:5550"}
  - {kind: pull, bind: "tcp://127.0.0.1:5555", plain: true}
results: {bind: "tcp://127.0.0.1:5551", mask: true, heatmap: false, frame_on_reject: true}
permits: {bind: "tcp://127.0.0.1:5552", heartbeat_ms: 100, lease_ms: 300}
control: {bind: "ipc://run/control.sock"}
metrics: {bind: "127.0.0.1:9464"}
security: {keys: keys}
engines: {dir: engines}
backend: {kind: auto, precision: f32, threads: 2, hang_ms: 5000}
queue_mb: 256
cameras:
  cam1: {product: solar-mono, mode: every-frame, deadline_ms: 100, valid_ms: 500}
ledger: {dir: run/ledger, keep_days: 90}
recorder: {dir: run/rejects, keep_gb: 20}
"""
GOOD: dict[str, Any] = yaml.safe_load(TEXT)
REMOVED = object()


def changed(*changes: tuple[str, object]) -> str:
    """The good configuration with values at dotted paths replaced; a number steps into a list."""
    data = copy.deepcopy(GOOD)
    for path, value in changes:
        *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        inner = data
        for step in steps:
            inner = inner[step]
        if value is REMOVED:
            del inner[last]
        else:
            inner[last] = value
    return yaml.safe_dump(data, sort_keys=False)


def parsed(*changes: tuple[str, object]) -> Config:
    return parse_config(changed(*changes), "config.yaml", BASE)


def problems(text: str) -> list[str]:
    """The faults of a text that must have some."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "config.yaml", BASE)
    return caught.value.problems


def only_problem(*changes: tuple[str, object]) -> str:
    (problem,) = problems(changed(*changes))
    return problem


# --- what is taken


def test_every_key_of_the_design_is_read() -> None:
    config = parse_config(TEXT, "config.yaml", BASE)
    assert config.line == "solar"
    assert [(entry.kind, entry.plain) for entry in config.inputs] == [("router", False), ("pull", True)]
    assert config.results.frame_on_reject
    assert (config.permits.heartbeat_ms, config.permits.lease_ms) == (100, 300)
    assert config.metrics is not None
    assert config.metrics.address == ("127.0.0.1", 9464)
    assert (config.backend.kind, config.backend.threads, config.backend.hang_ms) == ("auto", 2, 5000)
    assert config.queue_mb == 256
    assert config.cameras["cam1"].deadline_ms == 100
    assert config.ledger.keep_days == 90
    assert config.recorder is not None
    assert config.recorder.keep_gb == 20


def test_what_has_a_default_may_be_left_out() -> None:
    optional = ("metrics", "security", "engines", "backend", "queue_mb", "ledger", "recorder")
    config = parsed(*[(name, REMOVED) for name in optional])
    assert config.metrics is None
    assert not config.security.insecure
    assert config.security.keys == BASE / "keys"
    assert config.cameras["cam1"].mode == "every-frame"


def test_recorder_and_metrics_can_be_switched_off() -> None:
    config = parsed(("recorder", None), ("metrics", None))
    assert config.recorder is None
    assert config.metrics is None


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "config.yaml").write_text(TEXT)
    monkeypatch.chdir(folder)
    config = load_config(Path("config.yaml"))
    assert config.security.keys == folder / "keys"
    assert config.engines.dir == folder / "engines"
    assert config.ledger.dir == folder / "run" / "ledger"
    assert config.recorder is not None
    assert config.recorder.dir == folder / "run" / "rejects"
    assert config.control.bind == f"ipc://{folder}/run/control.sock"


def test_absolute_paths_and_abstract_sockets_stay_as_they_are() -> None:
    config = parsed(
        ("security.keys", "/etc/keys"), ("control.bind", "ipc:///run/c.sock"), ("results.bind", "ipc://@results")
    )
    assert config.security.keys == Path("/etc/keys")
    assert config.control.bind == "ipc:///run/c.sock"
    assert config.results.bind == "ipc://@results"


def test_ipc_inputs_and_results_are_anchored_too() -> None:
    config = parsed(("inputs.0.bind", "ipc://in.sock"), ("permits.bind", "ipc://permits.sock"))
    assert config.inputs[0].bind == f"ipc://{BASE}/in.sock"
    assert config.permits.bind == f"ipc://{BASE}/permits.sock"


def test_tcp_speaks_curve_unless_plain_and_ipc_never_does() -> None:
    config = parsed(("results.bind", "ipc://results.sock"))
    assert [endpoint.uses_curve for _, endpoint in config.endpoints()] == [True, False, False, True]


# --- the shipped example


def test_shipped_example_loads() -> None:
    config = load_config(ROOT / "config.yaml")
    assert config.version == 1
    assert not config.security.insecure
    assert not any(endpoint.is_open for _, endpoint in config.endpoints())


def test_shipped_example_names_every_key_of_the_schema() -> None:
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    sections = [getattr(schema, name) for name in vars(schema)]
    models = [kind for kind in sections if isinstance(kind, type) and issubclass(kind, schema.Section)]
    keys = {key for model in models for key in model.model_fields}
    assert {key for key in keys if f"{key}:" not in text} == set()


# --- every fault at once


def test_every_fault_is_told_at_once_with_its_path() -> None:
    found = problems(
        changed(
            ("line", REMOVED),
            ("queue_mb", "256"),
            ("backend.kind", "gpu"),
            ("cameras.cam1.deadline", 5),
            ("cameras.cam1.valid_ms", 0),
            ("inputs.1.bind", "udp://127.0.0.1:1"),
            ("permits.lease_ms", 150),
            ("surprise", 1),
        )
    )
    paths = {problem.partition(":")[0] for problem in found}
    assert paths == {
        "line", "queue_mb", "backend.kind", "cameras.cam1.deadline", "cameras.cam1.valid_ms", "inputs[1].bind", "permits",
        "surprise",
    }  # fmt: skip
    assert len(found) == 8


def test_faults_of_the_whole_are_told_one_by_one() -> None:
    found = problems(
        changed(
            ("results.bind", "tcp://0.0.0.0:5551"), ("results.plain", True), ("permits.bind", "tcp://127.0.0.1:5550")
        )
    )
    assert len(found) == 2


def test_open_endpoint_is_told_beside_other_faults() -> None:
    found = problems(changed(("results.bind", "tcp://0.0.0.0:5551"), ("results.plain", True), ("queue_mb", 0)))
    assert any("queue_mb" in problem for problem in found)
    assert any("0.0.0.0" in problem for problem in found)


def test_error_text_names_the_file_on_each_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(changed(("queue_mb", 0), ("line", 5)), "etc/config.yaml", BASE)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("etc/config.yaml: ") for line in lines)
    assert caught.value.exit_code == 78


# --- keys that are not in the schema


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("lines", "line"),
        ("camera", "cameras"),
        ("queue_MB", "queue_mb"),
        ("inputs.0.binds", "bind"),
        ("results.heat_map", "heatmap"),
        ("permits.heartbeat", "heartbeat_ms"),
        ("control.bnd", "bind"),
        ("metrics.bin", "bind"),
        ("security.insecur", "insecure"),
        ("engines.dirs", "dir"),
        ("backend.thread", "threads"),
        ("cameras.cam1.deadline", "deadline_ms"),
        ("ledger.keepDays", "keep_days"),
        ("recorder.keep_mb", "keep_gb"),
    ],
)
def test_misspelt_key_is_refused_with_the_one_that_was_meant(path: str, wanted: str) -> None:
    assert only_problem((path, 1)).endswith(f"unknown key; did you mean {wanted!r}?")


def test_unknown_key_like_no_other_is_refused_with_the_known_ones() -> None:
    assert only_problem(("engines.zzz", 1)) == "engines.zzz: unknown key; known here: dir"


def test_key_that_is_not_text_is_refused() -> None:
    assert problems(TEXT + "5: 6\n")
    assert problems(TEXT + "null: 6\n")


# --- units and ranges


@pytest.mark.parametrize(
    ("path", "lowest", "highest"),
    [
        ("queue_mb", 1, 65_536),
        ("permits.heartbeat_ms", 10, 150),  # at most half of lease_ms
        ("permits.lease_ms", 200, 60_000),  # at least twice heartbeat_ms
        ("backend.threads", 1, 256),
        ("backend.hang_ms", 100, 600_000),
        ("cameras.cam1.deadline_ms", 1, 600_000),
        ("cameras.cam1.valid_ms", 1, 600_000),
    ],
)
def test_number_is_taken_inside_its_range_and_refused_outside(path: str, lowest: int, highest: int) -> None:
    for value in (lowest, highest):
        parsed((path, value))
    for value in (lowest - 1, highest + 1, -1, 10**30):
        assert path.partition(".")[0] in only_problem((path, value))


def test_shortest_heartbeat_allows_a_short_lease_and_no_shorter_one() -> None:
    parsed(("permits.heartbeat_ms", 10), ("permits.lease_ms", 30))
    assert "permits.lease_ms" in only_problem(("permits.heartbeat_ms", 10), ("permits.lease_ms", 29))


@pytest.mark.parametrize("path", ["ledger.keep_days", "recorder.keep_gb"])
def test_records_are_kept_for_more_than_nothing(path: str) -> None:
    parsed((path, 1))
    for value in (0, -1):
        assert path in only_problem((path, value))


def test_gigabytes_may_have_a_fraction() -> None:
    config = parsed(("recorder.keep_gb", 0.5))
    assert config.recorder is not None
    assert config.recorder.keep_gb == 0.5


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gigabytes_without_end_are_refused(value: float) -> None:
    assert "recorder.keep_gb" in only_problem(("recorder.keep_gb", value))


NUMBERS = (
    "queue_mb", "permits.heartbeat_ms", "permits.lease_ms", "backend.threads", "backend.hang_ms",
    "cameras.cam1.deadline_ms", "cameras.cam1.valid_ms", "ledger.keep_days", "recorder.keep_gb",
)  # fmt: skip


@pytest.mark.parametrize("value", ["100", "100ms", True, None, [100]])
@pytest.mark.parametrize("path", NUMBERS)
def test_number_written_as_anything_else_is_refused(path: str, value: object) -> None:
    assert path in only_problem((path, value))


@pytest.mark.parametrize("path", [path for path in NUMBERS if path != "recorder.keep_gb"])
def test_whole_number_written_with_a_point_is_refused(path: str) -> None:
    assert path in only_problem((path, 100.0))


@pytest.mark.parametrize(
    "path", ["results.mask", "results.heatmap", "results.frame_on_reject", "results.plain", "security.insecure"]
)
@pytest.mark.parametrize("value", ["true", "yes please", 1, 0, None])
def test_switch_that_is_not_true_or_false_is_refused(path: str, value: object) -> None:
    assert path in only_problem((path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("backend.kind", "gpu"),
        ("backend.precision", "fp16"),
        ("cameras.cam1.mode", "newest"),
        ("inputs.0.kind", "rep"),
        ("inputs.0.kind", "imagezmq-pub"),
        ("line", "so/lar"),
        ("line", ""),
        ("line", 5),
        ("line", "a" * 65),
        ("cameras.cam1.product", "../x"),
        ("security.keys", 5),
        ("engines.dir", None),
        ("inputs", []),
        ("inputs", {}),
        ("cameras", {}),
        ("cameras", []),
        ("results", None),
        ("backend", "cpu"),
    ],
)
def test_value_outside_its_choices_is_refused_with_its_path(path: str, value: object) -> None:
    name = path.replace(".0.", "[0].")
    assert only_problem((path, value)).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["cam 1", "cam/1", "", ".cam", "a" * 65, "cam\n"])
def test_camera_with_a_name_that_no_topic_can_hold_is_refused(name: str) -> None:
    camera = GOOD["cameras"]["cam1"]
    assert "cameras" in only_problem(("cameras", {name: camera}))


@pytest.mark.parametrize("path", ["line", "inputs", "results", "permits", "control", "cameras", "version"])
def test_key_without_a_default_must_be_there(path: str) -> None:
    assert only_problem((path, REMOVED)) == f"{path}: is missing; it has no default"


@pytest.mark.parametrize("value", [0, 2, "1", None, True, 1.0])
def test_unknown_version_is_refused(value: object) -> None:
    assert only_problem(("version", value)).startswith("version: ")


# --- sockets


@pytest.mark.parametrize("bind", ["", "127.0.0.1:5550", "udp://x:1", "inproc://x", "tcp://", "ipc://", 5550])
@pytest.mark.parametrize("path", ["inputs.0", "results", "permits"])
def test_address_that_is_neither_tcp_nor_ipc_is_refused(path: str, bind: object) -> None:
    assert "bind" in only_problem((f"{path}.bind", bind))


@pytest.mark.parametrize(
    "bind", ["tcp://127.0.0.1", "tcp://127.0.0.1:", "tcp://127.0.0.1:port", "tcp://127.0.0.1:99999"]
)
def test_tcp_address_without_a_port_that_exists_is_refused(bind: str) -> None:
    assert "results.bind" in only_problem(("results.bind", bind))


def test_control_is_ipc_only() -> None:
    assert only_problem(("control.bind", "tcp://127.0.0.1:5553")).startswith("control.bind: ")


@pytest.mark.parametrize("bind", ["9464", "127.0.0.1", "http://127.0.0.1:9464", "127.0.0.1:port", "127.0.0.1:99999"])
def test_metrics_address_without_host_and_port_is_refused(bind: str) -> None:
    assert only_problem(("metrics.bind", bind)).startswith("metrics.bind: ")


def test_metrics_address_may_be_ipv6() -> None:
    metrics = parsed(("metrics.bind", "[::1]:9464")).metrics
    assert metrics is not None
    assert metrics.address == ("::1", 9464)


OPEN = [
    "tcp://0.0.0.0:1",
    "tcp://*:1",
    "tcp://192.168.0.9:1",
    "tcp://[::]:1",
    "tcp://eth0:1",
    "tcp://localhost.example.com:1",
    "tcp://127.0.0.1.example.com:1",
]


@pytest.mark.parametrize("bind", OPEN)
@pytest.mark.parametrize("path", ["inputs.0", "results", "permits"])
def test_plain_endpoint_beyond_loopback_is_refused_unless_insecure(path: str, bind: str) -> None:
    changes = ((f"{path}.bind", bind), (f"{path}.plain", True))
    problem = only_problem(*changes)
    assert path.replace(".0", "[0]") in problem
    assert bind in problem
    config = parsed(*changes, ("security.insecure", True))
    assert [endpoint.is_open for _, endpoint in config.endpoints()].count(True) == 1


@pytest.mark.parametrize(
    "bind", ["tcp://127.0.0.1:1", "tcp://127.9.9.9:1", "tcp://localhost:1", "tcp://[::1]:1", "ipc://x"]
)
def test_plain_endpoint_that_stays_on_the_machine_is_taken(bind: str) -> None:
    assert not parsed(("results.bind", bind), ("results.plain", True)).results.is_open


@pytest.mark.parametrize("bind", OPEN)
def test_endpoint_with_curve_may_be_anywhere(bind: str) -> None:
    assert parsed(("results.bind", bind)).results.uses_curve


@pytest.mark.parametrize(
    ("path", "bind"),
    [
        ("inputs.1.bind", "tcp://127.0.0.1:5550"),
        ("permits.bind", "tcp://127.0.0.1:5551"),
        ("results.bind", "ipc://run/control.sock"),
    ],
)
def test_address_bound_twice_is_refused(path: str, bind: str) -> None:
    assert f"{bind} is bound by " in only_problem((path, bind))


# --- stock imageZMQ senders

HUB = {"kind": "imagezmq-rep", "bind": "tcp://127.0.0.1:5555", "camera": "cam1", "plain": True}
PUBLISHER = {"kind": "imagezmq-sub", "connect": "tcp://127.0.0.1:5556", "camera": "cam1", "plain": True}


def with_input(entry: dict[str, object], **changes: object) -> tuple[str, object]:
    return "inputs", [{key: value for key, value in {**entry, **changes}.items() if value is not REMOVED}]


def test_imagezmq_inputs_say_whose_frames_they_bring() -> None:
    (hub,) = parsed(with_input(HUB)).inputs
    assert (hub.is_imagezmq, hub.camera, hub.connects, hub.uses_curve) == (True, "cam1", False, False)
    (publisher,) = parsed(with_input(PUBLISHER)).inputs
    assert (publisher.is_imagezmq, publisher.bind, publisher.connects) == (True, "tcp://127.0.0.1:5556", True)


def test_ipc_publisher_is_anchored_too() -> None:
    (publisher,) = parsed(with_input(PUBLISHER, connect="ipc://run/pub.sock", plain=REMOVED)).inputs
    assert publisher.bind == f"ipc://{BASE}/run/pub.sock"


@pytest.mark.parametrize(
    ("entry", "changes", "told"),
    [
        (HUB, {"camera": REMOVED}, "camera is missing"),
        (HUB, {"camera": "cam9"}, "found 'cam9', wanted one of cameras: "),
        (HUB, {"kind": "router"}, "each message of router names its own"),
        (HUB, {"connect": "tcp://127.0.0.1:1", "bind": REMOVED}, "bind: is missing"),
        (HUB, {"bind": "tcp://0.0.0.0:5555"}, "remove plain, or set security.insecure"),
        (PUBLISHER, {"bind": "tcp://127.0.0.1:1"}, "wants its address: connect:"),
        (PUBLISHER, {"connect": REMOVED}, "wants its address: connect:"),
        (PUBLISHER, {"connect": 5556}, "wants its address: connect:"),
        (PUBLISHER, {"connect": "127.0.0.1"}, "connect is '127.0.0.1', wanted tcp://host:port"),
        (PUBLISHER, {"connect": "tcp://10.0.0.9:5555"}, "let the publisher be on this machine"),
        (PUBLISHER, {"plain": False}, "has no key; wanted plain: true"),
    ],
)
def test_imagezmq_input_that_cannot_work_is_refused(
    entry: dict[str, object], changes: dict[str, object], told: str
) -> None:
    assert any(told in problem for problem in problems(changed(with_input(entry, **changes))))


def test_imagezmq_sender_on_the_network_needs_insecure() -> None:
    config = parsed(with_input(HUB, bind="tcp://0.0.0.0:5555"), ("security.insecure", True))
    assert config.inputs[0].is_open


def test_two_imagezmq_inputs_cannot_feed_one_camera() -> None:
    data = ("inputs", [HUB, PUBLISHER])
    assert only_problem(data) == "inputs[1].camera: cam1 has its frames from inputs[0] already"


# --- files that are no configuration


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "NoneType"),
        ("# nothing but a comment\n", "NoneType"),
        ("- version: 1\n", "list"),
        ("version\n", "str"),
        ("42\n", "int"),
        ("version: [1\n", "is not YAML"),
        ("version: 1\n\tline: x\n", "is not YAML"),
        ("version: *anchor\n", "is not YAML"),
        ("version: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("version: \x00\n", "is not YAML"),
        ("{[1]: 2}", "is not YAML"),
    ],
)
def test_text_that_is_no_configuration_is_refused(text: str, told: str) -> None:
    (problem,) = problems(text)
    assert told in problem


@pytest.mark.parametrize(
    "value",
    [
        "2024-13-45", "9" * 5000, "!!int abc", "!!timestamp abc", "[" * 5000, "!!float abc", "!!bool maybe", "!!int ''",
        "!!float ''", ":".join(["1"] * 250) + ".5",
    ],
    ids=[
        "no such month", "too long a number", "no integer", "no time", "nested too deeply", "no float", "no switch",
        "an empty integer", "an empty float", "hours beyond any float",
    ],
)  # fmt: skip
def test_value_that_yaml_itself_cannot_make_is_a_configuration_error(value: str) -> None:
    assert problems(TEXT.replace("queue_mb: 256", f"queue_mb: {value}"))


def test_number_too_long_to_be_written_is_refused_all_the_same() -> None:
    """YAML reads it as hexadecimal, and Python does not write it in decimal."""
    (problem,) = problems(TEXT.replace("queue_mb: 256", f"queue_mb: 0x{'f' * 4000}"))
    assert problem.startswith("queue_mb: found a number of 16000 bits")


def test_value_that_aliases_make_huge_is_told_in_short() -> None:
    layers = [f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    text = TEXT.replace("line: solar", f"line: [&a0 [x], {', '.join(layers)}]")
    (problem,) = problems(text)
    assert problem.startswith("line: found [")
    assert len(problem) < 1000


@pytest.mark.parametrize(
    "text",
    [
        TEXT + "queue_mb: 512\n",
        TEXT.replace("heartbeat_ms: 100,", "heartbeat_ms: 100, heartbeat_ms: 50,"),
        TEXT.replace("cameras:\n", "cameras:\n  cam1: {product: other, deadline_ms: 1, valid_ms: 1}\n"),
    ],
    ids=["section", "number", "camera"],
)
def test_key_that_stands_twice_is_refused(text: str) -> None:
    assert any("twice" in problem or "duplicate" in problem for problem in problems(text))


def test_file_that_is_not_there_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"version: \xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "config.yaml")


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from("versionlin: 1\n-[]{}\"'#&*!|>%@`,?~0x."), max_size=80),
)
def test_any_text_is_refused_as_a_configuration(text: str) -> None:
    assert problems(text)


PATHS = ["version", "line", "inputs", "inputs.0", "inputs.0.bind", "results", "permits", "control", "metrics", "metrics.bind", "security", "security.keys", "engines.dir", "backend", "backend.kind", "queue_mb", "cameras", "cameras.cam1", "ledger", "recorder", "recorder.keep_gb"]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from(PATHS), value=VALUES)
def test_any_value_anywhere_is_taken_or_refused_as_a_configuration_error(path: str, value: object) -> None:
    config, faults = None, []
    try:
        config = parsed((path, value))
    except ConfigError as error:
        faults = error.problems
    assert (config is None) == any(fault.strip() for fault in faults)
