"""What reads hostile input keeps its promises for a moment's worth of it; ``make fuzz`` takes its time."""

from __future__ import annotations

import re

import pytest
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

TOKENS = re.compile(rb'"[^"\n]*"|[\w.+-]+|\s+|.', re.DOTALL)
ODD = [
    *(
        b"",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b"0",
        b"-1",
        b"1e999",
        b"NaN",
        b'""',
        b'"\\ud800"',
        b"9" * 400,
        b"[" * 20_000,
    ),
    *(
        b"\0",
        b"\xff\xfe",
        b"\r\n",
        b"\n",
        b"\xe2\x80\xae",
        b"..",
        b"/",
        b"\\",
        b":" * 300,
        b"${X}",
        b"\xf0\x9f\x98\x80",
    ),
]
BOUNDED = settings(max_examples=150, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def mutations(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A good input of which a few words, or a few bytes, are something else."""
    seed = draw(st.sampled_from(seeds))
    parts = TOKENS.findall(seed) if draw(st.booleans()) else [bytes([byte]) for byte in seed]
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.integers(0, len(parts) - 1))
        parts[where] = draw(st.sampled_from(ODD) | st.sampled_from(parts) | st.binary(max_size=4))
    return b"".join(parts)


@pytest.mark.parametrize("name", TARGETS)
def test_what_it_was_made_for(name: str) -> None:
    for seed in (b"", *TARGETS[name].seeds):
        TARGETS[name].run(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_what_it_was_not_made_for(name: str) -> None:
    @BOUNDED
    @given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | st.sampled_from(ODD))
    @example(b"\n[1]\n")
    def feed(content: bytes) -> None:
        TARGETS[name].run(content)

    feed()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_nearly_what_it_was_made_for(name: str) -> None:
    @BOUNDED
    @given(mutations(TARGETS[name].seeds))
    def feed(content: bytes) -> None:
        TARGETS[name].run(content)

    feed()
