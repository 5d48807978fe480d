"""One browser's WebSocket: the state as JSON at most ten times a second, pictures as fast as the browser shows them.

Down: text is `Live.facts`; binary is a picture: u32 length (little endian) of a JSON {camera, header, parts: [[name,
bytes], ...]}, then it, then the parts. Up: {"shown": camera}, which asks for that camera's next picture.
"""

from __future__ import annotations

import asyncio
import json
import struct
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect

from adapters.dashboard.gate import Sessions, is_own_origin
from adapters.dashboard.live import Live, Picture

MOST_WATCHERS = 32
MOST_MESSAGE_BYTES = 4096
NOT_LOGGED_IN, TOO_MANY, NOT_OUR_WORDS = 4401, 1013, 1008
_LEAST_S, _MOST_S = 0.1, 0.25  # between two states: not more often, and silence is told as soon
_REJECTS_AT_FIRST = 20


async def watch(websocket: WebSocket, live: Live, sessions: Sessions) -> None:
    """Serve one browser until it goes or its session ends."""
    if not is_own_origin(websocket):
        await websocket.close()  # before it is accepted: HTTP 403
        return
    await websocket.accept()
    if sessions.of(websocket) is None or len(live.watchers) >= MOST_WATCHERS:
        await websocket.close(TOO_MANY if sessions.of(websocket) else NOT_LOGGED_IN)
        return
    news = asyncio.Event()
    live.watchers.add(news)
    wanted = set(live.cameras)
    reader = asyncio.create_task(_read(websocket, wanted, news))
    try:
        await _tell(websocket, live, sessions, wanted, reader, news)
    except WebSocketDisconnect:
        pass
    finally:
        live.watchers.discard(news)
        reader.cancel()
        with suppress(asyncio.CancelledError):
            await reader


async def _tell(  # noqa: PLR0917 - all that one browser's state is made of
    websocket: WebSocket,
    live: Live,
    sessions: Sessions,
    wanted: set[str],
    reader: asyncio.Task[bool],
    news: asyncio.Event,
) -> None:
    told = live.newest_reject - _REJECTS_AT_FIRST
    shown: dict[str, int] = {}
    fresh = True  # the first state of this connection: what was listed before it is told again
    while not reader.done():
        if sessions.of(websocket) is None:  # logged out elsewhere, taken out of the file, or simply too old
            await websocket.close(NOT_LOGGED_IN)
            return
        news.clear()
        facts, told = {**live.facts(told), "fresh": fresh}, live.newest_reject
        fresh = False
        await websocket.send_text(json.dumps(facts))
        for name in sorted(wanted):
            picture = live.cameras[name].picture
            if picture is not None and picture.number != shown.get(name):
                shown[name] = picture.number
                wanted.discard(name)
                await websocket.send_bytes(pack(name, picture))
        await asyncio.sleep(_LEAST_S)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(news.wait(), _MOST_S - _LEAST_S)
    if not reader.result():
        await websocket.close(NOT_OUR_WORDS)


async def _read(websocket: WebSocket, wanted: set[str], news: asyncio.Event) -> bool:
    """What the browser has shown. Ends when it has gone (True), or says what is none of our words (False)."""
    known = set(wanted)
    while True:
        try:
            message = json.loads(await websocket.receive_text())
        except WebSocketDisconnect:
            return True
        except (ValueError, KeyError, RecursionError):
            return False
        name = message.get("shown") if isinstance(message, dict) else None
        if not isinstance(name, str) or name not in known:
            return False
        wanted.add(name)
        news.set()


def pack(camera: str, picture: Picture) -> bytes:
    parts = [[name, len(data)] for name, data in picture.parts.items()]
    header = json.dumps({"camera": camera, "header": picture.header, "parts": parts}).encode()
    return b"".join([struct.pack("<I", len(header)), header, *picture.parts.values()])
