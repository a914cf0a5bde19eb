"""Reading a process' streams to their end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmsandbox.guest.attachment import Attachment
    from vmsandbox_protocol import agent_pb2 as pb


@dataclass
class Heard:
    """Everything an attachment said."""

    stdout: bytes = b""
    stderr: bytes = b""
    exit: pb.ExitStatus | None = None
    accepted: int = 0
    input_closed: bool = False
    offsets: list[int] = field(default_factory=list)


async def hear(attachment: Attachment, *, acknowledge: bool = True, until: bytes | None = None) -> Heard:
    """Receive until the end, or until stdout contains something."""
    heard = Heard()
    while (answer := await attachment.receive()) is not None:
        what = answer.WhichOneof("what")
        if what == "output":
            chunk = answer.output
            if chunk.stream == 2:
                heard.stdout += chunk.data
            else:
                heard.stderr += chunk.data
            if acknowledge:
                await attachment.ack(chunk.stream, chunk.offset + len(chunk.data))
            if until is not None and until in heard.stdout:
                return heard
        elif what == "exited":
            heard.exit = answer.exited
            if not acknowledge:
                return heard
        elif what == "accepted":
            heard.accepted = answer.accepted.offset
        else:
            heard.input_closed = True
    return heard
