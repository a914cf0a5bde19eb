"""What is asked of the guest's name server goes to the host, and its answers to whoever asked."""

from __future__ import annotations

import socket
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from vmsandbox_agent import naming
from vmsandbox_agent.errors import UnavailableError
from vmsandbox_agent.naming import NameServer

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS = "127.0.0.11"


@pytest.fixture
def server() -> Iterator[NameServer]:
    with closing(NameServer(ADDRESS, 0)) as made:
        yield made


@pytest.fixture
def datagrams(server: NameServer) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(30)
        sock.connect((ADDRESS, server.port))
        yield sock


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


@pytest.mark.deadline(60)
def test_datagrams_are_answered_in_any_order(server: NameServer, datagrams: socket.socket) -> None:
    questions = server.questions()
    datagrams.send(b"first")
    first = next(questions)
    datagrams.send(b"second")
    second = next(questions)
    assert [(each.message, each.by_tcp) for each in (first, second)] == [(b"first", False), (b"second", False)]
    server.answer(second.number, b"to the second")
    server.answer(second.number, b"twice")
    server.answer(9999, b"to nobody")
    assert datagrams.recv(100) == b"to the second"
    server.answer(first.number, b"to the first")
    assert datagrams.recv(100) == b"to the first"


@pytest.mark.deadline(60)
def test_a_connection_may_ask_several_times(server: NameServer) -> None:
    questions = server.questions()
    with socket.create_connection((ADDRESS, server.port), timeout=30) as sock, sock.makefile("rb") as stream:
        for message in (b"one", b"x" * 60_000):
            sock.sendall(framed(message))
            question = next(questions)
            assert (question.message, question.by_tcp) == (message, True)
            server.answer(question.number, b"answer to " + message)
            assert stream.read(2 + 10 + len(message)) == framed(b"answer to " + message)


@pytest.mark.deadline(60)
def test_who_asks_too_much_loses_the_oldest(
    server: NameServer, datagrams: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naming, "MOST_WAITING", 2)
    questions = server.questions()
    asked = []
    for message in (b"a", b"b", b"c"):
        datagrams.send(message)
        asked.append(next(questions))
    for question in asked:
        server.answer(question.number, b"answer to " + question.message)
    assert [datagrams.recv(100) for _ in range(2)] == [b"answer to b", b"answer to c"]


@pytest.mark.deadline(60)
def test_what_is_closed_asks_no_more_and_can_be_had_again() -> None:
    server = NameServer(ADDRESS, 0)
    port = server.port
    with pytest.raises(UnavailableError, match=f"cannot listen for names at {ADDRESS}"):
        NameServer(ADDRESS, port)
    server.close()
    server.close()
    assert list(server.questions()) == []
    with closing(NameServer(ADDRESS, port)) as again:
        assert again.port == port
