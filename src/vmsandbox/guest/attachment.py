"""A process' streams over one attachment, every answer checked.

Offsets come from the agent and are believed only if they continue what came before: output without gap or
repetition, acceptance of no more than was sent, an exit only after the end of both streams.

A stream that carries much moves from the call to the port for bulk (`vmsandbox.guest.bulk`), and stays there.  The two
are not in step: what the port brings before the call has told of the move is put by.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import UnavailableError
from vmsandbox.guest.arrivals import Arrivals, Early
from vmsandbox.guest.replies import broken, check_bounds, check_exit, closed, protocol, translated, translating
from vmsandbox_protocol import bulk
from vmsandbox_protocol.bulk import STDERR, STDIN, STDOUT, WORTH_MOVING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from vmsandbox.guest import transport
    from vmsandbox.guest.bulk import BulkPort, Lane
    from vmsandbox_protocol import agent_pb2 as pb

#: bytes of output in one message at most
CHUNK_LIMIT = 1024 * 1024
#: bytes of input that may be sent beyond what the agent has accepted
INPUT_WINDOW = 1024 * 1024
#: bytes of output that an honest agent has under way beyond what was acknowledged
OUTPUT_WINDOW = 2 * 1024 * 1024
#: bytes of output that are acknowledged together at the port for bulk
_ACK_EVERY = OUTPUT_WINDOW // 4
#: bytes of input in one message
_INPUT_CHUNK = 256 * 1024


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
        port: BulkPort | None = None,
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
        self._port = port
        self._lane: Lane | None = None
        self._leaving = ExitStack()
        self._acknowledged = {STDOUT: stdout_offset, STDERR: stderr_offset}
        #: outputs that come through the port for bulk
        self._moved: set[int] = set()
        self._early = {stream: Early(stream) for stream in (STDOUT, STDERR)}
        self._bulk_wanted = False
        #: input goes through the port for bulk; it may where the agent has one
        self._input_moved = False
        self._input_may_move = False
        self._first_input: int | None = None
        self._arrived = Arrivals()
        self._failure: UnavailableError | None = None
        #: why nothing comes through the port any more
        self._port_ended: UnavailableError | None = None
        self._news = asyncio.Event()
        self._next: asyncio.Task[pb.AttachResponse | None] | None = None
        #: told, but not yet to be given on
        self._exit: pb.AttachResponse | None = None

    async def __aenter__(self) -> Attachment:
        await self._relay.ready()
        with translating():
            self._call = self._method(wait_for_ready=True)
        start = protocol().AttachStart(
            container_id=self._container_id,
            exec_id=self._exec_id,
            stdout_offset=self._expected[STDOUT],
            stderr_offset=self._expected[STDERR],
        )
        if self._port is not None:
            self._lane = self._leaving.enter_context(self._port.lane(self))
            start.bulk_session, start.bulk_channel = self._lane.digits, self._lane.channel
        # Not read(): that gives nothing more once a write has failed, although answers are still there.
        self._answers = aiter(self._call)
        try:
            await self._write(protocol().AttachRequest(start=start))
        except BaseException:
            self._leaving.close()
            self._call.cancel()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._progress.set()
        self._leaving.close()
        self._call.cancel()
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait([self._next])

    @property
    def accepted(self) -> int | None:
        """Input below this offset reached the process; None before the agent's first answer."""
        return self._accepted

    async def receive(self) -> pb.AttachResponse | None:
        """The next answer, checked; None when the agent has said everything and all was acknowledged.

        Raises UnavailableError when the connection broke or a newer attachment took over: attach again.
        """
        if self._lane is None:
            return await self._receive_call()
        while True:
            if self._failure is not None:
                self._finish()
                self._call.cancel()
                raise self._failure
            if (arrived := self._arrived.take()) is not None:
                return arrived
            if self._exit is not None and len(self._ended) == len(self._expected):
                exited, self._exit = self._exit, None
                return exited
            if self._next is None:
                self._next = asyncio.create_task(self._receive_call(), name="answers of an attachment")
                self._next.add_done_callback(lambda _: self._news.set())
            if self._next.done():
                task, self._next = self._next, None
                answer: pb.AttachResponse | None = task.result()
                if answer is not None and self._is_for_us(answer):
                    continue
                if answer is None and self._exit is not None:
                    self._failure = broken("it ended an attachment before the output that it owes")
                    continue
                return answer
            self._news.clear()
            await self._news.wait()

    def _is_for_us(self, answer: pb.AttachResponse) -> bool:
        """Whether an answer is not to be given on: which way a stream takes is nobody else's business."""
        what = answer.WhichOneof("what")
        if what == "bulk_wanted" and self._lane is not None:
            self._lane.dial()
        elif what == "exited" and len(self._ended) < len(self._expected):
            self._exit = answer  # the port has not brought everything yet
        else:
            return what == "moved"
        return True

    async def _receive_call(self) -> pb.AttachResponse | None:
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
            end = offset + at + len(piece)
            await self._room_for(end)
            await self._choose_way(offset + at)
            self._sent = max(self._sent, end)
            if self._input_moved:
                assert self._lane is not None
                await self._lane.send(offset + at, piece, eof=eof and last)
            else:
                chunk = pb.Chunk(stream=STDIN, offset=offset + at, data=piece, eof=eof and last)
                await self._write(pb.AttachRequest(input=chunk))
            at += len(piece)
            if last:
                return

    async def _choose_way(self, offset: int) -> None:
        """Move input to the port for bulk if there is much of it and the port is up."""
        if self._first_input is None:
            self._first_input = offset
        if self._input_moved or not self._input_may_move or offset - self._first_input < WORTH_MOVING:
            return
        assert self._lane is not None
        if not self._lane.is_up:
            self._lane.dial()
        elif self._sent == offset:
            # The guest may not see the port's before the call's: everything has to have arrived.
            await self._until_accepted(offset)
            self._input_moved = self._lane.is_up  # it may have ended meanwhile

    async def ack(self, stream: int, offset: int) -> None:
        """Tell that output below `offset` has been taken over; only the latest of several is sent.

        An attachment that is over needs none; `receive` tells why it is.
        """
        if offset <= self._wanted_acks.get(stream, 0):
            return
        self._wanted_acks[stream] = offset
        self._acknowledged[stream] = offset
        if stream in self._moved:
            self._ack_bulk(stream)
            return
        async with self._writing:
            latest = self._wanted_acks[stream]
            if latest > self._sent_acks.get(stream, 0):
                self._sent_acks[stream] = latest
                pb = protocol()
                with suppress(UnavailableError):
                    await self._write_now(pb.AttachRequest(ack=pb.Ack(stream=stream, offset=latest)))

    def _ack_bulk(self, stream: int) -> None:
        """Acknowledge at the port what is due: each costs the guest the waking of a thread."""
        wanted, sent = self._wanted_acks.get(stream, 0), self._sent_acks.get(stream, 0)
        if wanted - sent >= _ACK_EVERY or (wanted > sent and stream in self._ended):
            assert self._lane is not None
            self._sent_acks[stream] = wanted
            self._lane.ack(stream, wanted)

    async def resize(self, columns: int, rows: int) -> None:
        pb = protocol()
        size = pb.ResizeRequest(container_id=self._container_id, exec_id=self._exec_id, columns=columns, rows=rows)
        await self._write(pb.AttachRequest(resize=size))

    async def close_output(self, stream: int) -> None:
        """Say that nobody reads this output any more."""
        await self._write(protocol().AttachRequest(close=stream))

    async def _room_for(self, end: int) -> None:
        await self._until_accepted(end - INPUT_WINDOW)

    async def _until_accepted(self, offset: int) -> None:
        while self._accepted is None or self._accepted < offset:
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
        return closed()

    def _finish(self) -> None:
        self._over = True
        self._progress.set()

    def _check(self, answer: pb.AttachResponse) -> None:
        what = answer.WhichOneof("what")
        if self._accepted is None:
            if what != "accepted":
                raise broken("its first answer on an attachment is not what it accepted")
            self._input_may_move = answer.has_bulk and self._lane is not None
        if self._exited:
            raise broken(f"it tells of '{what}' after the exit")
        if what == "output":
            self._check_output(answer.output)
        elif what == "accepted":
            self._check_accepted(answer.accepted.stream, answer.accepted.offset)
        elif what == "exited":
            check_exit(answer.exited)
            if len(self._ended | self._moved) < len(self._expected):
                raise broken("it tells of an exit before the end of the output")
            self._exited = True
        elif what == "stdin_closed" and answer.stdin_closed and not self._input_closed:
            self._input_closed = True
        elif what == "bulk_wanted" and answer.bulk_wanted and self._lane is not None and not self._bulk_wanted:
            self._bulk_wanted = True
        elif what == "moved" and self._lane is not None and answer.moved.stream in self._expected:
            self._check_next(answer.moved.stream, answer.moved.offset)
            self._move(answer.moved.stream)
        else:
            raise broken("an answer on an attachment says nothing new")

    def _check_output(self, chunk: pb.Chunk) -> None:
        self._check_next(chunk.stream, chunk.offset)
        if len(chunk.data) > CHUNK_LIMIT:
            raise broken(f"{len(chunk.data)} bytes of output are more than {CHUNK_LIMIT}")
        if not chunk.data and not chunk.eof:
            raise broken("a chunk of output is empty")
        self._expected[chunk.stream] += len(chunk.data)
        if chunk.eof:
            self._ended.add(chunk.stream)

    def _check_next(self, stream: int, offset: int) -> None:
        """Whether output that comes by the call continues what came before."""
        if self._expected.get(stream) != offset or stream in self._ended or stream in self._moved:
            raise broken(f"output of stream {stream} at offset {offset} is out of order")

    # ------------------------------------------------------------ the port for bulk

    def receive_bulk(self, part: bulk.Part) -> None:
        """Take what the port brought; called by it."""
        if self._failure is not None:
            return
        if part.kind == bulk.ACK:
            if not self._input_moved:
                raise broken("it accepts input where none was sent")
            self._check_accepted(part.stream, part.offset)
            self._arrived.accept(part.offset)
            self._news.set()
            return
        stream = part.stream
        if stream not in self._expected or stream in self._ended:
            raise broken(f"output of stream {stream} at offset {part.offset} is out of order")
        if part.offset + len(part.data) - self._acknowledged[stream] > OUTPUT_WINDOW:
            raise broken(f"it sent output up to {part.offset + len(part.data)} without an acknowledgement")
        if stream in self._moved:
            self._continue(stream, part.offset, len(part.data), eof=part.eof)
            self._arrived.put(stream, part.offset, part.data, eof=part.eof)
            self._news.set()
        else:
            self._early[stream].put(part.offset, part.data, eof=part.eof)

    def bulk_ended(self, error: UnavailableError) -> None:
        """The port is gone, or was used against the rules: called by it."""
        self._port_ended = error
        if (
            self._moved or self._input_moved or any(early.arrivals for early in self._early.values())
        ) and self._failure is None:
            self._failure = error
            self._finish()
            self._news.set()

    def _move(self, stream: int) -> None:
        """A stream goes on at the port: with what that has brought already."""
        if self._port_ended is not None:
            raise self._port_ended
        self._moved.add(stream)
        early, self._early[stream] = self._early[stream], Early(stream)
        if early.arrivals:
            self._continue(stream, early.begin, early.end - early.begin, eof=early.eof)
            self._arrived.follow(early.arrivals)

    def _continue(self, stream: int, offset: int, length: int, *, eof: bool) -> None:
        """Note output that comes by the port, which has to continue what came before."""
        if self._expected[stream] != offset:
            raise broken(f"output of stream {stream} at offset {offset} is out of order")
        self._expected[stream] += length
        if eof:
            self._ended.add(stream)
            self._ack_bulk(stream)

    def _check_accepted(self, stream: int, offset: int) -> None:
        if stream != STDIN or (self._accepted is not None and offset <= self._accepted):
            raise broken(f"it accepted input up to {offset} after {self._accepted}")
        if self._accepted is not None and offset > self._sent:
            raise broken(f"it accepted input up to {offset}, but {self._sent} was sent")
        self._accepted = offset
        self._sent = max(self._sent, offset)
        self._progress.set()
