"""Streams: offsets, acknowledgement, replay, back-pressure, displacement."""

from __future__ import annotations

import os
import pty
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from vmsandbox_agent import pipes
from vmsandbox_agent.errors import InvalidArgumentError, UnavailableError
from vmsandbox_agent.pipes import STDERR, STDOUT
from vmsandbox_agent.stdio import Accepted, Data, Ended, InputClosed, Session, Stdio

if TYPE_CHECKING:
    from collections.abc import Iterator


class Program:
    """The process' ends of its pipes, and the streams made of the others."""

    def __init__(self) -> None:
        self.stdin, stdin = os.pipe()
        stdout, self.stdout = os.pipe()
        stderr, self.stderr = os.pipe()
        self.streams = Stdio(stdin=stdin, stdout=stdout, stderr=stderr)

    def write(self, data: bytes) -> None:
        os.write(self.stdout, data)

    def end(self) -> None:
        for fd in (self.stdin, self.stdout, self.stderr):
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)
        self.stdin = self.stdout = self.stderr = -1
        self.streams.process_ended()


@pytest.fixture
def program() -> Iterator[Program]:
    made = Program()
    yield made
    made.end()
    made.streams.forget()


@contextmanager
def attached(program: Program, stdout: int = 0, stderr: int = 0) -> Iterator[tuple[Session, Iterator[object]]]:
    session = program.streams.attach(stdout, stderr)
    events = session.events()
    try:
        yield session, events
    finally:
        session.leave()
        events.close()  # type: ignore[attr-defined]


def collected(events: Iterator[object], stream: int = STDOUT) -> bytes:
    """What a stream says until everything has ended."""
    data = b""
    for happening in events:
        if isinstance(happening, Data) and happening.stream == stream:
            assert happening.offset == len(data) or not data
            data += happening.data
        if isinstance(happening, Ended):
            break
    return data


def test_the_first_thing_said_is_what_input_was_accepted(program: Program) -> None:
    with attached(program) as (_, events):
        assert next(events) == Accepted(0)


def test_output_has_offsets_and_ends_before_the_exit(program: Program) -> None:
    with attached(program) as (_, events):
        next(events)
        program.write(b"one")
        assert next(events) == Data(STDOUT, 0, b"one", False)
        program.write(b"two")
        assert next(events) == Data(STDOUT, 3, b"two", False)
        program.end()
        assert [next(events), next(events), next(events)] == [
            Data(STDOUT, 6, b"", True),
            Data(STDERR, 0, b"", True),
            Ended(),
        ]


def test_what_was_not_acknowledged_is_said_again(program: Program) -> None:
    program.write(b"0123456789")
    with attached(program) as (session, events):
        next(events)
        assert next(events) == Data(STDOUT, 0, b"0123456789", False)
        session.acknowledge(STDOUT, 4)
    program.write(b"abc")
    with attached(program, stdout=6) as (_, events):
        next(events)
        assert next(events) == Data(STDOUT, 6, b"6789", False)
        assert next(events) == Data(STDOUT, 10, b"abc", False)


@pytest.mark.parametrize("offset", [3, 11])
def test_bytes_that_are_not_kept_cannot_be_asked_for(program: Program, offset: int) -> None:
    program.write(b"0123456789")
    with attached(program) as (session, events):
        next(events)
        next(events)
        session.acknowledge(STDOUT, 4)
    with pytest.raises(InvalidArgumentError, match="from 4 to 10"):
        program.streams.attach(offset, 0)


def test_more_than_there_is_cannot_be_acknowledged(program: Program) -> None:
    with attached(program) as (session, events):
        next(events)
        with pytest.raises(InvalidArgumentError):
            session.acknowledge(STDOUT, 1)
        with pytest.raises(InvalidArgumentError):
            session.acknowledge(1, 0)


