"""A process' streams over one attachment, every answer checked.

Offsets come from the agent and are believed only if they continue what came before: output without gap or
repetition, acceptance of no more than was sent, an exit only after the end of both streams.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import UnavailableError
from vmsandbox.guest.replies import broken, check_bounds, check_exit, protocol, translated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from vmsandbox.guest import transport
    from vmsandbox_protocol import agent_pb2 as pb

#: bytes of output in one message at most
CHUNK_LIMIT = 1024 * 1024
#: bytes of input that may be sent beyond what the agent has accepted
INPUT_WINDOW = 1024 * 1024
#: bytes of input in one message
_INPUT_CHUNK = 256 * 1024

STDIN, STDOUT, STDERR = 1, 2, 3


class Attachment:
    """A process' streams.  One task receives; any may send.

    Keep receiving while sending: what the agent has accepted arrives there, and `send_input` waits for it.
    """

    def __init__(
        self,
        relay: transport.Relay,
        method: Any,
        container_id: str,
        exec_id: str,
        *,
        stdout_offset: int,
        stderr_offset: int,
    ) -> None:
        self._relay = relay
        self._method = method
        self._container_id = container_id
        self._exec_id = exec_id
        self._expected = {STDOUT: stdout_offset, STDERR: stderr_offset}
        self._ended: set[int] = set()
        self._sent = 0
        self._accepted: int | None = None
        self._progress = asyncio.Event()
        self._writing = asyncio.Lock()
        self._wanted_acks: dict[int, int] = {}
        self._sent_acks: dict[int, int] = {}
        self._call: Any = None
        self._answers: AsyncIterator[Any] | None = None
        self._over = False
        self._input_closed = False
        self._exited = False

    async def __aenter__(self) -> Attachment:
        await self._relay.ready()
        self._call = self._method(wait_for_ready=True)
        start = protocol().AttachStart(
            container_id=self._container_id,
            exec_id=self._exec_id,
            stdout_offset=self._expected[STDOUT],
            stderr_offset=self._expected[STDERR],
        )
        # Not read(): that gives nothing more once a write has failed, although answers are still there.
        self._answers = aiter(self._call)
        try:
            await self._write(protocol().AttachRequest(start=start))
        except BaseException:
            self._call.cancel()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._progress.set()
        self._call.cancel()

    @property
    def accepted(self) -> int | None:
        """Input below this offset reached the process; None before the agent's first answer."""
        return self._accepted

    async def receive(self) -> pb.AttachResponse | None:
        """The next answer, checked; None when the agent has said everything and all was acknowledged.

        Raises UnavailableError when the connection broke or a newer attachment took over: attach again.
        """
        import grpc

        assert self._answers is not None
        try:
            answer = await anext(self._answers)
        except StopAsyncIteration:
            self._finish()
            return None
        except grpc.aio.AioRpcError as error:
            self._finish()
            if self._exited:  # what we wrote when it had ended the call is of no interest
                return None
            raise translated(error) from None
        except asyncio.CancelledError:
            raise self._closed_under_us() from None
        try:
            check_bounds(answer)
            self._check(answer)
        except UnavailableError:
            self._finish()
            self._call.cancel()
            raise
        checked: pb.AttachResponse = answer
        return checked

    async def send_input(self, offset: int, data: bytes | memoryview, eof: bool = False) -> None:
        """Send input, waiting as long as too much of it is under way; `offset` is that of the first byte."""
        pb = protocol()
        at = 0
        while True:
            piece = bytes(data[at : at + _INPUT_CHUNK])
            last = at + len(piece) == len(data)
            await self._room_for(offset + at + len(piece))
            self._sent = max(self._sent, offset + at + len(piece))
            chunk = pb.Chunk(stream=STDIN, offset=offset + at, data=piece, eof=eof and last)
            await self._write(pb.AttachRequest(input=chunk))
            at += len(piece)
            if last:
                return

    async def ack(self, stream: int, offset: int) -> None:
        """Tell that output below `offset` has been taken over; only the latest of several is sent.

        An attachment that is over needs none; `receive` tells why it is.
        """
        if offset <= self._wanted_acks.get(stream, 0):
            return
        self._wanted_acks[stream] = offset
        async with self._writing:
            latest = self._wanted_acks[stream]
            if latest > self._sent_acks.get(stream, 0):
                self._sent_acks[stream] = latest
                pb = protocol()
                with suppress(UnavailableError):
                    await self._write_now(pb.AttachRequest(ack=pb.Ack(stream=stream, offset=latest)))

    async def resize(self, columns: int, rows: int) -> None:
        pb = protocol()
        size = pb.ResizeRequest(container_id=self._container_id, exec_id=self._exec_id, columns=columns, rows=rows)
        await self._write(pb.AttachRequest(resize=size))

    async def close_output(self, stream: int) -> None:
        """Say that nobody reads this output any more."""
        await self._write(protocol().AttachRequest(close=stream))

    async def _room_for(self, end: int) -> None:
        while self._accepted is None or end - self._accepted > INPUT_WINDOW:
            if self._over:
                raise UnavailableError("the attachment is over")
            self._progress.clear()
            await self._progress.wait()

    async def _write(self, request: Any) -> None:
        async with self._writing:
            await self._write_now(request)

    async def _write_now(self, request: Any) -> None:
        import grpc

        if self._over:
            raise UnavailableError("the attachment is over")
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            # Why it is over is for `receive` to say.
            self._finish()
            raise UnavailableError("the attachment is over") from None
        except asyncio.CancelledError:
            raise self._closed_under_us() from None

    def _closed_under_us(self) -> BaseException:
        """The error for a cancellation: closing the channel cancels its calls, which looks like one of this task."""
        self._finish()
        task = asyncio.current_task()
        if task is None or task.cancelling():
            return asyncio.CancelledError()
        return UnavailableError("the connection to the agent was closed")

    def _finish(self) -> None:
        self._over = True
        self._progress.set()

    def _check(self, answer: pb.AttachResponse) -> None:
        what = answer.WhichOneof("what")
        if self._accepted is None and what != "accepted":
            raise broken("its first answer on an attachment is not what it accepted")
        if self._exited:
            raise broken(f"it tells of '{what}' after the exit")
        if what == "output":
            self._check_output(answer.output)
        elif what == "accepted":
            self._check_accepted(answer.accepted)
        elif what == "exited":
            check_exit(answer.exited)
            if len(self._ended) < len(self._expected):
                raise broken("it tells of an exit before the end of the output")
            self._exited = True
        elif what == "stdin_closed" and answer.stdin_closed and not self._input_closed:
            self._input_closed = True
        else:
            raise broken("an answer on an attachment says nothing new")

    def _check_output(self, chunk: pb.Chunk) -> None:
        if self._expected.get(chunk.stream) != chunk.offset or chunk.stream in self._ended:
            raise broken(f"output of stream {chunk.stream} at offset {chunk.offset} is out of order")
        if len(chunk.data) > CHUNK_LIMIT:
            raise broken(f"{len(chunk.data)} bytes of output are more than {CHUNK_LIMIT}")
        if not chunk.data and not chunk.eof:
            raise broken("a chunk of output is empty")
        self._expected[chunk.stream] += len(chunk.data)
        if chunk.eof:
            self._ended.add(chunk.stream)

    def _check_accepted(self, accepted: pb.Ack) -> None:
        offset = accepted.offset
        if accepted.stream != STDIN or (self._accepted is not None and offset <= self._accepted):
            raise broken(f"it accepted input up to {offset} after {self._accepted}")
        if self._accepted is not None and offset > self._sent:
            raise broken(f"it accepted input up to {offset}, but {self._sent} was sent")
        self._accepted = offset
        self._sent = max(self._sent, offset)
        self._progress.set()
