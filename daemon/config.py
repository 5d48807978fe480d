"""config.yaml: one schema, every fault at once, each with its path and what to write instead.

Keys carry their unit. There is no interpolation and no environment look-up: what the file says is
what runs. Relative paths are taken from the folder of the file.
"""

from __future__ import annotations

import difflib
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from daemon.endpoints import LOOPBACK, Endpoint, Input, Name, Section, check_address, told
from daemon.errors import ConfigError
from daemon.yamlfile import YamlError, parse_yaml


class Results(Endpoint):
    mask: Annotated[bool, told("with each reject, its regions as a PNG of the frame's size")] = True
    heatmap: Annotated[bool, told("with each result, the map as an 8-bit PNG")] = False
    frame_on_reject: Annotated[bool, told("with each reject, the frame as JPEG")] = True
    frame_every_ms: Annotated[
        int, Field(ge=0, le=3_600_000), told("one frame of each camera in this time, passed or not, for eyes; 0: none")
    ] = 0


class Permits(Endpoint):
    heartbeat_ms: Annotated[int, Field(ge=10, le=10_000), told("how often bridges hear the daemon's state")] = 100
    lease_ms: Annotated[
        int, Field(ge=30, le=60_000), told("a bridge without a heartbeat for this long holds REJECT")
    ] = 300

    @model_validator(mode="after")
    def _lease_outlives_heartbeats(self) -> Permits:
        if self.lease_ms < 2 * self.heartbeat_ms:
            raise ValueError(
                f"lease_ms is {self.lease_ms}, wanted at least twice heartbeat_ms ({self.heartbeat_ms}): "
                "one lost heartbeat would stop the line"
            )
        return self


class Control(Section):
    bind: Annotated[str, Field(pattern=r"^ipc://.+"), told("status, pause, activate and the like; ipc only")]


class Metrics(Section):
    bind: Annotated[
        str,
        AfterValidator(lambda bind: check_address(f"tcp://{bind}").removeprefix("tcp://")),
        told("host:port of the page /metrics; keep it on loopback"),
    ]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.bind.rpartition(":")
        return host.strip("[]"), int(port)


class Security(Section):
    keys: Annotated[Path, told("folder of server.yaml, peers.yaml and trusted.yaml (inspectd keygen)")] = Path("keys")
    insecure: Annotated[bool, told("true: plain sockets beyond loopback; on a test bench, never on a line")] = False


class Engines(Section):
    dir: Annotated[Path, told("<dir>/<product or camera's engine>/current is the engine that runs")] = Path("engines")


class Backend(Section):
    kind: Annotated[
        Literal["auto", "cpu", "cuda"], told("auto takes a GPU where the engine has a plan for one and it can be used")
    ] = "auto"
    precision: Annotated[
        Literal["f32", "bf16"], told("bf16 is faster, where the processor has it and the golden frames reproduce")
    ] = "f32"
    threads: Annotated[int, Field(ge=1, le=256), told("inference threads")] = 2
    hang_ms: Annotated[
        int,
        Field(ge=100, le=600_000),
        told("an inference that takes longer ends the process, which is started again"),
    ] = 5000


class Camera(Section):
    product: Annotated[Name, told("what is judged, unless a frame names another")]
    engine: Annotated[
        Name | None,
        told("the engine that knows the product, where it has not the product's name: one for many products"),
    ] = None
    mode: Annotated[
        Literal["every-frame", "latest"],
        told("every-frame: beyond queue_mb a frame is OVERLOAD; latest: the newest overtakes"),
    ] = "every-frame"
    deadline_ms: Annotated[
        int, Field(ge=1, le=600_000), told("from arrival to verdict; what is not judged by then is LATE")
    ]
    valid_ms: Annotated[int, Field(ge=1, le=600_000), told("how long a PASS may be believed by a bridge")]
    on_setup_change: Annotated[
        Literal["warn", "reject"], told("reject: parts that would pass are REJECT SETUP while that alarm lasts")
    ] = "warn"


class Ledger(Section):
    dir: Annotated[Path, told("folder of the journal and of the SQLite ledger")] = Path("run/ledger")
    keep_days: Annotated[int, Field(ge=1), told("parts that are older are forgotten")] = 90


class Recorder(Section):
    dir: Annotated[Path, told("folder of the rejected frames")] = Path("run/rejects")
    keep_gb: Annotated[float, Field(gt=0, allow_inf_nan=False), told("beyond this the oldest go")] = 20


