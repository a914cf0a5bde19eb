"""A process' streams: offsets, acknowledgement, replay, back-pressure, and the way they take.

Output is read from its pipe only while somebody is attached and less than `WINDOW` bytes of it are
unacknowledged; what is read stays in memory until it is acknowledged, and is given again to whoever attaches
later and asks for it.  A process that writes faster is stopped by its full pipe.  Input that was received but does
not fit into the pipe is kept too; a host that sends more than `INPUT_WINDOW` bytes beyond what was accepted is refused,
because acknowledgements come by the same stream as input and may not wait behind it.

One thread at a time moves output: the one that iterates over `Session.events`.  A newer session makes the older one
end.  Streams that carry much take the port for bulk, where there is one (`vmsandbox_agent.bulk`), the others are told
of as events.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox_agent.errors import AgentError, InvalidArgumentError, UnavailableError
from vmsandbox_agent.pipes import CHUNK, STDERR, STDOUT, Input, Output
from vmsandbox_protocol.bulk import WORTH_MOVING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmsandbox_agent.bulk import Lane


class Data(NamedTuple):
    """Output at an offset; with `eof` nothing follows."""

    stream: int
    offset: int
    data: bytes
    eof: bool


class Accepted(NamedTuple):
    """Input below `offset` reached the process' pipe."""

    offset: int


class InputClosed(NamedTuple):
    """Nobody reads the process' input any more."""


class BulkWanted(NamedTuple):
    """An output is worth the port for bulk, if the host began a session there."""


class Moved(NamedTuple):
    """Output from this offset on takes the port for bulk."""

    stream: int
    offset: int


class Ended(NamedTuple):
    """The process ended and all of its output was given."""


class _Piece(NamedTuple):
    """Output for the port for bulk, where it is kept."""

    stream: int
    offset: int
    data: Sequence[memoryview]
    eof: bool


Happening = Data | Accepted | InputClosed | BulkWanted | Moved | Ended


