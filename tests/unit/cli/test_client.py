"""What a client makes of a supervisor that ends under it."""

from __future__ import annotations

import socket

import pytest

from vmsandbox import wire
from vmsandbox.cli import client
from vmsandbox.errors import EndingError, NotFoundError


def connection(reply: bytes) -> socket.socket:
    """A connection whose other end has answered that and is gone."""
    ours, theirs = socket.socketpair()
    theirs.sendall(reply)
    theirs.shutdown(socket.SHUT_WR)
    theirs.detach()  # open, so that what is sent does not fail
    return ours


@pytest.mark.parametrize("reply", [b"", wire.encode_message({"ok": 1})[:-2]], ids=["nothing", "half"])
def test_an_end_without_an_answer_is_told_from_an_error(reply: bytes) -> None:
    with connection(reply) as sock, pytest.raises(EndingError):
        client.request(sock, {"verb": "delete"})


def test_a_supervisor_that_ends_is_asked_again_through_the_documents() -> None:
    replies = [b"", wire.encode_message({"ok": 1})]

    def attempt() -> dict[str, object]:
        with connection(replies.pop(0)) as sock:
            return client.request(sock, {"verb": "delete"})

    assert client.insisting(attempt) == {"ok": 1}


def test_an_answer_is_not_asked_for_twice() -> None:
    asked = []

    def attempt() -> None:
        asked.append(1)
        raise NotFoundError("no such container")

    with pytest.raises(NotFoundError):
        client.insisting(attempt)
    assert asked == [1]


def test_a_supervisor_that_always_ends_is_given_up() -> None:
    asked = []

    def attempt() -> None:
        asked.append(1)
        raise EndingError("gone")

    with pytest.raises(EndingError):
        client.insisting(attempt)
    assert len(asked) == client.ATTEMPTS
