"""One request to a pod's supervisor: a frame out, a frame back."""

from __future__ import annotations

from vmsandbox import wire
from vmsandbox.cli import launch
from vmsandbox.errors import EndingError, SandboxError, UnheardError, from_code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from vmsandbox.paths import Roots, SandboxPaths
    from vmsandbox.plainsocket import Socket

    T = TypeVar("T")

#: A supervisor that ends is followed by one that knows; a third that fails is broken.
ATTEMPTS = 3


def send(sock: Socket, request: dict[str, Any]) -> None:
    try:
        sock.sendall(wire.encode_message(request))
    except OSError as error:
        raise UnheardError(f"the pod's supervisor is gone: {error.strerror}") from error


def answer(sock: Socket) -> dict[str, Any]:
    """Wait for the reply; an error reply is raised as the class it was over there."""
    try:
        frame = wire.receive(sock)
    except ConnectionResetError as error:
        # What the kernel says of a Unix socket that was closed with something in it that nobody had read.
        raise UnheardError(f"the pod's supervisor ended before it was asked: {error.strerror}") from error
    except (OSError, wire.WireError) as error:
        raise EndingError(f"the pod's supervisor broke off: {error}") from error
    if frame is None:
        raise EndingError("the pod's supervisor ended without an answer; its log may say why ('--debug')")
    reply = frame.message()
    if "error" in reply:
        told = rebuilt(reply["error"])
        if isinstance(told, EndingError):
            wait_for_end(sock)  # who asks again is not to meet the same one
        raise told
    return reply


def rebuilt(error: dict[str, Any]) -> SandboxError:
    return from_code(str(error.get("code")), str(error.get("message")), str(error.get("detail", "")))


def request(sock: Socket, message: dict[str, Any]) -> dict[str, Any]:
    """Send one request and wait for its answer."""
    send(sock, message)
    return answer(sock)


def request_once(roots: Roots, sandbox: SandboxPaths, sock: Socket, message: dict[str, Any]) -> dict[str, Any]:
    """Send one request that must not be carried out twice: again, to the next supervisor, only if it was not read."""

    def again() -> dict[str, Any]:
        try:
            another = launch.connect_or_take_over(roots, sandbox)
        except FileNotFoundError:
            raise EndingError("the pod has ended") from None
        with another:
            return request(another, message)

    try:
        return request(sock, message)
    except UnheardError:
        return insisting(again, after=UnheardError)


def insisting(attempt: Callable[[], T], *, after: type[EndingError] = EndingError) -> T:
    """Do what asks a supervisor; again, from the documents on, when it was just ending.

    `attempt` looks up what it needs itself each time: what was a pod may be a stopped container by then.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return attempt()
        except after:
            continue
    return attempt()


def wait_for_end(sock: Socket) -> None:
    """Wait until the supervisor has closed the connection, which it does when everything is released."""
    try:
        while sock.recv(65536):
            pass
    except OSError:
        return