class Stdio:
    """The streams of one process, from its creation until it is forgotten."""

    def __init__(self, *, stdin: int | None, stdout: int | None, stderr: int | None, terminal: bool = False) -> None:
        """Takes over the descriptors, which are set to non-blocking; a terminal's is both stdin and stdout."""
        self.lock = threading.Lock()
        self.terminal = terminal
        for fd in (stdin, stdout, stderr):
            if fd is not None:
                os.set_blocking(fd, False)
        self.input = Input(stdin, terminal=terminal)
        self.outputs = {STDOUT: Output(stdout), STDERR: Output(stderr)}
        self.has_ended = False
        self._session: Session | None = None
        self._forgotten = False

    def attach(self, stdout_offset: int, stderr_offset: int, lane: Lane | None = None) -> Session:
        """Begin a session, ending the one before it; InvalidArgumentError for bytes that are not kept.

        With a lane it may use the port for bulk.
        """
        with self.lock:
            if self._forgotten:
                raise UnavailableError("the process was removed")
            positions = {STDOUT: stdout_offset, STDERR: stderr_offset}
            for stream, position in positions.items():
                output = self.outputs[stream]
                if not output.abandoned and not output.base <= position <= output.produced:
                    raise InvalidArgumentError(
                        f"output is asked for from offset {position}, "
                        f"but what is kept is from {output.base} to {output.produced}"
                    )
            if self._session is not None:
                self._session.close()
            self.input.forget_queue()
            self._session = Session(self, positions, lane)
            return self._session

    def process_ended(self) -> None:
        """Called when the process has been reaped."""
        with self.lock:
            self.has_ended = True
            if self._session is not None:
                self._session.wake()

    def forget(self) -> None:
        """Close everything; sessions end."""
        with self.lock:
            self._forgotten = True
            if self._session is not None:
                self._session.close()
                self._session = None
            self.input.release()
            self.input.closed = True
            for output in self.outputs.values():
                output.abandon()

    def offsets(self) -> tuple[int, int, int]:
        """Bytes of stdout and stderr produced, and of stdin accepted, so far."""
        with self.lock:
            return self.outputs[STDOUT].produced, self.outputs[STDERR].produced, self.input.accepted

    def resize(self, columns: int, rows: int) -> None:
        with self.lock:
            fd = self.outputs[STDOUT].fd
            if not self.terminal or fd is None:
                raise InvalidArgumentError("the process has no terminal")
            fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Session:
    """One attachment.  `events` is iterated over by one thread; the other methods may be called by any."""

    def __init__(self, stdio: Stdio, positions: dict[int, int], lane: Lane | None = None) -> None:
        self._stdio = stdio
        self._positions = positions
        self._lane = lane
        #: from where on a stream is worth moving
        self._worth_moving = {stream: position + WORTH_MOVING for stream, position in positions.items()}
        self._moved: set[int] = set()
        self._bulk_wanted = False
        #: input comes by the port for bulk, and is accepted there
        self._input_moved = False
        #: why it ended, if that was the host's fault
        self.failure: AgentError | None = None
        self._eof_given: set[int] = set()
        self._closed = False
        self._finished = False
        self._wakeup = -1

    @property
    def displaced(self) -> bool:
        """A newer session took over, or the process was forgotten, or nobody takes the events any more."""
        return self._closed

    def close(self) -> None:
        """Make `events` end.  Called with the lock of the streams held, or through `leave`."""
        self._closed = True
        self.wake()

    def leave(self) -> None:
        """Make `events` end, because nobody takes them any more."""
        with self._stdio.lock:
            self.close()

    def wake(self) -> None:
        if self._wakeup >= 0:
            os.eventfd_write(self._wakeup, 1)

    def receive(self, offset: int, data: bytes, *, eof: bool) -> None:
        """Take input; raises InvalidArgumentError for a gap or too much."""
        with self._stdio.lock:
            if not self._closed:
                self._stdio.input.receive(offset, data, eof=eof)
                self.wake()

    def receive_bulk(self, offset: int, data: memoryview, *, eof: bool) -> None:
        """Take input from the port for bulk; what the process has of it is told there."""
        with self._stdio.lock:
            if self._closed:
                return
            self._input_moved = True
            source = self._stdio.input
            before = source.accepted
            source.receive(offset, data, eof=eof)
            accepted = source.accepted
            if source.pending:
                self.wake()
        if accepted != before and self._lane is not None:
            self._lane.accept(accepted, more=not eof)

    def fail(self, error: AgentError) -> None:
        """End because of what the host did."""
        self.failure = self.failure or error
        self.leave()

    def acknowledge(self, stream: int, offset: int) -> None:
        """Let go of output below `offset`."""
        with self._stdio.lock:
            if self._closed:
                return
            output = self._stdio.outputs.get(stream)
            if output is None:
                raise InvalidArgumentError(f"stream {stream} is not output")
            was_waiting = not output.wanted
            output.acknowledge(offset)
            if was_waiting:
                self.wake()

    def abandon(self, stream: int) -> None:
        """Nobody will read this output any more."""
        with self._stdio.lock:
            output = self._stdio.outputs.get(stream)
            if output is None:
                raise InvalidArgumentError(f"stream {stream} is not output")
            if self._closed:
                return
            if self._stdio.terminal:
                self._stdio.input.release()
                self._stdio.input.closed = True
            output.abandon()
            self.wake()

    def finish(self) -> None:
        """No request will follow: acknowledgements are not waited for when the process has ended."""
        with self._stdio.lock:
            self._finished = True
            self.wake()

    def events(self) -> Iterator[Happening]:
        """What happens to the streams, in order; ends after `Ended` was given and everything acknowledged."""
        with self._stdio.lock:
            if self._closed:
                return
            self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            yield Accepted(self._stdio.offsets()[2])
            yield from self._pump()
        finally:
            with self._stdio.lock:
                os.close(self._wakeup)
                self._wakeup = -1

    def _pump(self) -> Iterator[Happening]:
        stdio = self._stdio
        closed_input_given = stdio.input.fd is None
        while True:
            happenings: list[Happening] = []
            pieces: list[_Piece] = []
            with stdio.lock:
                if self._closed:
                    return
                # Looked at before the pipes are: what the process wrote is in them when it has ended.
                process_ended = stdio.has_ended
                source = stdio.input
                accepted = source.accepted if source.pending and source.write() else 0
                more = source.pending
                if accepted and not self._input_moved:
                    happenings.append(Accepted(accepted))
                    accepted = 0
                if source.closed:
                    source.release()
                    if not closed_input_given and not source.eof:
                        happenings.append(InputClosed())
                    closed_input_given = True
                moved = self._move_output(happenings, pieces, final=process_ended)
            yield from happenings
            if accepted and self._lane is not None:
                self._lane.accept(accepted, more=more)
            for piece in pieces:
                if not self._send(piece):
                    return
            if moved:
                continue
            if process_ended and len(self._eof_given) == len(stdio.outputs):
                break
            self._wait()
        yield Ended()
        while self._is_owed_acknowledgements():
            self._wait()

    def _move_output(self, happenings: list[Happening], pieces: list[_Piece], *, final: bool) -> bool:
        """Collect a chunk of each stream; False if there was nothing."""
        moved = False
        for stream, output in self._stdio.outputs.items():
            if stream in self._eof_given:
                continue
            position = self._positions[stream]
            if position == output.produced and output.wanted:
                output.read(final=final)
            data = [] if output.abandoned else output.kept.views(position, CHUNK)
            count = sum(len(view) for view in data)
            self._positions[stream] = position + count
            eof = output.abandoned or (output.ended and self._positions[stream] == output.produced)
            if eof:
                self._eof_given.add(stream)
            if not data and not eof:
                continue
            moved = True
            if self._moves(stream, position, happenings):
                pieces.append(_Piece(stream, position, data, eof))
            else:
                happenings.append(Data(stream, position, b"".join(data), eof))
        return moved

    def _moves(self, stream: int, position: int, happenings: list[Happening]) -> bool:
        """Whether output from this position on takes the port for bulk."""
        if stream in self._moved:
            return True
        if self._lane is None or position < self._worth_moving[stream]:
            return False
        if self._lane.is_there:
            self._moved.add(stream)
            happenings.append(Moved(stream, position))
            return True
        if not self._bulk_wanted:
            self._bulk_wanted = True
            happenings.append(BulkWanted())
        return False

    def _send(self, piece: _Piece) -> bool:
        """Send output through the port for bulk; without it the session is over, and another one goes on."""
        assert self._lane is not None
        if self._lane.send(piece.stream, piece.offset, piece.data, eof=piece.eof):
            return True
        self.fail(UnavailableError("the host's session on the port for bulk ended"))
        return False

    def _is_owed_acknowledgements(self) -> bool:
        with self._stdio.lock:
            return not self._closed and not self._finished and any(o.kept for o in self._stdio.outputs.values())

    def _wait(self) -> None:
        """Block until something may have changed."""
        watched = {self._wakeup: select.POLLIN}
        with self._stdio.lock:
            source = self._stdio.input
            if source.fd is not None:
                watched[source.fd] = select.POLLOUT if source.pending else 0
            for output in self._stdio.outputs.values():
                if output.wanted and output.fd is not None:
                    watched[output.fd] = watched.get(output.fd, 0) | select.POLLIN
        poll = select.poll()
        for fd, wanted in watched.items():
            if wanted or not self._stdio.terminal:
                poll.register(fd, wanted)
        for fd, events in poll.poll():
            if fd == self._wakeup:
                with suppress(BlockingIOError):
                    os.eventfd_read(fd)
            elif events & select.POLLERR and not self._stdio.terminal:
                with self._stdio.lock:
                    if source.fd == fd:
                        source.closed = True
