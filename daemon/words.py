"""What the words mean that results, answers, metrics and exit codes carry: for people, in docs/reference.md.

A test holds that no word is missing.
"""

from __future__ import annotations

from daemon.types import Reason, Refusal

REASONS: dict[Reason, str] = {
    Reason.DEFECT: "the score is at or above the engine's limit",
    Reason.BAD_FRAME: "the payload does not fit its header, is too large or cannot be decoded: the log says which",
    Reason.NOT_READY: "the frame names a product that no loaded engine knows",
    Reason.OVERLOAD: "frames beyond `queue_mb` (mode every-frame): too many for this machine",
    Reason.SUPERSEDED: "a newer frame overtook it (mode latest)",
    Reason.MISSING: "its number was skipped, or the daemon ended before its verdict",
    Reason.ENGINE_ERROR: "inference failed, hung or gave no number: the log has the error",
    Reason.LATE: "no verdict by `deadline_ms`; the score follows on late/<line>/<camera>",
    Reason.SETUP: "the camera's set-up has changed and its `on_setup_change` is reject",
}
REFUSALS: dict[Refusal, str] = {
    Refusal.BAD_HEADER: "the header cannot be read, or names no camera of this line",
    Refusal.DUPLICATE: "the number was there already, or belongs to an epoch that was replaced",
    Refusal.FORBIDDEN: "the key may not speak for this camera: `inspectd doctor --peer FILE`",
    Refusal.PAUSED: "somebody has paused the daemon: `inspectd resume`",
    Refusal.DRAINING: "the daemon is about to end",
}
DENIALS: dict[str, str] = {
    "NO_KEY": "at the handshake: it speaks no CURVE",
    "WRONG_SERVER_KEY": "at the handshake: its file has another daemon's public key",
    "UNKNOWN_KEY": "its key is not in peers.yaml, which is read at the start",
    "BAD_HANDSHAKE": "the handshake broke off",
    "WRONG_ROLE": "its key has not the role for this socket",
    "FOREIGN_TOPIC": "its key may not speak or hear on this topic",
    "NO_SUBSCRIPTION": "it sends something to the results socket that is no subscription",
    "UNSURE_SENDER": "a subscription right behind such a message; it must subscribe again",
}
EXIT_CODES: dict[int, str] = {
    0: "done; `run`: drained",
    1: "`simulate`: what was sent and what came back differ",
    64: "called in a way that cannot be, or refused by the daemon",
    65: "input data that cannot be used: images, folders, journals; `ledger --verify`: the books are wrong",
    69: "the processor, the GPU or its library cannot do it",
    70: "internal fault, hung inference, or a daemon that does not answer",
    78: "configuration, keys or engine are wrong; `doctor`: something FAILs",
    130: "interrupted",
}
