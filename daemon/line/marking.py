"""The words of the command `mark`: what a person says of rejected parts. orders.py brings them to the books."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from daemon.endpoints import Name as CameraName
from daemon.errors import WireError
from daemon.line.wire import MAX_NS, Seq
from daemon.line.wire import Name as EpochName
from daemon.types import Header

Word = Literal["good", "defect", "none"]
MOST_MARKED = 500  # parts of one request, which has 64 KiB in any case
DEFECT_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}"  # it becomes a folder's name


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MarkedPart(_Strict):
    """`decidedNs` leads to the recorder's files, also when the ledger has forgotten the part."""

    camera: CameraName
    epoch: EpochName
    seq: Seq
    decidedNs: Annotated[int, Field(ge=0, le=MAX_NS)]


class Marking(_Strict):
    """`none` takes a mark back. `decision` is one for all requests that a single click or command needed."""

    mark: Word
    name: Annotated[str, Field(pattern=rf"^{DEFECT_NAME}$")] | None = None
    decision: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    parts: Annotated[list[MarkedPart], Field(min_length=1, max_length=MOST_MARKED)]

    @model_validator(mode="after")
    def _name_is_a_defects(self) -> Marking:
        if self.name is not None and (self.mark != "defect" or self.name.lower() == "good"):
            raise ValueError(f"found name {self.name!r} with mark {self.mark!r}: only a defect has one, and not `good`")
        return self

    @property
    def words(self) -> str:
        """For the list of what people changed."""
        count = len(self.parts)
        said = "mark taken back" if self.mark == "none" else self.mark
        what = f"{said} {self.name}" if self.name else said
        return f"{count} part{'' if count == 1 else 's'}: {what}"


def decode_marking(fields: Header) -> Marking:
    """Raises WireError."""
    try:
        return Marking.model_validate({key: fields[key] for key in Marking.model_fields if key in fields})
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors(include_url=False)[:3]]
        raise WireError(f"found no marking: {'; '.join(faults)}") from error
