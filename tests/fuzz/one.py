"""One target under atheris, in a process of its own: `python -m tests.fuzz.one NAME FOLDER [libFuzzer's options]`.

FOLDER takes the seeds, the words and whatever libFuzzer finds worth keeping.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import atheris

os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
with atheris.instrument_imports(include=["daemon"]):
    from tests.fuzz.targets import PLACE, TARGETS


def escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


def main() -> None:
    logging.disable()  # a damaged journal is told each time, and there are a million
    name, place, *options = sys.argv[1:]
    target, folder = TARGETS[name], Path(place)
    PLACE[0] = folder
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = folder / "words.txt"  # libFuzzer takes no empty one
    words.write_text("".join(f'"{escaped(word)}"\n' for word in target.words))
    dictionary = [f"-dict={words}"] if target.words else []
    atheris.Setup([sys.argv[0], *dictionary, f"-max_len={target.most_bytes}", *options, str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
