"""Keeps the processors of a virtual machine from being given away while they rest, for runs that judge deadlines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_REST = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def kept_awake() -> Iterator[None]:
    """A loop on each core that anything else may interrupt at once (SCHED_IDLE).

    A virtual machine's core that rests is handed to others, and is back only when their turn is over, about
    which neither the program nor its machine can do anything. A core that is never at rest keeps
    its own turn. A line's own box does it with the kernel's `idle=poll`, or by not being a shared one.
    """
    loops = [
        subprocess.Popen([sys.executable, "-S", "-E", "-c", _REST, str(core)])
        for core in sorted(os.sched_getaffinity(0))
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
