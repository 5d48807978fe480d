"""The routes: pages, questions about the books, and the changes that an operator, or a reviewer, may make.

Every answer but the login page and the code needs a session; a change also needs the role for it, our own origin and
the session's token. What may take time runs on a thread, two at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from adapters.dashboard.asking import (
    RefusedError,
    parse_number,
    part_key,
    place_in_list,
    read_body,
    tell_error,
    tell_refusal,
)
from adapters.dashboard.books import REASONS, Books, GoneError, Wanted
from adapters.dashboard.engines import calibration_scores, histogram, list_engines, read_manifest
from adapters.dashboard.gate import Headers, Session, Sessions, Throttle, has_token, is_own_origin
from adapters.dashboard.live import Live, listen, watch_status
from adapters.dashboard.reviewing import Reviewing
from adapters.dashboard.settings import Place
from adapters.dashboard.users import Role, Users, load_secret
from adapters.dashboard.watchers import watch
from daemon.bundle import current_bundle
from daemon.errors import InspectError
from daemon.line.control import MOST_SHADOWED, ask
from daemon.shelf import parse_engine

log = logging.getLogger("inspectd.dashboard")

STATIC = Path(__file__).parent / "static"
_SWAP_MS = 600_000
_AT_ONCE = 2  # threads that read the books: the cores belong to the line
_MOST_SCORES = 2000
_DAY_S = 86_400
_PERIODS_S = {"hour": 3600, "shift": 8 * 3600, "day": _DAY_S}
_T = TypeVar("_T")
_Handler = Callable[[Request, Session], Awaitable[Response]]


class Dashboard:
    """One per process. `app` is what the server runs."""

    def __init__(self, place: Place) -> None:
        config, settings = place.config, place.settings
        self._place = place
        self.live = Live(
            config.line, {name: camera.product for name, camera in config.cameras.items()}, config.permits.heartbeat_ms
        )
        self._books = Books(config.ledger.dir, config.recorder.dir if config.recorder else None)
        self._users = Users(settings.users)
        self._sessions = Sessions(
            load_secret(settings.secret), self._users, settings.session_hours, secure=settings.tls is not None
        )
        self.throttle = Throttle()
        self._reviewing = Reviewing(place, self._read, lambda: self.live.is_heard)
        self._readers: anyio.CapacityLimiter | None = None
        self.app = Starlette(
            routes=self._routes(),
            middleware=[Middleware(Headers)],
            lifespan=self._lifespan,
            exception_handlers={RefusedError: tell_refusal, InspectError: tell_error},
        )

    def _routes(self) -> list[Any]:
        questions = {
            "session": self._session, "rejects": self._rejects, "part": self._part, "picture": self._picture,
            "scores": self._scores, "engines": self._engines, "books": self._figures,
            "review": self._reviewing.page, "look": self._reviewing.look,
        }  # fmt: skip
        return [
            Route("/", self._page),
            Route("/review", self._review_page),
            Route("/login", self._login_page),
            Route("/api/login", self._login, methods=["POST"]),
            Route("/api/logout", self._change(self._logout, "viewer"), methods=["POST"]),
            Route("/api/activate", self._change(self._activate), methods=["POST"]),
            Route("/api/rollback", self._change(self._roll_back), methods=["POST"]),
            Route("/api/mark", self._change(self._reviewing.mark, "reviewer"), methods=["POST"]),
            Route("/api/unmark", self._change(self._reviewing.take_back, "reviewer"), methods=["POST"]),
            *(Route(f"/api/{name}", self._question(handler)) for name, handler in questions.items()),
            WebSocketRoute("/live", lambda websocket: watch(websocket, self.live, self._sessions)),
            Mount("/static", _Code(directory=STATIC)),
        ]

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self._readers = anyio.CapacityLimiter(_AT_ONCE)
        tasks = [
            asyncio.create_task(work(self.live, self._place), name=work.__name__) for work in (listen, watch_status)
        ]
        for task in tasks:
            task.add_done_callback(_tell_end)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _read(self, question: Callable[[], _T]) -> _T:
        return await anyio.to_thread.run_sync(question, limiter=self._readers)

    # -- who asks ----------------------------------------------------------------------------------

    def _question(self, handler: _Handler) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await handler(request, self._who(request))

        return answer

    def _change(self, handler: _Handler, role: Role = "operator") -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            session = self._who(request)
            if not is_own_origin(request) or not has_token(request, session):
                log.warning("a change without our origin and token was refused user=%s", session.user)
                raise RefusedError(403, "this request does not come from our own page; load the page again")
            if not session.may(role):
                raise RefusedError(403, f"{session.user} is a {session.role}; this needs the role {role}")
            return await handler(request, session)

        return answer

    def _who(self, request: Request) -> Session:
        session = self._sessions.of(request)
        if session is None:
            raise RefusedError(401, "log in first")
        return session

    async def _login(self, request: Request) -> Response:
        if not is_own_origin(request):
            raise RefusedError(403, "this request does not come from our own page; load the page again")
        address = request.client.host if request.client else "?"
        fields = await read_body(request)
        name, password = fields.get("name"), fields.get("password")
        if not isinstance(name, str) or not isinstance(password, str):
            raise RefusedError(400, "wanted a name and a password")
        if wait_s := self.throttle.wait_s(address):
            text = f"too many tries; wait {wait_s:.0f} s"
            raise RefusedError(429, text, **{"Retry-After": str(int(wait_s) + 1)})
        self.throttle.note(address)
        user = await self._read(lambda: self._users.check(name, password))
        if user is None:
            log.warning("login refused user=%r address=%s", name[:64], address)
            raise RefusedError(401, "name or password is wrong")
        self.throttle.forgive(address)
        log.info("login user=%s role=%s address=%s", user.name, user.role, address)
        response = JSONResponse({"ok": True})
        self._sessions.give(response, user)
        return response

    async def _logout(self, _request: Request, session: Session) -> Response:
        log.info("logout user=%s", session.user)
        response = JSONResponse({"ok": True})
        self._sessions.take_back(response)
        return response

    # -- pages and questions -----------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        known = self._sessions.of(request)
        return FileResponse(STATIC / "index.html") if known else RedirectResponse("/login", 303)

    async def _review_page(self, _request: Request) -> Response:
        return RedirectResponse("/#/review", 303)  # an address to give away: the views are behind the #

    async def _login_page(self, _request: Request) -> Response:
        return FileResponse(STATIC / "login.html")

    async def _session(self, _request: Request, session: Session) -> Response:
        cameras = {name: camera.product for name, camera in self._place.config.cameras.items()}
        results, permits = self._place.config.results, self._place.config.permits
        return JSONResponse(
            {
                "user": session.user, "role": session.role, "token": session.token,
                "mayChange": session.may("operator"), "mayMark": session.may("reviewer"),
                "line": self.live.line, "cameras": cameras, "reasons": REASONS, "leaseMs": permits.lease_ms,
                "sends": {"heatmap": results.heatmap, "mask": results.mask, "frameEveryMs": results.frame_every_ms},
            }
        )  # fmt: skip

    async def _rejects(self, request: Request, _session: Session) -> Response:
        asked = request.query_params
        before = asked.get("before")
        wanted = Wanted(
            camera=asked.get("camera") or None,
            reason=asked.get("reason") or None,
            from_ns=parse_number(asked.get("from")),
            to_ns=parse_number(asked.get("to")),
            before=place_in_list(before) if before else None,
            most=parse_number(asked.get("most")) or Wanted.most,
        )
        rows = await self._read(lambda: self._books.rejects(wanted))
        last = rows[-1] if len(rows) >= wanted.most else None
        follows = json.dumps([last[key] for key in ("decided_ns", "camera", "epoch", "seq")]) if last else None
        return JSONResponse({"rows": rows, "before": follows})

    async def _part(self, request: Request, _session: Session) -> Response:
        return JSONResponse(await self._read(partial(self._books.part, *part_key(request))))

    async def _picture(self, request: Request, _session: Session) -> Response:
        name = request.query_params.get("name", "")
        if name not in ("frame", "mask", "heatmap"):
            raise RefusedError(400, f"found picture {name[:40]!r}, wanted frame, mask or heatmap")
        kind, data = await self._read(partial(self._books.picture, *part_key(request), name))
        return Response(data, media_type=kind, headers={"cache-control": "private, max-age=3600"})

    async def _scores(self, request: Request, _session: Session) -> Response:
        name = request.query_params.get("camera", "")
        camera = self._place.config.cameras.get(name)
        if camera is None:
            raise RefusedError(404, f"no camera {name[:64]!r} is configured")
        return JSONResponse(await self._read(lambda: self._histogram(name, camera.product)))

    def _histogram(self, camera: str, product: str) -> dict[str, Any]:
        config = self._place.config
        engine = config.engine_names()[product]
        folder = current_bundle(config.engines.dir, engine)
        try:
            manifest, digest = read_manifest(folder)
            calibration = calibration_scores(folder, manifest, product)
        except (OSError, ValueError) as error:
            raise GoneError(f"the scores of {product} cannot be shown: {error}") from error
        since_ns = time.time_ns() - _DAY_S * 10**9
        try:
            scores = self._books.scores(camera, digest, since_ns, _MOST_SCORES)
        except GoneError:
            scores = []  # no part was judged yet
        known = {"camera": camera, "engine": f"{engine}/{manifest.version}"}
        return {**known, **histogram(scores, calibration, manifest.products[product].limit)}

    async def _engines(self, _request: Request, _session: Session) -> Response:
        names = sorted(set(self._place.config.engine_names().values()))
        rows = await self._read(lambda: list_engines(self._place.config.engines.dir, names))
        return JSONResponse({"engines": rows})

    async def _figures(self, request: Request, _session: Session) -> Response:
        period = request.query_params.get("period", "hour")
        if period not in _PERIODS_S:
            raise RefusedError(400, f"found period {period[:40]!r}, wanted one of {', '.join(_PERIODS_S)}")
        from_ns = time.time_ns() - _PERIODS_S[period] * 10**9

        def figures() -> dict[str, Any]:
            return {"counts": self._books.counts(from_ns), "events": self._books.events(50)}

        return JSONResponse(await self._read(figures))

    # -- changes -----------------------------------------------------------------------------------

    async def _activate(self, request: Request, session: Session) -> Response:
        fields = await read_body(request)
        engine, shadow = fields.get("engine"), fields.get("shadow", 0)
        if not isinstance(engine, str) or type(shadow) is not int or not 0 <= shadow <= MOST_SHADOWED:
            raise RefusedError(400, "wanted an engine NAME/VERSION and a number of frames to compare")
        parse_engine(engine)
        return await self._order(session, "activate", engine=engine, shadow=shadow)

    async def _roll_back(self, request: Request, session: Session) -> Response:
        engine = (await read_body(request)).get("engine")
        if not isinstance(engine, str):
            raise RefusedError(400, "wanted an engine NAME")
        return await self._order(session, "rollback", engine=engine)

    async def _order(self, session: Session, command: str, **fields: Any) -> Response:
        """Ask the daemon, which writes it into the books with the user's name, and wait until it has happened."""
        if not self.live.is_heard:
            raise RefusedError(503, "no daemon: nothing was changed")
        log.info("%s user=%s %s", command, session.user, fields)
        order = partial(ask, self._place.config.control.bind, command, _SWAP_MS, user=session.user, **fields)
        return JSONResponse(await anyio.to_thread.run_sync(order))


class _Code(StaticFiles):
    """Page code and style: a browser asks each time whether they have changed."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["cache-control"] = "no-cache"
        return response

    async def get_response(self, path: str, scope: Scope) -> Response:
        if path.endswith(".html"):  # pages are routes, with their own rules
            return Response(status_code=404)
        return await super().get_response(path, scope)


def _tell_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical(
            "%s ended: the page shows no daemon until this is started again", task.get_name(), exc_info=task.exception()
        )