class Config(Section):
    """The whole file. `load_config` makes one; nothing else should."""

    version: Annotated[int, Field(ge=1, le=1), told("of this file's format")]
    line: Annotated[Name, told("the middle of every topic: frame/<line>/<camera>, result/<line>/<camera>")]
    inputs: Annotated[
        list[Input], Field(min_length=1), told("Where frames come in. One entry a socket; its kind is chosen")
    ]
    results: Annotated[Results, told("XPUB. Subscribers hear result/<line>/<camera>, late/<line>, health/<line>")]
    permits: Annotated[Permits, told("ROUTER. PLC bridges connect here. Without a fresh permit a part is rejected")]
    control: Annotated[Control, told("What commands on this machine speak to")]
    metrics: Annotated[Metrics | None, told("For Prometheus. Without this section there are none")] = None
    security: Annotated[Security, told("Who may connect")] = Security()
    engines: Annotated[Engines, told("What build_engines.py has built")] = Engines()
    backend: Annotated[Backend, told("What engines run on")] = Backend()
    queue_mb: Annotated[
        int, Field(ge=1, le=65_536), told("frames that wait or are inspected, all cameras together")
    ] = 256
    cameras: Annotated[dict[Name, Camera], Field(min_length=1), told("By name, as the topics have it")]
    ledger: Annotated[Ledger, told("The books: every part with its verdict")] = Ledger()
    recorder: Annotated[Recorder | None, told("Frames of DEFECT, BAD_FRAME and ENGINE_ERROR. null: none are kept")] = (
        Recorder()
    )

    def engine_names(self) -> dict[str, str]:
        """By product of the cameras, the folder of its engine below engines.dir."""
        return {camera.product: camera.engine or camera.product for camera in self.cameras.values()}

    def endpoints(self) -> list[tuple[str, Endpoint]]:
        """Every socket but control (ipc only), with its path in the file."""
        inputs: list[tuple[str, Endpoint]] = [(f"inputs[{i}]", entry) for i, entry in enumerate(self.inputs)]
        return [*inputs, ("results", self.results), ("permits", self.permits)]


def load_config(path: Path) -> Config:
    """Read and check `path`. Raises ConfigError with every problem in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        advice = "; write one with: inspectd init" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}{advice}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), ["is not UTF-8 text"]) from error
    return parse_config(text, str(path), path.resolve().parent)


def parse_config(text: str, source: str, base: Path) -> Config:
    """The configuration in `text`; relative paths are taken from `base`. Raises ConfigError."""
    try:
        data = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(source, [str(error)]) from error
    if not isinstance(data, dict):
        raise ConfigError(source, [f"holds a {type(data).__name__}, wanted keys (version, line, inputs, ...)"])
    problems = _faults_of_the_whole(data)
    try:
        config = Config.model_validate(_with_paths(data))
    except ValidationError as error:
        faults = [_explain(fault) for fault in error.errors(include_url=False)]
        raise ConfigError(source, faults + problems) from error
    if problems:
        raise ConfigError(source, problems)
    return _anchored(config, base)


def _faults_of_the_whole(data: dict[Any, Any]) -> list[str]:
    """What no single key shows: open sockets, addresses bound twice. Told beside the faults of the keys.

    Reads the data as written, of whatever types; what is not as it should be is the schema's to tell.
    """
    inputs = data.get("inputs")
    sections = {f"inputs[{i}]": entry for i, entry in enumerate(inputs if isinstance(inputs, list) else [])}
    sections |= {name: data.get(name) for name in ("results", "permits", "control")}
    sockets = {path: entry for path, entry in sections.items() if isinstance(entry, dict)}
    security = data.get("security")
    insecure = isinstance(security, dict) and security.get("insecure") is True
    problems, first_at = [], dict[str, str]()
    for path, entry in sockets.items():
        bind = entry.get("connect", entry.get("bind"))
        if not isinstance(bind, str):
            continue
        if entry.get("plain") is True and bind.startswith("tcp://") and not LOOPBACK.match(bind) and not insecure:
            remedy = "let the publisher be on this machine" if "connect" in entry else "remove plain"
            problems.append(
                f"{path}: plain: true on {bind}, which is not loopback: anybody who reaches it could send frames or "
                f"take results; {remedy}, or set security.insecure: true on a test bench"
            )
        if bind in first_at:
            problems.append(f"{path}: {bind} is bound by {first_at[bind]} already")
        first_at.setdefault(bind, path)
    cameras = data.get("cameras")
    return problems + _faults_of_cameras(sockets, cameras) + _faults_of_engines(cameras)


def _faults_of_cameras(sockets: dict[str, dict[Any, Any]], cameras: Any) -> list[str]:
    """An input's camera must be one of the file's, and have no other input of the kind: each numbers its frames."""
    problems, first_at = [], dict[str, str]()
    for path, entry in sockets.items():
        camera = entry.get("camera")
        if not isinstance(camera, str) or not isinstance(cameras, dict):
            continue
        if camera not in cameras:
            problems.append(f"{path}.camera: found {camera!r}, wanted one of cameras: {', '.join(map(str, cameras))}")
        if camera in first_at:
            problems.append(f"{path}.camera: {camera} has its frames from {first_at[camera]} already")
        first_at.setdefault(camera, path)
    return problems


def _faults_of_engines(cameras: Any) -> list[str]:
    """A product has one engine, whichever camera sees it."""
    problems, first_at = [], dict[str, tuple[str, str]]()
    for name, camera in cameras.items() if isinstance(cameras, dict) else ():
        product, engine = (camera.get("product"), camera.get("engine")) if isinstance(camera, dict) else (None, None)
        if not isinstance(product, str) or not isinstance(engine, str | None):
            continue
        first, judged = first_at.setdefault(product, (str(name), engine or product))
        if judged != (engine or product):
            problems.append(
                f"cameras.{name}.engine: {product} is judged by {judged} at cameras.{first}, wanted one engine for it"
            )
    return problems


_PATH_KEYS = (("security", "keys"), ("engines", "dir"), ("ledger", "dir"), ("recorder", "dir"))


def _with_paths(data: dict[Any, Any]) -> dict[Any, Any]:
    """Strict pydantic wants Path objects where YAML has strings."""
    copy = dict(data)
    for section, key in _PATH_KEYS:
        inner = copy.get(section)
        if isinstance(inner, dict) and isinstance(inner.get(key), str):
            copy[section] = {**inner, key: Path(inner[key])}
    return copy


def _anchored(config: Config, base: Path) -> Config:
    """The same configuration with every relative path made absolute from the file's folder."""
    update: dict[str, Any] = {}
    for section, key in _PATH_KEYS:
        part = getattr(config, section)
        if part is not None:
            update[section] = part.model_copy(update={key: base / getattr(part, key)})

    def bound(part: Any) -> Any:
        return part.model_copy(update={"bind": _anchored_bind(part.bind, base)})

    update.update({name: bound(getattr(config, name)) for name in ("results", "permits", "control")})
    update["inputs"] = [bound(entry) for entry in config.inputs]
    return config.model_copy(update=update)


