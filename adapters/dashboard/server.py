"""The web server of the dashboard: one bound socket, TLS where config names it, READY for systemd when it serves."""

from __future__ import annotations

import logging
import os
import signal
import socket
import ssl
from contextlib import suppress
from typing import Any

import uvicorn

from adapters.dashboard.settings import Place
from adapters.dashboard.watchers import MOST_MESSAGE_BYTES
from daemon.errors import ConfigError
from daemon.line.notify import notify

log = logging.getLogger("inspectd.dashboard")

_STOP_S = 3
_NICE = 10  # the line comes first, also where no unit says so
_MOST_CONNECTIONS = 128


class _Server(uvicorn.Server):
    """Tells systemd when browsers are served, not when the process is there."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            notify("READY=1", "STATUS=serving")


def serve(app: Any, place: Place) -> None:
    """Until SIGTERM or SIGINT. Raises ConfigError where the address or the certificate cannot be had."""
    settings = place.settings
    tls = settings.tls
    if tls is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError("tls", [f"{tls.certificate} and {tls.key} cannot be used: {error}"]) from error
    if settings.is_open:
        log.warning("INSECURE bind=%s without TLS: passwords and pictures can be read on their way", settings.bind)
    listening = _bind(settings.address)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        proxy_headers=False,  # anybody could claim any address, and so try as many passwords as they like
        server_header=False,
        ws_max_size=MOST_MESSAGE_BYTES,
        ws_per_message_deflate=False,  # pictures are compressed already
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_STOP_S,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    log.info("serving %s://%s line=%s", "https" if tls else "http", settings.bind, place.config.line)
    if os.getpriority(os.PRIO_PROCESS, 0) < _NICE:
        with suppress(PermissionError):  # under a unit that forbids it: the unit has set its own
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    # uvicorn stops at either and then raises it again, for whoever waits for it: here that is nobody, and 0 is the end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        _Server(config).run(sockets=[listening])
    finally:
        listening.close()


def _bind(address: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        return socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        raise ConfigError("bind", [f"{address[0]}:{address[1]} cannot be bound: {error.strerror}"]) from error
