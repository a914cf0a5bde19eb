"""Frames on the port for bulk stdio, and the guest's end of it."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.agent.test_stdio import Program
from vmsandbox_agent import pipes
from vmsandbox_agent.bulk import ACCEPTED_TOGETHER, Bulk, Lane
from vmsandbox_agent.errors import AgentError
from vmsandbox_agent.pipes import STDOUT
from vmsandbox_agent.stdio import Accepted, BulkWanted, Data, Ended, Moved, Session
from vmsandbox_protocol import bulk, link

if TYPE_CHECKING:
    from collections.abc import Iterator

DIGITS = "0123456789abcdef" * 2
OTHER = "fedcba9876543210" * 2


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([link.MARK, link.MARK[:7], bytes(20)])), max_size=8),
    st.booleans(),
    st.lists(st.integers(0, 1000), max_size=8),
)
def test_input_comes_out_of_its_frames_however_they_are_cut(parts: list[bytes], eof: bool, places: list[int]) -> None:
    data = b"".join(parts)
    wire = b"".join(bulk.input_frames(5, 1000, data, eof=eof)) + bulk.ack(bulk.STDOUT, 6, 1 << 40)
    assert link.MARK not in wire
    unframer = bulk.Unframer()
    came = [
        (part.kind, part.stream, part.channel, part.offset, bytes(part.data), part.eof)
        for piece in cut(wire, places)
        for part in unframer.feed(memoryview(piece))
    ]
    assert came.pop() == (bulk.ACK, bulk.STDOUT, 6, 1 << 40, b"", False)
    assert b"".join(part[4] for part in came) == data
    assert [part[5] for part in came] == [*[False] * (len(came) - 1), eof][: len(came)]
    offset = 1000
    for part in came:
        assert part[:4] == (bulk.DATA, bulk.STDIN, 5, offset)
        offset += len(part[4])


BAD_HEADS = {
    "an unknown kind": (0, 3, 1, 1),
    "an unknown stream": (1, 1, 4, 0),
    "unknown flags": (1, 1, 1, 2),
    "more than a frame carries": (link.MAX_FRAME + 1, 1, 1, 0),
    "data of nothing": (0, 1, 1, 0),
    "an acknowledgement with data": (1, 2, 2, 0),
    "an acknowledgement that is an end": (0, 2, 2, 1),
}


@pytest.mark.parametrize("head", [pytest.param(value, id=key) for key, value in BAD_HEADS.items()])
def test_a_frame_that_no_honest_peer_sends_is_refused(head: tuple[int, int, int, int]) -> None:
    with pytest.raises(link.LinkError):
        list(bulk.Unframer().feed(memoryview(bulk.HEAD.pack(*head, 0, 0))))


# ---------------------------------------------------------------- the guest's end


class Host:
    """The other end of the port."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._unframer = bulk.Unframer()

    def begin(self, digits: str) -> None:
        self.sock.sendall(link.MARK + digits.encode())
        text = b""
        while not text.endswith(link.ECHO + digits.encode()):
            text += self.sock.recv(1)
        self._unframer = bulk.Unframer()

    def parts(self) -> Iterator[tuple[int, int, int, int, bytes, bool]]:
        while data := self.sock.recv(1 << 20):
            for part in self._unframer.feed(memoryview(data)):
                yield part.kind, part.stream, part.channel, part.offset, bytes(part.data), part.eof

    def output(self, channel: int, offset: int) -> bytes:
        """Output from an offset on, to its end; acknowledged as it comes."""
        data = b""
        for kind, stream, to, at, piece, eof in self.parts():
            if stream == bulk.STDERR:
                continue
            assert (kind, stream, to, at) == (bulk.DATA, STDOUT, channel, offset + len(data))
            data += piece
            self.sock.sendall(bulk.ack(STDOUT, channel, at + len(piece)))
            if eof:
                return data
        raise AssertionError("the port was closed")


@pytest.fixture
def host() -> Iterator[tuple[Bulk, Host]]:
    ours, guests = socket.socketpair()
    guests.setblocking(False)
    port = Bulk(guests.detach)
    assert port.open()
    with ours:
        ours.settimeout(20)
        yield port, Host(ours)
    assert port._port is not None
    port._port.stop()


@pytest.fixture
def program() -> Iterator[Program]:
    made = Program()
    yield made
    made.end()
    made.streams.forget()


@contextmanager
def attached(program: Program, port: Bulk, digits: str, channel: int, at: int = 0) -> Iterator[Session]:
    lane = Lane(port, digits, channel)
    session = program.streams.attach(at, 0, lane)
    with lane.joined(session):
        yield session


@contextmanager
def writing(program: Program, data: bytes) -> Iterator[None]:
    """The process writes `data` and ends."""

    def run() -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(program.stdout, view) :]
        program.end()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()


