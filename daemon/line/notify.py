"""sd_notify: one datagram to systemd. Without NOTIFY_SOCKET (no systemd) nothing is sent."""

from __future__ import annotations

import os
import socket


def notify(*fields: str) -> None:
    """Send fields such as READY=1 or STATUS=...; a systemd that does not listen stops nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as datagram:
        try:
            datagram.connect(address)
            datagram.send("\n".join(fields).encode())
        except OSError:
            return


def watchdog_interval_s() -> float | None:
    """Half of what systemd allows between two signs of life; None where it does not watch."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    meant_for = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdigit() or meant_for != str(os.getpid()):
        return None
    return int(microseconds) / 2e6
