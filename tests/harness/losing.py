"""Connections that break at a moment that a test chooses: between a client and the supervisor that it asks."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal

from vmsandbox import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

#: what comes about: nothing, or everything but the news of it
Lost = Literal["request", "answer"]


@contextmanager
def losing(control: Path, verb: str, lost: Lost, *, then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Once in the block, lose a `verb` request to the supervisor that listens at `control`, or its answer.

    `then` is done before the client can notice.  Whoever asks again, asks the supervisor itself.
    """
    behind = control.with_name("behind")
    control.rename(behind)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(control))
    listener.listen()
    done: list[str] = []

    def lose() -> None:
        while not done:
            connection, _ = listener.accept()
            with connection:
                frame = wire.receive(connection)
                request = frame.message() if frame is not None else {}
                if request.get("verb") != verb:
                    continue  # asked again once this is over
                done.append(verb)
                if lost == "answer":
                    _carry_out(behind, request)
                # Gone with its pod, it may be.
                with suppress(FileNotFoundError):
                    behind.replace(control)
                listener.close()
                then()

    thread = threading.Thread(target=lose, name="losing", daemon=True)
    thread.start()
    yield
    assert done == [verb], f"nobody has asked for '{verb}'"
    thread.join()


def _carry_out(behind: Path, request: dict[str, object]) -> None:
    with socket.socket(socket.AF_UNIX) as real:
        real.connect(str(behind))
        real.sendall(wire.encode_message(request))
        answer = wire.receive(real)
        assert answer is not None
        assert "error" not in answer.message(), answer.message()
