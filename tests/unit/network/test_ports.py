"""Ports of the host are held while a pod has them, and what another program has is left to it."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from vmsandbox.errors import AlreadyExistsError
from vmsandbox.paths import Roots
from vmsandbox.resources.network import pod, ports
from vmsandbox.resources.network.options import NetworkOptions, Port

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def free() -> list[int]:
    """Two ports that nobody has."""
    with socket.socket() as one, socket.socket() as two:
        for sock in (one, two):
            sock.bind(("", 0))
        return [sock.getsockname()[1] for sock in (one, two)]


def is_free(number: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("", number))
        except OSError:
            return False
    return True


def test_all_ports_are_reserved_or_none(free: list[int]) -> None:
    wanted = [Port(host=number, inner=80) for number in free]
    held = ports.reserved(wanted, ipv6=True)
    assert not any(is_free(number) for number in free)
    for sock in held:
        sock.close()
    with socket.socket() as taken:
        taken.bind(("", free[1]))
        with pytest.raises(AlreadyExistsError, match=f"port '{free[1]}/tcp' of the host is in use"):
            ports.reserved(wanted, ipv6=False)
        assert is_free(free[0])


def test_a_later_supervisor_holds_the_ports_that_are_left(free: list[int], tmp_path: Path) -> None:
    place = pod.Place(roots=Roots(tmp_path / "run", tmp_path / "data"), sandbox_id="beef" * 16)
    options = NetworkOptions(kind="default", ports=tuple(Port(host=number, inner=80) for number in free))
    with socket.socket() as taken:
        taken.bind(("", free[0]))
        network = pod.known(place, options)
        try:
            assert not is_free(free[1])
        finally:
            network.let_go()
    assert is_free(free[1])
