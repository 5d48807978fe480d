"""The errors that end a command or refuse an input, by whose fault they are.

Every message says what was found, what was wanted and what to do. Each class carries the exit code
that the command line ends with (sysexits.h).
"""

from __future__ import annotations


class InspectError(Exception):
    """The root: anything inspectd raises on purpose."""

    exit_code = 70


class UsageError(InspectError):
    """A command was called in a way it cannot be."""

    exit_code = 64


class DataError(InspectError):
    """Input data (images, folders, journals) that cannot be used."""

    exit_code = 65


class DeviceError(InspectError):
    """The processor or GPU, or its library, cannot do what was asked."""

    exit_code = 69


class ConfigError(InspectError):
    """A configuration or key file; `problems` holds every fault found, each with its path."""

    exit_code = 78

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class BundleError(InspectError):
    """An engine bundle that is incomplete, altered, untrusted or made for another version."""

    exit_code = 78


class WireError(InspectError):
    """A message that breaks the wire protocol."""


class FrameError(InspectError):
    """A frame of a known part whose payload cannot be made into an image."""