def _anchored_bind(bind: str, base: Path) -> str:
    scheme, _, rest = bind.partition("://")
    return f"ipc://{base / rest}" if scheme == "ipc" and not rest.startswith("@") else bind


_ADVICE = {
    "int_type": "a whole number, without quotes and without a unit",
    "float_type": "a number, without quotes and without a unit",
    "bool_type": "true or false, without quotes",
    "string_type": "text; quotes make it one",
}


def _explain(fault: Any) -> str:
    """One line a person can act on: the path, what is wrong, what was found, what to write."""
    location = [step for step in fault["loc"] if step != "[key]"]
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).lstrip(".")
    kind, found = fault["type"], fault.get("input")
    if kind == "extra_forbidden":
        return f"{path}: unknown key{_suggestion(location)}"
    if kind == "missing":
        return f"{path}: is missing; it has no default"
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: found {_SHORT.repr(found)}: {message}" if isinstance(found, str) else f"{path}: {message}"
    advice = f"; write {_ADVICE[kind]}" if kind in _ADVICE else ""
    return f"{path}: found {_SHORT.repr(found)}: {message[:1].lower()}{message[1:]}{advice}"


class _Short(reprlib.Repr):
    """A value as it was found, in short: YAML's aliases make values that would fill the memory when written out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 200, 200

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python writes no number of more than 4,300 digits
            return f"a number of {x.bit_length()} bits"


_SHORT = _Short()


def _suggestion(location: list[Any]) -> str:
    """A known key that looks like the misspelt one, or the known keys of its section."""
    known = sorted(_known_keys(location[:-1]))
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(known)}" if known else ""


def _known_keys(section: list[Any]) -> list[str]:
    model: Any = Config
    for step in section:
        if isinstance(step, int):
            continue
        if model is Config and step == "cameras":
            model = dict
        elif model is dict:
            model = Camera
        else:
            model = _SECTIONS.get(str(step), Section)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


_SECTIONS: dict[str, type[Section]] = {
    "inputs": Input,
    "results": Results,
    "permits": Permits,
    "control": Control,
    "metrics": Metrics,
    "security": Security,
    "engines": Engines,
    "backend": Backend,
    "ledger": Ledger,
    "recorder": Recorder,
}
