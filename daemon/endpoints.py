"""The sockets that a configuration may name: addresses, who may use them without a key, the kinds of input."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
LOOPBACK = re.compile(r"^tcp://(127\.\d+\.\d+\.\d+|localhost|\[::1\]):")


def check_address(bind: str) -> str:
    """tcp://host:port with a port that exists, or ipc://path. Raises ValueError."""
    scheme, separator, rest = bind.partition("://")
    host, _, port = rest.rpartition(":")
    host = "" if "/" in host else host
    is_tcp = scheme == "tcp" and bool(host) and port.isdigit() and 0 < int(port) < 65_536
    if not separator or not rest or not (is_tcp or scheme == "ipc"):
        raise ValueError("wanted tcp://host:port with a port from 1 to 65535, or ipc://path")
    return bind


def told(text: str) -> Any:
    """What a key means, in the schema itself: for docs/reference.md and for what `inspectd init` writes."""
    return Field(description=text)


Bind = Annotated[str, AfterValidator(check_address)]


class Section(BaseModel):
    """Strict: a key that is not in the schema is an error, and so is a number written as a string."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Endpoint(Section):
    """A socket the daemon binds. tcp speaks CURVE unless `plain` says otherwise, which only loopback may."""

    bind: Annotated[Bind, told("tcp://host:port, 0.0.0.0 for all of this box's networks; or ipc://path")]
    plain: Annotated[bool, told("true takes the keys off a tcp socket; only loopback may")] = False

    @property
    def uses_curve(self) -> bool:
        return self.bind.startswith("tcp://") and not self.plain

    @property
    def is_open(self) -> bool:
        """Whether somebody beyond this machine could speak to it without a key."""
        return self.plain and self.bind.startswith("tcp://") and not LOOPBACK.match(self.bind)

    @property
    def connects(self) -> bool:
        """Whether `bind` is another's address, to which the daemon connects."""
        return False


class Input(Endpoint):
    """Where frames come in. An imageZMQ message names no camera, so the endpoint does.

    imageZMQ's publisher binds: with `imagezmq-sub`, `bind` is the address that `connect` gives in the file.
    """

    kind: Annotated[
        Literal["router", "pull", "shm", "imagezmq-rep", "imagezmq-sub"],
        told("router: senders connect with DEALER and get an answer to each frame; the one to use"),
    ]
    camera: Annotated[Name | None, told("whose frames these are; for imagezmq-rep and imagezmq-sub alone")] = None

    @property
    def is_imagezmq(self) -> bool:
        return self.kind.startswith("imagezmq-")

    @property
    def connects(self) -> bool:
        return self.kind == "imagezmq-sub"

    @model_validator(mode="before")
    @classmethod
    def _connects_to_a_publisher(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("kind") != "imagezmq-sub":
            return data
        if "bind" in data or not isinstance(data.get("connect"), str):
            raise ValueError("imageZMQ's publisher binds, so imagezmq-sub wants its address: connect: tcp://host:port")
        try:
            check_address(data["connect"])
        except ValueError as error:
            raise ValueError(f"connect is {data['connect']!r}, {error}") from error
        rest = {key: value for key, value in data.items() if key != "connect"}
        return {**rest, "bind": data["connect"]}

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Input:
        if self.kind == "shm" and not self.bind.startswith("ipc://"):
            raise ValueError(
                f"bind is {self.bind}, wanted ipc://path: frames in shared memory come from this box alone"
            )
        if self.is_imagezmq and self.camera is None:
            raise ValueError(f"camera is missing: a message of {self.kind} names none; say whose frames these are")
        if not self.is_imagezmq and self.camera is not None:
            raise ValueError(f"camera is {self.camera}, but each message of {self.kind} names its own; leave it out")
        if self.connects and self.uses_curve:
            raise ValueError(f"imageZMQ's publisher at {self.bind} has no key; wanted plain: true, as it is so")
        return self
