"""Between a stand-in and the agent: chunks and acknowledgements, both ways, by offset.

Nothing is kept here.  Output that the stand-in has not acknowledged is still in the agent, input that the agent
has not accepted is still in the stand-in; so either connection, or this process, may break at any moment,
and what resumes asks for what it lacks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vmsandbox import wire
from vmsandbox.errors import InvalidStateError, NotFoundError, SandboxError, UnavailableError
from vmsandbox.supervisor.process import Exit
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsandbox.guest.attachment import Attachment
    from vmsandbox.guest.client import AgentClient
    from vmsandbox.supervisor.process import Process

log = logging.getLogger(__name__)

KIND_OF = {pb.STREAM_STDOUT: wire.STDOUT, pb.STREAM_STDERR: wire.STDERR}
STREAM_OF = {"stdin": pb.STREAM_STDIN, "stdout": pb.STREAM_STDOUT, "stderr": pb.STREAM_STDERR}
NAME_OF = {wire.STDOUT: "stdout", wire.STDERR: "stderr"}
#: Unsent bytes towards a stand-in before we stop taking more from the agent.
HIGH_WATER = 1024 * 1024
#: seconds between the loss of the agent's stream and the news that the machine is lost
LOST_TIMEOUT = 2.0
#: The stand-in sends at most a window of 1 MiB ahead of what was accepted; twice that is a broken peer.
MOST_QUEUED = 4 * 1024 * 1024


class Link:
    """One stand-in's connection while it lasts.

    When the agent's side breaks, the stand-in's side is dropped as well: the stand-in comes back at once and says
    from which offsets on, so there is one way of resuming and not two.
    """

    def __init__(
        self,
        process: Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        hello: dict[str, Any],
        *,
        ended: Callable[[Process, Exit], None],
    ) -> None:
        self.process = process
        self.reader = reader
        self.writer = writer
        self.ended = ended
        #: next byte the stand-in wants of each output
        self.stdout_offset = int(hello.get("stdout", 0))
        self.stderr_offset = int(hello.get("stderr", 0))
        self.size: list[int] | None = hello.get("size")
        self.input: asyncio.Queue[tuple[int, bytes, bool]] = asyncio.Queue()
        self.queued = 0
        self.signals: asyncio.Queue[int] = asyncio.Queue()
        self.attachment: Attachment | None = None
        #: what the stand-in said of outputs, perhaps before there was an attachment
        self.acked: dict[int, int] = {}
        self.closed: set[int] = set()
        writer.transport.set_write_buffer_limits(high=HIGH_WATER)

    async def serve(self, agent: AgentClient | None) -> None:
        """Carry the process' stdio until its exit was delivered or either connection broke."""
        try:
            async with asyncio.TaskGroup() as tasks:
                carrying = tasks.create_task(self._carry(agent), name=f"stdio of {self.process}")
                signalling = tasks.create_task(self._signal(agent), name=f"signals of {self.process}")
                await self._listen()
                carrying.cancel()
                signalling.cancel()
        except* (SandboxError, OSError, wire.WireError, TimeoutError) as errors:
            for error in errors.exceptions:
                log.info("stdio of %s is interrupted: %s", self.process, error)

    # ------------------------------------------------------------ from the agent

    async def _carry(self, agent: AgentClient | None) -> None:
        """Forward output and input, then the exit status."""
        if agent is not None and self.process.exit is None:
            try:
                await self._converse(agent)
            except UnavailableError:
                # If it is the whole machine that went away, the exit says so in a moment.
                async with asyncio.timeout(LOST_TIMEOUT):
                    await self.process.exited.wait()
        await self.process.exited.wait()
        assert self.process.exit is not None
        self._send({"exit": self.process.exit.document()})
        await self.writer.drain()

    async def _converse(self, agent: AgentClient) -> None:
        async with agent.attach(
            self.process.container_id,
            self.process.exec_id,
            stdout_offset=self.stdout_offset,
            stderr_offset=self.stderr_offset,
        ) as attachment:
            feeding = asyncio.create_task(self._feed(attachment), name=f"stdin of {self.process}")
            self.attachment = attachment
            try:
                if self.size:
                    await attachment.resize(*self.size)
                for stream in [*self.closed]:
                    await attachment.close_output(stream)
                for stream, offset in [*self.acked.items()]:
                    await attachment.ack(stream, offset)
                await self._forward(attachment)
            finally:
                self.attachment = None
                feeding.cancel()
                await asyncio.wait({feeding})

    async def _forward(self, attachment: Attachment) -> None:
        """Forward until the exit status came; raises `UnavailableError` if the stream ends without it."""
        while (answer := await attachment.receive()) is not None:
            what = answer.WhichOneof("what")
            if what == "output":
                await self._send_output(answer.output)
            elif what == "accepted":
                self._send({"accepted": answer.accepted.offset})
            elif what == "stdin_closed":
                self._send({"stdin_closed": True})
            elif what == "exited":
                self.ended(self.process, exit_of(answer.exited))
                return
        raise UnavailableError("the agent ended the stream")

    async def _send_output(self, chunk: pb.Chunk) -> None:
        kind = KIND_OF[chunk.stream]
        if chunk.data:
            self.writer.write(wire.encode_data(kind, chunk.offset, chunk.data))
        if chunk.eof:
            self._send({"eof": NAME_OF[kind]})
        await self.writer.drain()

    def _send(self, message: dict[str, Any]) -> None:
        self.writer.write(wire.encode_message(message))

    async def _feed(self, attachment: Attachment) -> None:
        """Pass queued input on; a guest that does not read holds up this task and nothing else."""
        try:
            while True:
                offset, data, eof = await self.input.get()
                await attachment.send_input(offset, data, eof=eof)
                self.queued -= len(data)
        except UnavailableError:
            return  # `_forward` sees the same break

    # ------------------------------------------------------------ from the stand-in

    async def _listen(self) -> None:
        """Take input, acknowledgements and signals until the stand-in is done or its connection ends."""
        while (frame := await wire.read(self.reader)) is not None:
            if frame.kind == wire.STDIN:
                self._queue(frame.offset, frame.payload, eof=False)
                continue
            message = frame.message()
            if "ack" in message:
                stream, offset = STREAM_OF[message["ack"]], int(message["offset"])
                self.acked[stream] = offset
                if self.attachment is not None:
                    await self.attachment.ack(stream, offset)
            elif message.get("eof") == "stdin":
                self._queue(int(message["offset"]), b"", eof=True)
            elif "signal" in message:
                self.signals.put_nowait(int(message["signal"]))
            elif "size" in message:
                self.size = [int(number) for number in message["size"]]
                if self.attachment is not None:
                    await self.attachment.resize(*self.size)
            elif "closed" in message:
                stream = STREAM_OF[message["closed"]]
                self.closed.add(stream)
                if self.attachment is not None:
                    await self.attachment.close_output(stream)
            elif "done" in message:
                self.process.delivered.set()
                return

    def _queue(self, offset: int, data: bytes, *, eof: bool) -> None:
        self.queued += len(data)
        if self.queued > MOST_QUEUED:
            raise wire.WireError(f"stand-in sent {self.queued} bytes of input without waiting for their acceptance")
        self.input.put_nowait((offset, data, eof))

    async def _signal(self, agent: AgentClient | None) -> None:
        """Pass signals on in their order; one is only then taken when the guest has it."""
        while True:
            number = await self.signals.get()
            if agent is not None and self.process.exit is None:
                # It has ended, which is told behind its output: a break here would only have this said again.
                with suppress(NotFoundError, InvalidStateError):
                    await agent.signal(self.process.container_id, self.process.exec_id, number)
            self._send({"signalled": number})


def exit_of(status: pb.ExitStatus) -> Exit:
    """The agent's exit status as ours; its numbers are the guest's word and are bounded here."""
    return Exit(
        code=min(status.code, 255),
        signal=min(status.signal, 64),
        time_ns=status.time_ns or time.time_ns(),
        oom_killed=status.oom_killed,
    )
