"""Hellos and frames on a port, however they are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox_protocol import link

DIGITS = b"0123456789abcdef" * 2
HELLO = link.MARK + DIGITS
#: bytes that look like parts of what the protocol uses
TRICKY = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.sampled_from([link.MARK, link.MARK[:7], link.MARK[7:], link.ECHO, HELLO, HELLO[:30], bytes(4), b"\x00\x00"]),
    ),
    max_size=12,
).map(b"".join)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def framed(data: bytes) -> bytes:
    return b"".join(link.head(b - a) + data[a:b] for a, b in link.pieces(data, 0, len(data)))


def test_the_marks_have_the_form_that_the_protocol_relies_on() -> None:
    for mark in (link.MARK, link.ECHO):
        assert len(mark) == 16
        assert min(mark) > 0x7F
    assert link.head(link.MAX_FRAME)[0] == 0


@given(TRICKY, st.lists(st.integers(0, 500), max_size=8))
def test_what_is_framed_comes_out_and_has_no_mark(data: bytes, places: list[int]) -> None:
    wire = framed(data)
    assert link.MARK not in wire
    unframer = link.Unframer()
    out = b"".join(bytes(piece) for part in cut(wire, places) for piece in unframer.feed(memoryview(part)))
    assert out == data
    assert not unframer.ended


@pytest.mark.parametrize("known", [1, 2, 3])
def test_a_head_is_not_the_beginning_of_a_mark(known: int) -> None:
    length = int.from_bytes(link.MARK[:known], "big")
    data = link.MARK[known:] + bytes(length - 16 + known)
    assert len(data) == length
    assert link.MARK in link.head(length) + data
    if length <= link.MAX_FRAME:
        assert link.MARK not in framed(data)


@given(TRICKY, TRICKY, st.lists(st.integers(0, 1000), max_size=8))
def test_a_hello_is_found_after_anything_and_however_it_is_cut(stale: bytes, data: bytes, places: list[int]) -> None:
    digits = b"fedcba9876543210" * 2
    stream = stale + link.MARK + digits + framed(data)
    finder = link.HelloFinder(link.MARK)
    unframer = None
    out = b""
    last = b""
    for part in cut(stream, places):
        found = finder.feed(memoryview(part))
        if found is not None:
            last, end = found
            unframer, out = link.Unframer(), b""
            part = part[end:]
        if unframer is not None:
            try:
                out += b"".join(bytes(piece) for piece in unframer.feed(memoryview(part)))
            except link.LinkError:
                unframer = None  # of a stale session
    assert last == digits
    assert out == data


@given(TRICKY)
def test_there_is_no_hello_without_one(data: bytes) -> None:
    if link.MARK not in data:
        finder = link.HelloFinder(link.MARK)
        assert finder.feed(memoryview(data)) is None


def test_the_end_frame_ends_and_what_follows_is_not_read() -> None:
    unframer = link.Unframer()
    out = [bytes(piece) for piece in unframer.feed(memoryview(link.head(2) + b"ab" + link.END + b"junk"))]
    assert out == [b"ab"]
    assert unframer.ended


def test_a_frame_that_is_too_long_is_refused() -> None:
    unframer = link.Unframer()
    with pytest.raises(link.LinkError):
        [*unframer.feed(memoryview(link.head(link.MAX_FRAME + 1)))]


def test_long_data_is_cut_into_frames() -> None:
    assert [*link.pieces(bytes(link.MAX_FRAME + 1), 0, link.MAX_FRAME + 1)] == [
        (0, link.MAX_FRAME),
        (link.MAX_FRAME, link.MAX_FRAME + 1),
    ]
