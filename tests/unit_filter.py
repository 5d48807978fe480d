"""Runs a command under a unit's system call rules, as systemd would set them, where no systemd is there to do it.

    python tests/unit_filter.py systemd/inspectd.service COMMAND...

SystemCallFilter, RestrictAddressFamilies and MemoryDenyWriteExecute become one seccomp filter by libseccomp, which
systemd itself uses; `systemd-analyze syscall-filter` says what the groups (@system-service) mean. A refused call fails
with EPERM, a refused address family with EAFNOSUPPORT, as under systemd. The filter stays with the command that follows.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ALLOW = 0x7FFF0000
REFUSE = 0x00050000  # | errno
NOT_EQUAL, MASKED_EQUAL = 1, 7


class Comparison(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def settings(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Every value of every key of a unit and its drop-ins, in order; an empty value forgets those before it."""
    found: dict[str, list[str]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            key, is_setting, value = line.partition("=")
            if is_setting and not line.startswith(("#", ";")):
                found[key] = [*found.get(key, []), value] if value else []
    return found


def members(group: str) -> set[str]:
    """The system calls that systemd means by a name: itself, or those of @group and of the groups in it."""
    if not group.startswith("@"):
        return {group}
    command = ["systemd-analyze", "syscall-filter", group]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[1:]
    names = {line.strip() for line in told if line.strip() and not line.strip().startswith("#")}
    return set().union(*(members(name) for name in names))


def allowed_calls(values: Sequence[str]) -> set[str]:
    """What an allow list leaves after its `~` lines."""
    # systemd lets these through under any allow list; without them nothing could be started.
    allowed = members("@default")
    for value in values:
        named = set().union(*(members(name) for name in value.removeprefix("~").split()))
        allowed = allowed - named if value.startswith("~") else allowed | named
    return allowed


class Filter:
    def __init__(self, default: int) -> None:
        self._library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._library.seccomp_init.argtypes = [ctypes.c_uint32]
        self._library.seccomp_load.argtypes = [ctypes.c_void_p]
        self._library.seccomp_rule_add_array.argtypes = [
            ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(Comparison),
        ]  # fmt: skip
        self._context = self._library.seccomp_init(default)

    def add(self, action: int, call: str, *comparisons: tuple[int, int, int, int]) -> None:
        """One rule; a call that this machine's processor does not have is left out."""
        number = self._library.seccomp_syscall_resolve_name(call.encode())
        if number < 0:
            return
        array = (Comparison * len(comparisons))(*comparisons)
        failed = self._library.seccomp_rule_add_array(self._context, action, number, len(comparisons), array)
        if failed:
            raise OSError(-failed, f"no rule for {call}")

    def load(self) -> None:
        failed = self._library.seccomp_load(self._context)
        if failed:
            raise OSError(-failed, "the kernel did not take the filter")


def restrict(rules: dict[str, list[str]]) -> None:
    """Put this process, and what it starts, under the rules. Three filters, of which the strictest answer counts; the calls
    come last, as loading a filter is a call too.
    """
    if rules.get("RestrictAddressFamilies"):
        families = Filter(ALLOW)
        named = [getattr(socket, name) for value in rules["RestrictAddressFamilies"] for name in value.split()]
        for family in set(range(socket.AF_VSOCK + 8)) - set(named):
            families.add(REFUSE | errno.EAFNOSUPPORT, "socket", (0, MASKED_EQUAL, 0xFFFFFFFF, family))
        families.load()
    if rules.get("MemoryDenyWriteExecute", ["no"])[-1] == "yes":
        memory = Filter(ALLOW)
        both = mmap.PROT_EXEC | mmap.PROT_WRITE
        memory.add(REFUSE | errno.EPERM, "mmap", (2, MASKED_EQUAL, both, both))
        for call in ("mprotect", "pkey_mprotect"):
            memory.add(REFUSE | errno.EPERM, call, (2, MASKED_EQUAL, mmap.PROT_EXEC, mmap.PROT_EXEC))
        memory.load()
    if rules.get("SystemCallFilter"):
        calls = Filter(REFUSE | errno.EPERM)
        for call in allowed_calls(rules["SystemCallFilter"]):
            calls.add(ALLOW, call)
        calls.load()


def main() -> None:
    units, command = sys.argv[1].split(os.pathsep), sys.argv[2:]
    restrict(settings(map(Path, units)))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
