"""The memory of a stream: what was appended comes out, from wherever it is asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmsandbox_agent.ring import SMALL, Ring

LIMIT = 4 * SMALL
STEPS = st.lists(st.tuples(st.integers(1, LIMIT), st.integers(0, LIMIT)), max_size=30)


@given(STEPS)
def test_what_is_kept_is_what_was_appended(steps: list[tuple[int, int]]) -> None:
    ring = Ring(LIMIT)
    everything = b""
    for count, released in steps:
        for place in ring.room(count, count):
            data = bytes((len(everything) + number) % 251 for number in range(len(place)))
            place[:] = data
            everything += data
            ring.appended(len(place))
        assert len(ring) <= LIMIT
        ring.release(ring.base + released)
        middle = (ring.base + ring.end) // 2
        for offset in (ring.base, middle, ring.end):
            assert b"".join(ring.views(offset, LIMIT)) == everything[offset:]
    assert ring.end == len(everything)


def test_a_stream_that_carries_little_takes_little() -> None:
    ring = Ring(LIMIT)
    assert sum(len(place) for place in ring.room(1, LIMIT)) == SMALL


def test_what_was_let_go_of_takes_nothing() -> None:
    ring = Ring(LIMIT)
    ring.appended(len(ring.room(10, 10)[0]))
    ring.clear()
    assert (ring.base, ring.end, ring.views(10, 10)) == (10, 10, [])
