from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox import wire

FRAMES = st.lists(
    st.one_of(
        st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
        st.tuples(
            st.sampled_from([wire.STDIN, wire.STDOUT, wire.STDERR]),
            st.integers(min_value=0, max_value=2**64 - 1),
            st.binary(max_size=200),
        ),
    ),
    max_size=6,
)


def encoded(frame: object) -> bytes:
    if isinstance(frame, dict):
        return wire.encode_message(frame)
    assert isinstance(frame, tuple)
    return wire.encode_data(*frame)


@given(frames=FRAMES, cut=st.integers(min_value=1, max_value=50))
def test_frames_come_out_as_they_went_in_however_the_bytes_are_cut(frames: list[object], cut: int) -> None:
    stream = b"".join(map(encoded, frames))
    decoder = wire.Decoder()
    got = [frame for start in range(0, len(stream), cut) for frame in decoder.feed(stream[start : start + cut])]
    decoded = [f.message() if f.kind == wire.MESSAGE else (f.kind, f.offset, f.payload) for f in got]
    assert decoded == frames


@pytest.mark.parametrize(
    "data",
    [
        wire.HEAD.pack(wire.MAX_PAYLOAD + 1, wire.MESSAGE),
        wire.HEAD.pack(3, wire.STDOUT) + b"abc",
        wire.HEAD.pack(8, 77) + bytes(8),
    ],
    ids=["too-long", "no-offset", "unknown-kind"],
)
def test_a_broken_peer_is_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.Decoder().feed(data)


@pytest.mark.parametrize("payload", [b"[1]", b"{", b"\xff"])
def test_a_message_has_to_be_an_object(payload: bytes) -> None:
    frame = wire.Decoder().feed(wire.HEAD.pack(len(payload), wire.MESSAGE) + payload)[0]
    with pytest.raises(wire.WireError):
        frame.message()


def test_a_connection_that_ends_within_a_frame_is_an_error_and_between_frames_the_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(wire.encode_message({"a": 1}) + wire.encode_message({"b": 2})[:-2])
        theirs.shutdown(socket.SHUT_WR)
        first = wire.receive(ours)
        assert first is not None
        assert first.message() == {"a": 1}
        with pytest.raises(wire.WireError):
            wire.receive(ours)
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert wire.receive(ours) is None
