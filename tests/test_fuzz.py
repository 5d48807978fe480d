"""The fuzzers' targets by hypothesis, so that they cannot rot; the search itself is `make fuzz`."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.errors import WireError
from tests.fuzz.targets import CUT, TARGETS, Target

NAMES = pytest.mark.parametrize("name", TARGETS)
EDITS = st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 8), st.binary(max_size=8)), max_size=5)


def edited(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """A seed with some of its bytes replaced by others, or by none."""
    for place, length, replacement in edits:
        at = place % (len(seed) + 1)
        seed = seed[:at] + replacement + seed[at + length :]
    return seed


@NAMES
def test_every_seed_is_taken(name):
    """But for those that are there to be refused: a 16-bit picture said to be an 8-bit mosaic, a damaged journal."""
    refused = {"image": 2, "permit": 1, "books": 1}
    seeds = TARGETS[name].seeds()
    assert sum(not TARGETS[name](seed) for seed in seeds) == refused.get(name, 0)


@NAMES
def test_nothing_but_documented_errors_leaves_for_edited_seeds(name):
    target = TARGETS[name]

    @settings(
        max_examples=200, deadline=None, derandomize=True
    )  # `make fuzz` searches; the suite says the same each day
    @given(seed=st.sampled_from(target.seeds()), edits=EDITS, words=st.lists(st.sampled_from([*target.words, "\n"])))
    def holds(seed, edits, words):
        pieces = [(place, length, data) for (place, length, data) in edits]
        pieces += [(37 * number, 0, word.encode()) for number, word in enumerate(words, 1)]
        target(edited(seed, pieces))

    holds()


@NAMES
def test_nothing_but_documented_errors_leaves_for_any_bytes(name):
    target = TARGETS[name]

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(data=st.binary(max_size=target.most_bytes))
    def holds(data):
        target(data)

    holds()


@NAMES
def test_seed_cut_anywhere_or_with_a_part_too_many_is_no_crash(name):
    target = TARGETS[name]
    seeds = target.seeds()[:3]
    for seed, step in product(seeds, range(40)):
        target(seed[: len(seed) * step // 40])
    for seed in seeds:
        target(seed + CUT + seed)


def test_target_that_lets_another_error_out_is_a_crash():
    def careless(data: bytes) -> bool:
        if b"x" in data:
            raise KeyError("x")
        raise WireError("refused")

    target = Target("careless", careless, (WireError,), lambda: [b""])
    assert not target(b"y")
    with pytest.raises(KeyError):
        target(b"x")


def test_refusal_that_says_nothing_is_a_crash():
    def mute(data: bytes) -> bool:
        raise WireError("")

    with pytest.raises(AssertionError, match="says why"):
        Target("mute", mute, (WireError,), lambda: [b""])(b"")
