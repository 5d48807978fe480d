"""What two engines say of the same live frames, before one takes over from the other."""

from __future__ import annotations

from collections import OrderedDict, deque

from daemon.inspection.engine import Done, DoneBox
from daemon.types import Header, Outcome, PartKey

_MOST_UNPAIRED = 64  # frames of which only one of the two has spoken: the other's may have been overtaken


class Comparison:
    """Outcomes come from either engine in any order; a frame counts when both have spoken, until `wanted` have."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self.frames = self.agreed = self._old_rejects = self._new_rejects = 0
        self._unpaired: OrderedDict[PartKey, tuple[bool, Outcome]] = OrderedDict()

    def add(self, key: PartKey, outcome: Outcome, *, is_new: bool) -> None:
        if self.is_done:
            return
        was_new, other = self._unpaired.pop(key, (is_new, outcome))
        if was_new is is_new:
            self._unpaired[key] = (is_new, outcome)
            if len(self._unpaired) > _MOST_UNPAIRED:
                self._unpaired.popitem(last=False)
            return
        old, new = (other, outcome) if is_new else (outcome, other)
        self.frames += 1
        self.agreed += old is new
        self._old_rejects += old is Outcome.REJECT
        self._new_rejects += new is Outcome.REJECT

    @property
    def is_done(self) -> bool:
        return self.frames >= self._wanted

    def header(self) -> Header:
        rejects = {"oldRejects": self._old_rejects, "newRejects": self._new_rejects}
        return {"frames": self.frames, "agreed": self.agreed, **rejects}


class Ear:
    """Where a new engine's reports go: to the comparison while it looks on, to the loop when it speaks for parts.

    It is all that an engine keeps of its swap: an engine that held the swap would hold the engine before it, and so on.
    """

    def __init__(self, done: DoneBox) -> None:
        self._done = done
        self.is_live = False
        self.compared: deque[Done] = deque()

    def report(self, done: Done) -> None:
        """Called on the new engine's thread."""
        if self.is_live:
            self._done.put(done)
        else:
            self.compared.append(done)
            self._done.wake()
