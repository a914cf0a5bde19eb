"""What the agent answers, judged: sizes, texts, errors.

The agent is not trusted.  An answer that an honest agent does not give becomes an UnavailableError, since nothing
more can be expected from such a guest.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import (
    InvalidStateError,
    SandboxError,
    TimedOutError,
    UnavailableError,
    UnsupportedError,
    from_code,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmsandbox_protocol import agent_pb2 as pb

_TEXT_LIMIT = 4096
_ENTRIES_LIMIT = 65536
_STRING_LIMIT = 65536
#: steps of which an answer tells how long they took, and microseconds for all of them
_MOST_PHASES = 16
_LONGEST_PHASE = 1 << 42
_PHASE = re.compile(r"[a-z_]{1,32}")
_EXEC_ID = re.compile(r"[a-zA-Z0-9][\w.+-]{0,127}", re.ASCII)
#: codes that the agent gives (docs/agent.md); the others say something about the host, of which it knows nothing
_CODES = frozenset(
    {
        "already-exists",
        "command-not-executable",
        "command-not-found",
        "exhausted",
        "internal",
        "invalid-argument",
        "invalid-state",
        "not-found",
        "timed-out",
        "unavailable",
        "unsupported",
    }
)
#: what a terminal could take for a command, and line ends
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def protocol() -> Any:
    """The generated messages, imported when they are needed."""
    from vmsandbox_protocol import agent_pb2

    return agent_pb2


def broken(how: str) -> UnavailableError:
    return UnavailableError(f"the agent broke the protocol: {how}; its guest is damaged or hostile, remove the pod")


def check_exit(status: pb.ExitStatus) -> None:
    if status.code > 255 or status.signal > 64:
        raise broken(f"exit code {status.code} with signal {status.signal}")


def check_phases(phases: Mapping[str, int]) -> None:
    """Refuse what nobody would want to read: they go into documents."""
    if len(phases) > _MOST_PHASES or not all(map(_PHASE.fullmatch, phases)):
        raise broken("its phases are not those of an agent")
    if any(micros >= _LONGEST_PHASE for micros in phases.values()):
        raise broken("one of its phases takes longer than any machine runs")


def check_process(state: pb.ProcessState) -> None:
    """Refuse what cannot be a process of a container: execs go into documents by their ids."""
    if state.exec_id and not _EXEC_ID.fullmatch(state.exec_id):
        raise broken(f"it has an exec '{state.exec_id[:130]}'")
    if state.HasField("exit"):
        check_exit(state.exit)


def moment(time_ns: int) -> int:
    """Refuse what no clock shows."""
    if time_ns >= 1 << 62:
        raise broken(f"its clock shows {time_ns} ns")
    return time_ns


def check_bounds(message: Any) -> None:
    """Refuse answers with more entries or longer texts than an honest agent has, and free texts of control characters.

    Where a name could not be told from its cleaned form, in keys and lists, control characters are refused.
    """
    if message is None:
        raise broken("an answer is no message")
    for field, value in message.ListFields():
        if field.is_repeated:
            _check_entries(field, value)
        elif isinstance(value, str):
            _check_length(field, value)
            if _CONTROL.search(value):
                setattr(message, field.name, _CONTROL.sub("?", value))
        elif field.message_type is not None:
            check_bounds(value)


def _check_entries(field: Any, value: Any) -> None:
    if len(value) > _ENTRIES_LIMIT:
        raise broken(f"'{field.name}' has {len(value)} entries")
    # What the descriptor says of itself costs loading the description of all descriptors.
    for entry in chain(value.keys(), value.values()) if isinstance(value, Mapping) else value:
        if isinstance(entry, str):
            _check_length(field, entry)
            if _CONTROL.search(entry):
                raise broken(f"'{field.name}' has control characters")
        elif hasattr(entry, "ListFields"):
            check_bounds(entry)


def _check_length(field: Any, text: str) -> None:
    if len(text) > _STRING_LIMIT:
        raise broken(f"'{field.name}' is too long")


@contextmanager
def translating() -> Iterator[None]:
    """Whatever a call of gRPC's raises in the block is one of our errors."""
    import grpc

    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise translated(error) from None
    except grpc.aio.UsageError:
        raise closed() from None
    except asyncio.CancelledError:
        # Closing the channel cancels its calls, which looks like a cancellation of this task.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise closed() from None


def closed() -> UnavailableError:
    return UnavailableError("the connection to the agent was closed")


def translated(error: Any) -> SandboxError:
    return status_translated(error.code(), error.details(), error.trailing_metadata())


def status_translated(status: Any, details: str | None, metadata: Any) -> SandboxError:
    """The error of ours that a gRPC status stands for."""
    import grpc

    message = _clean(details or "")
    table = {key: _clean(value) for key, value in metadata or () if isinstance(value, str)}
    code = table.get("vmsandbox-code")
    if code is not None:
        error = from_code(code if code in _CODES else SandboxError.code, message)
        if isinstance(error, InvalidStateError):
            error.subject = table.get("vmsandbox-subject", "")
            error.state = table.get("vmsandbox-state", "")
            error.wanted = table.get("vmsandbox-wanted", "")
        return error
    if status == grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOutError("the agent has not answered in time")
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return UnavailableError(f"the connection to the agent is gone: {message}")
    if status == grpc.StatusCode.UNIMPLEMENTED:
        return UnsupportedError(f"the agent cannot do this: {message}")
    if status == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return broken(f"a message is too large: {message}")
    # Our agent gives a code with every error of its own.
    return UnavailableError(f"the agent failed: {message}")


def _clean(text: str) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", text[:_TEXT_LIMIT])