def test_an_unread_stream_stops_at_its_window_and_goes_on_when_acknowledged(program: Program) -> None:
    total = 3 * pipes.WINDOW
    written = threading.Event()

    def write() -> None:
        data = memoryview(bytes(range(256)) * (total // 256))
        while data:
            data = data[os.write(program.stdout, data) :]
        written.set()
        program.end()

    writer = threading.Thread(target=write)
    writer.start()
    received = 0
    with attached(program) as (session, events):
        next(events)
        for happening in events:
            if isinstance(happening, Data) and happening.stream == STDOUT:
                assert (
                    happening.data == (bytes(range(256)) * 4096)[received % 256 : received % 256 + len(happening.data)]
                )
                received += len(happening.data)
                assert len(program.streams.outputs[STDOUT].kept) <= pipes.WINDOW
                if received > pipes.WINDOW - pipes.CHUNK:
                    # Nothing more comes without this.
                    session.acknowledge(STDOUT, received)
            if isinstance(happening, Ended):
                break
    writer.join()
    assert written.is_set()
    assert received == total


def test_a_program_that_writes_much_and_ends_loses_nothing_before_anybody_attaches(program: Program) -> None:
    os.set_blocking(program.stdout, True)
    program.write(b"x" * 60_000)
    os.write(program.stderr, b"oops")
    program.end()
    with attached(program) as (_, events):
        assert collected(events) == b"x" * 60_000
    with attached(program) as (_, events):
        assert collected(events, STDERR) == b"oops"


def test_output_ends_with_the_process_although_another_holds_its_pipe(program: Program) -> None:
    holder = os.dup(program.stdout)
    program.write(b"last words")
    program.end()
    try:
        with attached(program) as (_, events):
            assert collected(events) == b"last words"
    finally:
        os.close(holder)


def test_input_is_accepted_in_order_and_its_end_closes_the_pipe(program: Program) -> None:
    with attached(program) as (session, events):
        next(events)
        session.receive(0, b"first ", eof=False)
        assert next(events) == Accepted(6)
        session.receive(3, b"st second", eof=True)
        assert next(events) == Accepted(12)
        assert os.read(program.stdin, 100) == b"first second"
        program.write(b"done")
        assert next(events) == Data(STDOUT, 0, b"done", False)
        assert os.read(program.stdin, 100) == b""


def test_input_with_a_gap_or_beyond_the_window_is_refused(program: Program) -> None:
    with attached(program) as (session, events):
        next(events)
        with pytest.raises(InvalidArgumentError, match="follows"):
            session.receive(1, b"x", eof=False)
        with pytest.raises(InvalidArgumentError, match="more than"):
            session.receive(0, bytes(pipes.INPUT_WINDOW + 1), eof=False)


def test_input_that_does_not_fit_waits_while_output_flows(program: Program) -> None:
    data = os.urandom(pipes.INPUT_WINDOW)
    with attached(program) as (session, events):
        next(events)
        session.receive(0, data, eof=True)
        accepted = next(events)
        assert isinstance(accepted, Accepted)
        assert 0 < accepted.offset < len(data)
        program.write(b"still here")
        assert next(events) == Data(STDOUT, 0, b"still here", False)
        received = b""

        def read() -> None:
            nonlocal received
            while piece := os.read(program.stdin, 65536):
                received += piece

        reader = threading.Thread(target=read)
        reader.start()
        while accepted != Accepted(len(data)):
            accepted = next(events)
        program.write(b".")
        next(events)
        reader.join()
        assert received == data


def test_input_that_nobody_reads_is_reported_once(program: Program) -> None:
    with attached(program) as (session, events):
        next(events)
        os.close(program.stdin)
        program.stdin = -1
        assert next(events) == InputClosed()
        session.receive(0, b"for nobody", eof=False)
        program.write(b"x")
        assert next(events) == Data(STDOUT, 0, b"x", False)


def test_a_new_session_sends_again_what_was_not_accepted(program: Program) -> None:
    data = os.urandom(pipes.INPUT_WINDOW)
    with attached(program) as (session, events):
        next(events)
        session.receive(0, data, eof=True)
        accepted = next(events)
    with attached(program) as (session, events):
        assert next(events) == accepted
        assert isinstance(accepted, Accepted)
        received = os.read(program.stdin, accepted.offset)
        session.receive(accepted.offset, data[accepted.offset : accepted.offset + 10], eof=True)
        assert next(events) == Accepted(accepted.offset + 10)
        program.write(b"x")
        next(events)
        while piece := os.read(program.stdin, 65536):
            received += piece
        assert received == data[: accepted.offset + 10]


def test_a_new_session_ends_the_one_before_it(program: Program) -> None:
    with attached(program) as (first, events):
        next(events)
        ended: list[object] = []
        waiting = threading.Thread(target=lambda: ended.extend(events))
        waiting.start()
        with attached(program) as (_, others):
            next(others)
            waiting.join()
            assert ended == []
            assert first.displaced
            program.write(b"for the second")
            assert next(others) == Data(STDOUT, 0, b"for the second", False)


def test_after_the_exit_acknowledgements_are_still_taken(program: Program) -> None:
    program.write(b"text")
    program.end()
    with attached(program) as (session, events):
        for happening in events:
            if isinstance(happening, Ended):
                session.acknowledge(STDOUT, 4)
        assert not session.displaced
    assert not program.streams.outputs[STDOUT].kept


def test_a_host_that_says_its_last_is_not_waited_for(program: Program) -> None:
    program.write(b"text")
    program.end()
    with attached(program) as (session, events):
        session.finish()
        assert [*events][-1] == Ended()


def test_the_exit_is_repeated_to_everybody(program: Program) -> None:
    program.end()
    for _ in range(3):
        with attached(program) as (_, events):
            assert [*events][-1] == Ended()


def test_output_that_nobody_wants_ends_and_the_program_notices(program: Program) -> None:
    program.write(b"0123")
    with attached(program) as (session, events):
        next(events)
        next(events)
        session.abandon(STDOUT)
        assert next(events) == Data(STDOUT, 4, b"", True)
    with pytest.raises(BrokenPipeError):
        program.write(b"more")
    with attached(program, stdout=2) as (_, events):
        next(events)
        assert next(events) == Data(STDOUT, 2, b"", True)


def test_a_forgotten_process_ends_its_session_and_takes_no_other(program: Program) -> None:
    with attached(program) as (session, events):
        next(events)
        program.streams.forget()
        assert [*events] == []
        assert session.displaced
    with pytest.raises(UnavailableError):
        program.streams.attach(0, 0)


def test_a_terminal_is_one_stream_and_hears_the_end_of_input() -> None:
    master, slave = pty.openpty()
    streams = Stdio(stdin=master, stdout=master, stderr=None, terminal=True)
    session = streams.attach(0, 0)
    events = session.events()
    assert next(events) == Accepted(0)
    assert next(events) == Data(STDERR, 0, b"", True)
    streams.resize(100, 40)
    assert tuple(os.get_terminal_size(slave)) == (100, 40)
    session.receive(0, b"hi\n", eof=True)
    assert next(events) == Accepted(3)
    assert os.read(slave, 100) == b"hi\n"
    assert os.read(slave, 100) == b""
    assert next(events) == Data(STDOUT, 0, b"hi\r\n", False)
    os.write(slave, b"bye")
    os.close(slave)
    streams.process_ended()
    rest = [*_until_end(events)]
    assert b"".join(each.data for each in rest if isinstance(each, Data)) == b"bye"
    session.leave()
    streams.forget()


def _until_end(events: Iterator[object]) -> Iterator[object]:
    for happening in events:
        yield happening
        if isinstance(happening, Ended):
            return
