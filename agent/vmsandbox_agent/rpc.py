"""RPCs as methods: whatever one raises becomes a status of gRPC's.

An error of ours has its code in the trailing metadata, where the host looks for it; the status' text is for people.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from vmsandbox_agent import errors

#: trailing metadata: what the host branches on
CODE_KEY = "vmsandbox-code"
SUBJECT_KEY = "vmsandbox-subject"
STATE_KEY = "vmsandbox-state"
WANTED_KEY = "vmsandbox-wanted"

_STATUS = {
    "not-found": grpc.StatusCode.NOT_FOUND,
    "command-not-found": grpc.StatusCode.NOT_FOUND,
    "already-exists": grpc.StatusCode.ALREADY_EXISTS,
    "invalid-state": grpc.StatusCode.FAILED_PRECONDITION,
    "invalid-argument": grpc.StatusCode.INVALID_ARGUMENT,
    "command-not-executable": grpc.StatusCode.PERMISSION_DENIED,
    "unsupported": grpc.StatusCode.UNIMPLEMENTED,
    "exhausted": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.ABORTED,
    "timed-out": grpc.StatusCode.DEADLINE_EXCEEDED,
}
_MESSAGE_LIMIT = 4096

F = TypeVar("F", bound=Callable[..., Any])


def _abort(context: grpc.ServicerContext, error: Exception) -> None:
    """End the call with the status for an error; does not return."""
    if isinstance(error, errors.AgentError):
        code = error.code
        message = str(error)
    else:
        traceback.print_exc()
        code = "internal"
        message = f"{type(error).__name__}: {error}"
    metadata = [(CODE_KEY, code)]
    if isinstance(error, errors.InvalidStateError):
        metadata += [(SUBJECT_KEY, error.subject), (STATE_KEY, error.state), (WANTED_KEY, error.wanted)]
    context.set_trailing_metadata([(key, _printable(value)) for key, value in metadata])
    context.abort(_STATUS.get(code, grpc.StatusCode.INTERNAL), _printable(message))


def _printable(text: str) -> str:
    return text[:_MESSAGE_LIMIT].encode("ascii", "replace").decode()


def rpc(method: F) -> F:
    """An RPC with one answer."""

    @functools.wraps(method)
    def wrapped(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except Exception as error:
            _abort(context, error)

    return wrapped  # type: ignore[return-value]


def streaming(method: F) -> F:
    """An RPC that answers with a stream."""

    @functools.wraps(method)
    def wrapped(self: Any, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(self, request, context)
        except Exception as error:
            _abort(context, error)

    return wrapped  # type: ignore[return-value]