class Told:
    """What an attachment tells of, in a thread of its own."""

    def __init__(self, session: Session, *, at: int = 0) -> None:
        self.session = session
        self.at = at
        self.stdout = b""
        self.wanted = 0
        self.moved = threading.Event()
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self) -> Told:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _listen(self) -> None:
        for happening in self.session.events():
            if isinstance(happening, Data) and happening.stream == STDOUT:
                self.stdout += happening.data
                self.session.acknowledge(STDOUT, self.at + len(self.stdout))
            elif isinstance(happening, BulkWanted):
                self.wanted += 1
            elif isinstance(happening, Moved) and happening.stream == STDOUT:
                assert happening.offset == self.at + len(self.stdout)
                self.moved.set()
            elif isinstance(happening, Ended):
                self.session.finish()


def test_output_moves_when_it_is_much_and_the_host_is_there(host: tuple[Bulk, Host], program: Program) -> None:
    port, end = host
    data = os.urandom(3 * bulk.WORTH_MOVING)
    end.begin(DIGITS)
    with attached(program, port, DIGITS, 4) as session, writing(program, data), Told(session) as told:
        told.moved.wait()
        offset = len(told.stdout)
        rest = end.output(4, offset)
    assert offset >= bulk.WORTH_MOVING
    assert told.stdout + rest == data
    assert len(told.stdout) == offset


def test_output_stays_where_it_is_without_a_host_at_the_port(host: tuple[Bulk, Host], program: Program) -> None:
    port, _ = host
    data = os.urandom(3 * bulk.WORTH_MOVING)
    with attached(program, port, DIGITS, 4) as session, writing(program, data), Told(session) as told:
        pass
    assert (told.stdout, told.wanted) == (data, 1)


def test_what_was_under_way_when_the_host_went_is_asked_for_again(host: tuple[Bulk, Host], program: Program) -> None:
    port, end = host
    data = os.urandom(2 * pipes.WINDOW)
    end.begin(DIGITS)
    with writing(program, data):
        with attached(program, port, DIGITS, 1) as session, Told(session) as told:
            told.moved.wait()
            end.begin(OTHER)  # the port is full of what nobody reads
        assert session.failure is not None
        at = len(told.stdout)
        with attached(program, port, OTHER, 1, at=at) as session, Told(session, at=at) as again:
            again.moved.wait()
            rest = again.stdout + end.output(1, at + len(again.stdout))
    assert told.stdout + rest == data


def test_input_from_the_port_goes_to_the_process_and_is_accepted_there(
    host: tuple[Bulk, Host], program: Program
) -> None:
    port, end = host
    data = os.urandom(pipes.INPUT_WINDOW)
    end.begin(DIGITS)
    received = b""
    with attached(program, port, DIGITS, 9) as session:
        events = session.events()
        assert next(events) == Accepted(0)
        waiting = threading.Thread(target=lambda: list(events))
        waiting.start()
        for frame in bulk.input_frames(9, 0, data, eof=True):
            end.sock.sendall(frame)
        while more := os.read(program.stdin, 65536):
            received += more
        for kind, stream, channel, offset, _, _ in end.parts():
            assert (kind, stream, channel) == (bulk.ACK, bulk.STDIN, 9)
            if offset == len(data):
                break
        session.leave()
        waiting.join()
    assert received == data


def test_input_is_accepted_in_few_words_and_all_of_it_when_nothing_comes(
    host: tuple[Bulk, Host], program: Program
) -> None:
    port, end = host
    pieces, size = 50, 1024  # all of which a pipe takes
    end.begin(DIGITS)
    with attached(program, port, DIGITS, 9) as session:
        events = session.events()
        next(events)
        waiting = threading.Thread(target=lambda: list(events))
        waiting.start()
        data = b"".join(
            frame for number in range(pieces) for frame in bulk.input_frames(9, number * size, bytes(size), eof=False)
        )
        assert pieces * size < ACCEPTED_TOGETHER
        end.sock.sendall(data)
        words = 0
        for _, _, _, offset, _, _ in end.parts():
            words += 1
            if offset == pieces * size:
                break
        session.leave()
        waiting.join()
    assert words < pieces // 2


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(bulk.data_head(bulk.STDIN, 9, 5, 1) + b"x", id="a gap"),
        pytest.param(bulk.ack(STDOUT, 9, 1), id="an acknowledgement of what was not sent"),
        pytest.param(bulk.ack(bulk.STDIN, 9, 1), id="an acknowledgement of input"),
    ],
)
def test_a_host_that_breaks_the_rules_ends_its_attachment(
    host: tuple[Bulk, Host], program: Program, frame: bytes
) -> None:
    port, end = host
    end.begin(DIGITS)
    with attached(program, port, DIGITS, 9) as session:
        end.sock.sendall(frame)
        for _ in session.events():
            pass
        assert isinstance(session.failure, AgentError)
