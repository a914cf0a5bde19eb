"""The streams into and out of one process: what is kept of each, and by which offsets."""

from __future__ import annotations

import os
import termios
from collections import deque

from vmsandbox_agent.errors import InvalidArgumentError
from vmsandbox_agent.ring import Ring

STDIN = 1
STDOUT = 2
STDERR = 3

#: Unacknowledged bytes of one output stream.
WINDOW = 2 * 1024 * 1024
#: Bytes of input that may be under way beyond what was accepted.
INPUT_WINDOW = 1024 * 1024
#: At most this much in one event.
CHUNK = 256 * 1024
PIPE_SIZE = 1024 * 1024
#: room for the output of a process that has not much to say
_LITTLE = 4096


class Output:
    """One stream that comes out of a process."""

    def __init__(self, fd: int | None) -> None:
        self.fd = fd
        self.kept = Ring(WINDOW)
        #: the last read found as much as there was room for
        self._much = False
        self.ended = fd is None
        #: nobody reads it any more: it has ended, wherever an attachment begins
        self.abandoned = False

    @property
    def base(self) -> int:
        """Offset of the first byte that is kept."""
        return self.kept.base

    @property
    def produced(self) -> int:
        return self.kept.end

    @property
    def wanted(self) -> bool:
        """Whether more is to be read now."""
        return self.fd is not None and not self.ended and len(self.kept) <= WINDOW - CHUNK

    def acknowledge(self, offset: int) -> None:
        if offset > self.produced:
            raise InvalidArgumentError(f"offset {offset} is acknowledged, but there are only {self.produced} bytes")
        self.kept.release(offset)

    def abandon(self) -> None:
        """Close the reading end: the process gets SIGPIPE, or its terminal hangs up."""
        if self.fd is not None:
            os.close(self.fd)
        self.fd = None
        self.ended = self.abandoned = True
        self.kept.clear()

    def read(self, *, final: bool) -> int:
        """Take what is there and answer how much; with `final` nothing more is waited for."""
        assert self.fd is not None
        try:
            room = self.kept.room(CHUNK if self._much else _LITTLE, CHUNK)
            count = os.readv(self.fd, room)
        except BlockingIOError:
            if final:
                self.ended = True
            return 0
        except OSError:  # a terminal whose last user is gone
            self.ended = True
            return 0
        if not count:
            self.ended = True
        self._much = count == sum(len(place) for place in room)
        self.kept.appended(count)
        return count


class Input:
    """The stream into a process."""

    def __init__(self, fd: int | None, *, terminal: bool) -> None:
        self.fd = fd
        self.terminal = terminal
        self.accepted = 0
        self.queue: deque[memoryview] = deque()
        self.queued = 0
        self.eof = False
        self.closed = fd is None

    @property
    def received(self) -> int:
        return self.accepted + self.queued

    @property
    def pending(self) -> bool:
        return not self.closed and (bool(self.queue) or self.eof)

    def receive(self, offset: int, data: bytes | memoryview, *, eof: bool) -> None:
        """Queue input; of a `memoryview` what the pipe does not take at once is copied."""
        if self.closed:
            return
        if offset > self.received:
            raise InvalidArgumentError(f"input at offset {offset} was sent, but {self.received} follows")
        fresh = memoryview(data)[self.received - offset :]
        if isinstance(data, memoryview):
            if not self.queue and self.fd is not None:
                fresh = fresh[self._given(fresh) :]
            fresh = memoryview(bytes(fresh))
        if self.queued + len(fresh) > INPUT_WINDOW:
            raise InvalidArgumentError(f"more than {INPUT_WINDOW} bytes of input beyond what was accepted")
        if fresh:
            self.queue.append(fresh)
            self.queued += len(fresh)
        if eof:
            self.eof = True

    def release(self) -> None:
        """Close the descriptor of an input that is over; a terminal's belongs to its output."""
        if self.fd is not None and not self.terminal:
            os.close(self.fd)
        self.fd = None
        self.queue.clear()
        self.queued = 0

    def forget_queue(self) -> None:
        """A new session sends again what was not accepted."""
        self.queue.clear()
        self.queued = 0
        self.eof = False

    def _given(self, data: memoryview) -> int:
        """How much of `data` the pipe took."""
        assert self.fd is not None
        try:
            count = os.write(self.fd, data) if data else 0
        except OSError:  # it is full; or closed, as `write` will find
            return 0
        self.accepted += count
        return count

    def write(self) -> bool:
        """Write what the pipe takes; True if anything was accepted."""
        assert self.fd is not None
        before = self.accepted
        try:
            while self.queue:
                count = os.write(self.fd, self.queue[0])
                self.accepted += count
                self.queued -= count
                if count < len(self.queue[0]):
                    self.queue[0] = self.queue[0][count:]
                else:
                    self.queue.popleft()
            if self.eof:
                if self.terminal:
                    os.write(self.fd, _end_of_file_character(self.fd))
                    self.eof = False
                else:
                    self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        return self.accepted != before


def _end_of_file_character(fd: int) -> bytes:
    value = termios.tcgetattr(fd)[6][termios.VEOF]
    return value if isinstance(value, bytes) else bytes([value])
