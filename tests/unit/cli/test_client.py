"""What a client makes of a supervisor that ends under it."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from vmsandbox import wire
from vmsandbox.cli import client, launch
from vmsandbox.errors import EndingError, NotFoundError, UnheardError
from vmsandbox.paths import Roots, SandboxPaths

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmsandbox.plainsocket import UnixSocket


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


# ---------------------------------------------------------------- whether a request was read


class Pod:
    """A pod whose supervisors do, one after the other, what they are told: hang up, or serve one connection."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.roots = Roots(str(directory), str(directory))
        self.paths = SandboxPaths(str(directory))
        self.successors: list[Callable[[socket.socket], None]] = []
        monkeypatch.setattr(launch, "connect_or_take_over", lambda _roots, _sandbox: self.reached())

    def reached(self) -> UnixSocket:
        """A connection to the next of them."""
        if not self.successors:
            raise FileNotFoundError
        serve = self.successors.pop(0)
        with launch.listen(self.paths) as bound, socket.socket(fileno=bound.detach()) as listener:
            sock = launch.connect(self.paths)
            if serve is not dies:
                threading.Thread(target=serve, args=(listener.accept()[0],)).start()
        return sock

    def once(self) -> dict[str, object]:
        with self.reached() as sock:
            return client.request_once(self.roots, self.paths, sock, {"verb": "exec"})


def dies(_sock: socket.socket) -> None:
    """Before it accepts anything."""


def refuses(sock: socket.socket) -> None:
    """Accepts, and closes when something is there."""
    with sock:
        sock.recv(1, socket.MSG_PEEK)


def forgets(sock: socket.socket) -> None:
    """Reads the request and is gone."""
    with sock:
        sock.recv(1 << 16)


def answers(sock: socket.socket) -> None:
    with sock:
        sock.recv(1 << 16)
        sock.sendall(wire.encode_message({"ok": 1}))


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pod:
    return Pod(tmp_path, monkeypatch)


def test_what_nobody_read_is_asked_of_the_next_supervisor(pod: Pod) -> None:
    pod.successors = [dies, refuses, answers, answers]
    assert pod.once() == {"ok": 1}
    assert pod.successors == [answers]


def test_what_somebody_read_is_not_asked_a_second_time(pod: Pod) -> None:
    pod.successors = [refuses, forgets, answers]
    with pytest.raises(EndingError, match="without an answer") as raised:
        pod.once()
    assert not isinstance(raised.value, UnheardError)
    assert pod.successors == [answers]


def test_what_no_supervisor_reads_is_given_up(pod: Pod) -> None:
    pod.successors = [dies] * (client.ATTEMPTS + 2)
    with pytest.raises(UnheardError):
        pod.once()
    assert pod.successors == [dies]


def test_a_pod_that_ended_meanwhile_is_said(pod: Pod) -> None:
    pod.successors = [dies]
    with pytest.raises(EndingError, match="the pod has ended"):
        pod.once()


def ends(sock: socket.socket) -> None:
    """Says so, and is there for a while still."""
    with sock:
        sock.recv(1 << 16)
        sock.sendall(wire.encode_message({"error": {"code": "ending", "message": "the pod is gone"}}))
        assert sock.recv(1) == b""  # the other one has nothing more to say, and listens


def test_who_asks_again_does_not_meet_the_one_that_is_ending(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    def wait_for_end(sock: socket.socket) -> None:
        waited.append(len(pod.successors))
        sock.shutdown(socket.SHUT_WR)
        wait(sock)

    wait = client.wait_for_end
    monkeypatch.setattr(client, "wait_for_end", wait_for_end)
    pod.successors = [ends, answers]

    def attempt() -> dict[str, object]:
        with pod.reached() as sock:
            return client.request(sock, {"verb": "start"})

    assert client.insisting(attempt) == {"ok": 1}
    assert waited == [1]
