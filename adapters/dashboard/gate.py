"""Who may come in and what they may ask: cookies, tokens, origins, how often one may try, headers of every page.

A cookie is signed, not stored: it names the user, the mark of their password and a token that every change must repeat.
Taking a user out of the file, or another password, ends all their sessions.
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from itsdangerous import BadData, URLSafeTimedSerializer
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.dashboard.users import ROLES, Role, User, Users

TOKEN_HEADER = "x-csrf-token"
_MOST_ADDRESSES = 10_000
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Session:
    """Somebody who is logged in. `token` is what a change must repeat in its header."""

    user: str
    role: Role
    token: str

    def may(self, role: Role) -> bool:
        """What somebody with that role may do."""
        return ROLES.index(self.role) >= ROLES.index(role)


class Sessions:
    """Gives cookies and knows them again."""

    def __init__(self, secret: bytes, users: Users, hours: float, *, secure: bool) -> None:
        self._serializer = URLSafeTimedSerializer(secret, salt="inspectd-dashboard-session")
        self._users = users
        self._seconds = int(hours * 3600)
        self._secure = secure
        # With the prefix a browser takes the cookie only over TLS, for this host and all of it.
        self.cookie = "__Host-inspectd" if secure else "inspectd"

    def give(self, response: Response, user: User) -> Session:
        session = Session(user.name, user.role, secrets.token_urlsafe(24))
        value = self._serializer.dumps({"user": user.name, "mark": user.mark, "token": session.token})
        self._set(response, str(value), self._seconds)
        return session

    def take_back(self, response: Response) -> None:
        self._set(response, "", 0)

    def _set(self, response: Response, value: str, seconds: int) -> None:
        response.set_cookie(
            self.cookie, value, max_age=seconds, path="/", secure=self._secure, httponly=True, samesite="strict"
        )

    def of(self, connection: HTTPConnection) -> Session | None:
        """Whose request this is; None where the cookie is missing, old, changed, or its user's no longer."""
        try:
            fields: Any = self._serializer.loads(connection.cookies.get(self.cookie, ""), max_age=self._seconds)
        except BadData:
            return None
        user = self._users.get(str(fields.get("user")))
        if user is None or not hmac.compare_digest(user.mark, str(fields.get("mark"))):
            return None
        return Session(user.name, user.role, str(fields.get("token")))


def is_own_origin(connection: HTTPConnection) -> bool:
    """Whether the page that asks is one of ours. A browser always says where a change or a WebSocket comes from."""
    origin = connection.headers.get("origin", "")
    scheme = "https" if connection.url.scheme in ("https", "wss") else "http"
    return origin == f"{scheme}://{connection.headers.get('host', '')}"


def has_token(connection: HTTPConnection, session: Session) -> bool:
    return hmac.compare_digest(connection.headers.get(TOKEN_HEADER, ""), session.token)


class Throttle:
    """At most so many tries of one address, and of all together, in a time. Failures count; a success forgives."""

    def __init__(
        self, most: int = 5, most_of_all: int = 50, within_s: float = 60.0, clock: Callable[[], float] = monotonic
    ) -> None:
        self._most, self._most_of_all, self._within_s, self._clock = most, most_of_all, within_s, clock
        self._tries: OrderedDict[str, deque[float]] = OrderedDict()
        self._all: deque[float] = deque()

    def wait_s(self, address: str) -> float:
        """How long this address has to wait; 0 where it may try now."""
        waits = [
            tries[-most] + self._within_s - self._clock()
            for tries, most in ((self._tries.get(address, deque()), self._most), (self._all, self._most_of_all))
            if len(tries) >= most
        ]
        return max(0.0, *waits) if waits else 0.0

    def note(self, address: str) -> None:
        """A try begins: counted at once, so that many at the same moment are no way around."""
        tries = self._tries.setdefault(address, deque(maxlen=self._most))
        self._tries.move_to_end(address)
        tries.append(self._clock())
        self._all.append(self._clock())
        if len(self._all) > self._most_of_all:
            self._all.popleft()
        if len(self._tries) > _MOST_ADDRESSES:
            self._tries.popitem(last=False)

    def forgive(self, address: str) -> None:
        self._tries.pop(address, None)


class Headers:
    """Middleware: no other host, no framing, no guessing of types; nothing of the line is kept by a browser."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
