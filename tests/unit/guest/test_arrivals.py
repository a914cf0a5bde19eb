"""What is put by at the port for bulk: in order, whole, and in no more room than its bytes are worth."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from vmsandbox.guest.arrivals import Arrivals, Early
from vmsandbox.guest.attachment import OUTPUT_WINDOW
from vmsandbox_protocol.bulk import STDERR, STDIN, STDOUT


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.tuples(st.sampled_from([STDOUT, STDERR]), st.sampled_from([1, 7, 16_383, 16_384, 300_000])),
        ),
        max_size=40,
    )
)
def test_every_byte_is_received_once_and_in_order(steps: list[tuple[int, int] | None]) -> None:
    """A step puts some output of a stream by, or receives."""
    arrivals = Arrivals()
    put = {STDOUT: 0, STDERR: 0}
    taken = {STDOUT: 0, STDERR: 0}

    def receive() -> bool:
        answer = arrivals.take()
        if answer is None:
            return False
        chunk = answer.output
        assert chunk.offset == taken[chunk.stream]
        assert chunk.data
        taken[chunk.stream] += len(chunk.data)
        return True

    for step in steps:
        if step is None:
            receive()
        else:
            stream, length = step
            arrivals.put(stream, put[stream], bytes(length), eof=False)
            put[stream] += length
    while receive():
        pass
    assert taken == put
    assert not arrivals


def test_output_that_comes_byte_by_byte_takes_little_more_room_than_its_bytes() -> None:
    arrivals, early = Arrivals(), Early(STDERR)
    tracemalloc.start()
    try:
        for offset in range(OUTPUT_WINDOW // 16):
            arrivals.put(STDOUT, offset, b"x", eof=False)
            early.put(offset, b"x", eof=False)
        assert tracemalloc.get_traced_memory()[0] < OUTPUT_WINDOW // 2
    finally:
        tracemalloc.stop()


def test_streams_that_take_turns_are_put_together_as_well() -> None:
    arrivals = Arrivals()
    for offset in range(1000):
        arrivals.put(STDOUT, offset, b"x", eof=False)
        arrivals.put(STDERR, offset, b"y", eof=offset == 999)
    assert len(arrivals) == 2


def test_only_the_last_acceptance_is_told() -> None:
    arrivals = Arrivals()
    arrivals.accept(1)
    arrivals.accept(5)
    answer = arrivals.take()
    assert answer is not None
    assert (answer.accepted.stream, answer.accepted.offset) == (STDIN, 5)
    assert arrivals.take() is None


def test_an_end_without_output_is_received() -> None:
    arrivals = Arrivals()
    arrivals.put(STDOUT, 5, b"", eof=True)
    answer = arrivals.take()
    assert answer is not None
    assert (answer.output.offset, answer.output.data, answer.output.eof) == (5, b"", True)


def test_early_output_goes_on_growing_after_the_move() -> None:
    arrivals, early = Arrivals(), Early(STDOUT)
    early.put(3, b"one ", eof=False)
    arrivals.follow(early.arrivals)
    arrivals.put(STDOUT, 7, b"two", eof=True)
    answer = arrivals.take()
    assert answer is not None
    assert (answer.output.offset, answer.output.data, answer.output.eof) == (3, b"one two", True)
    assert not arrivals
