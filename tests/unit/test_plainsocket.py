"""Sockets without the module of that name."""

from __future__ import annotations

import os
import socket

import pytest

from vmsandbox import plainsocket
from vmsandbox.plainsocket import SOCK_SEQPACKET, UnixSocket


def test_descriptors_pass_between_them_and_pythons_own() -> None:
    reading, writing = os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, UnixSocket(fileno=theirs.detach()) as plain:
        plainsocket.send_descriptors(plain, b"ab", [writing, reading])
        data, descriptors, _, _ = socket.recv_fds(ours, 8, 4)
        assert (data, len(descriptors)) == (b"ab", 2)
        socket.send_fds(ours, [b"c"], [descriptors[0]])
        said, found = plainsocket.receive_descriptor(plain, 8)
        assert said == b"c"
        os.write(found, b"through")
        assert os.read(reading, 8) == b"through"
        ours.send(b"d")
        assert plainsocket.receive_descriptor(plain, 8) == (b"d", -1)
        for fd in (*descriptors, found, reading, writing):
            os.close(fd)


def test_they_are_closed_with_their_block_and_not_inherited() -> None:
    one, other = plainsocket.pair(SOCK_SEQPACKET)
    assert not os.get_inheritable(one.fileno())
    with one:
        one.send(b"a")
        assert other.recv(8) == b"a"
    assert one.fileno() == -1
    with other:
        assert other.recv(8) == b""


def test_a_path_that_nobody_serves_is_refused(tmp_path: os.PathLike[str]) -> None:
    path = f"{os.fspath(tmp_path)}/socket"
    with UnixSocket() as bound:
        bound.bind(path)
    with UnixSocket() as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(path)
