"""RPCs as methods: each takes a request and its stream, and answers; whatever it raises becomes a status of gRPC's.

An error of ours has its code in the trailers, where the host looks for it; the status' text is for people.
"""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from vmsandbox_agent import errors
from vmsandbox_agent.http2 import Connection, Stream, StreamOver

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.descriptor import ServiceDescriptor

    from vmsandbox_agent.http2 import Headers

#: trailers: what the host branches on
CODE_KEY: Final = "vmsandbox-code"
SUBJECT_KEY: Final = "vmsandbox-subject"
STATE_KEY: Final = "vmsandbox-state"
WANTED_KEY: Final = "vmsandbox-wanted"

_OK: Final = (("grpc-status", "0"),)
_UNIMPLEMENTED: Final = 12
_INTERNAL: Final = 13
#: gRPC's status for each of our codes
_STATUS: Final = {
    "not-found": 5,
    "command-not-found": 5,
    "already-exists": 6,
    "invalid-state": 9,
    "invalid-argument": 3,
    "command-not-executable": 7,
    "unsupported": _UNIMPLEMENTED,
    "exhausted": 8,
    "unavailable": 10,
    "timed-out": 4,
    "internal": _INTERNAL,
}
_MESSAGE_LIMIT: Final = 4096
_STACK: Final = 512 * 1024


class Method(NamedTuple):
    """What serves one RPC: ``handle(request, stream)``, or with `takes_many` an iterator of requests.

    With `gives_many` it answers with an iterator, which is closed when the host has lost interest.
    """

    handle: Callable[[Any, Stream], Any]
    request: Any
    takes_many: bool
    gives_many: bool


class Methods:
    """Everything that is served, each call in a thread of its own: a connection bounds how many there are."""

    def __init__(self) -> None:
        self._table: dict[bytes, Method] = {}
        threading.stack_size(_STACK)

    def add(self, service: ServiceDescriptor, implementation: object) -> None:
        """Serve a service by the methods of an object, which has to have all of them."""
        for method in service.methods:
            self._table[f"/{service.full_name}/{method.name}".encode()] = Method(
                getattr(implementation, method.name),
                GetMessageClass(method.input_type),
                method.client_streaming,
                method.server_streaming,
            )

    def connection(self) -> Connection:
        """What serves a host that has come."""
        return Connection(self._begin)

    def _begin(self, stream: Stream, headers: dict[bytes, bytes]) -> None:
        path = headers.get(b":path", b"")
        arguments = (stream, self._table.get(path), path)
        threading.Thread(target=_serve, args=arguments, name="rpc", daemon=True).start()


def _serve(stream: Stream, method: Method | None, path: bytes) -> None:
    try:
        if method is None:
            raise errors.UnsupportedError(f"there is no method '{path.decode(errors='replace')}'")
        requests = (_parsed(method, message) for message in stream.messages())
        request = requests if method.takes_many else next(requests, None)
        if request is None:
            raise errors.InvalidArgumentError(f"'{path.decode()}' takes a request")
        answered = method.handle(request, stream)
        if method.gives_many:
            with closing(answered):
                for answer in answered:
                    stream.send(answer.SerializeToString())
            stream.end(_OK)
        else:
            stream.send(answered.SerializeToString(), _OK)
    except StreamOver:
        pass
    except Exception as error:
        stream.end(_trailers(error))


def _parsed(method: Method, message: bytes) -> Any:
    try:
        return method.request.FromString(message)
    except DecodeError as error:
        raise errors.InvalidArgumentError(f"the host sent what is no {method.request.__name__}") from error


def _trailers(error: Exception) -> Headers:
    """The end of a call that failed."""
    if isinstance(error, errors.AgentError):
        code = error.code
        message = str(error)
    else:
        import traceback

        traceback.print_exc()
        code = "internal"
        message = f"{type(error).__name__}: {error}"
    trailers = [("grpc-status", str(_STATUS.get(code, _INTERNAL))), ("grpc-message", _percent_encoded(message))]
    trailers.append((CODE_KEY, code))
    if isinstance(error, errors.InvalidStateError):
        trailers += [(SUBJECT_KEY, error.subject), (STATE_KEY, error.state), (WANTED_KEY, error.wanted)]
    return [(key, _printable(value)) for key, value in trailers]


def _percent_encoded(text: str) -> str:
    return "".join(char if " " <= char <= "~" and char != "%" else f"%{ord(char):02X}" for char in _printable(text))


def _printable(text: str) -> str:
    return text[:_MESSAGE_LIMIT].encode("ascii", "replace").decode()
