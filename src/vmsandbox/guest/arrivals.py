"""What the port for bulk brought and nobody has received yet.

The port may not stand still, so what comes is put by at once.  How many bytes that is, the windows bound; here what
they take is bounded: a guest that sends them one by one costs no more than one that sends many at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsandbox.guest.replies import broken, protocol
from vmsandbox_protocol.bulk import STDIN

if TYPE_CHECKING:
    from vmsandbox_protocol import agent_pb2 as pb

#: bytes from which on output is kept as it came
_LARGE = 16 * 1024
#: bytes of smaller pieces that are put together
_TOGETHER = 256 * 1024


@dataclass(slots=True)
class Output:
    """Some of a stream, beginning at `offset`."""

    stream: int
    offset: int
    data: bytes | bytearray
    eof: bool

    def answer(self) -> pb.AttachResponse:
        chunk = protocol().Chunk(stream=self.stream, offset=self.offset, data=bytes(self.data), eof=self.eof)
        answer: pb.AttachResponse = protocol().AttachResponse(output=chunk)
        return answer


class Arrivals:
    """Output in the order in which it came, by stream at least, and how much input was accepted."""

    def __init__(self) -> None:
        self._waiting: deque[Output] = deque()
        #: by stream, its last output if that still grows
        self._growing: dict[int, Output] = {}
        self._accepted: int | None = None

    def __len__(self) -> int:
        return len(self._waiting) + (self._accepted is not None)

    def accept(self, offset: int) -> None:
        self._accepted = offset

    def put(self, stream: int, offset: int, data: bytes | memoryview, *, eof: bool) -> None:
        """Keep output that continues what came of its stream before."""
        growing = self._growing.get(stream)
        if growing is not None and len(data) < _LARGE:
            growing.data += data
            growing.eof = eof
            if len(growing.data) >= _TOGETHER:
                del self._growing[stream]
        elif len(data) < _LARGE:
            self._growing[stream] = Output(stream, offset, bytearray(data), eof)
            self._waiting.append(self._growing[stream])
        else:
            self._growing.pop(stream, None)
            self._waiting.append(Output(stream, offset, bytes(data), eof))

    def follow(self, others: Arrivals) -> None:
        """Take over output of streams of which there is none here."""
        self._waiting += others._waiting
        self._growing |= others._growing

    def take(self) -> pb.AttachResponse | None:
        """What is to be received next, if there is anything."""
        if self._accepted is not None:
            ack = protocol().Ack(stream=STDIN, offset=self._accepted)
            self._accepted = None
            answer: pb.AttachResponse = protocol().AttachResponse(accepted=ack)
            return answer
        if not self._waiting:
            return None
        output = self._waiting.popleft()
        if self._growing.get(output.stream) is output:
            del self._growing[output.stream]
        return output.answer()


class Early:
    """What the port brought of a stream before the call has told of the move."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.arrivals = Arrivals()
        self.begin = self.end = 0
        self.eof = False

    def put(self, offset: int, data: bytes | memoryview, *, eof: bool) -> None:
        """Keep output; raises UnavailableError unless it continues what came before."""
        if not self.arrivals:
            self.begin = self.end = offset
        if self.eof or offset != self.end:
            raise broken(f"output of stream {self.stream} at offset {offset} is out of order")
        self.end += len(data)
        self.eof = eof
        self.arrivals.put(self.stream, offset, data, eof=eof)
