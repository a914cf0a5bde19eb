"""Hosts files, resolvers, and pods that learn of each other."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from vmsandbox.resources.network import names

if TYPE_CHECKING:
    from pathlib import Path


def test_a_resolver_on_the_loopback_is_replaced_by_whom_it_asks(tmp_path: Path) -> None:
    etc, upstream = tmp_path / "resolv.conf", tmp_path / "upstream"
    etc.write_text("# stub\nnameserver 127.0.0.53\nsearch example.org lan\noptions edns0 trust-ad ; really\n")
    upstream.write_text("nameserver 192.0.2.53\nnameserver fe80::1%eth0\nnameserver 2001:db8::53\n")
    found = names.host_resolver(etc=str(etc), upstream=(str(tmp_path / "missing"), str(upstream)))
    assert found.servers == ("192.0.2.53", "2001:db8::53")
    assert found.searches == ("example.org", "lan")
    assert found.options == ("edns0", "trust-ad")


def test_a_resolver_that_can_be_reached_stays(tmp_path: Path) -> None:
    etc, upstream = tmp_path / "resolv.conf", tmp_path / "upstream"
    etc.write_text("nameserver 127.0.0.1\nnameserver 192.0.2.1\nnameserver ::1\ndomain example.org\n")
    upstream.write_text("nameserver 192.0.2.53\n")
    found = names.host_resolver(etc=str(etc), upstream=(str(upstream),))
    assert found.servers == ("192.0.2.1",)
    assert found.searches == ("example.org",)


def test_a_host_without_a_resolver_has_none(tmp_path: Path) -> None:
    found = names.host_resolver(etc=str(tmp_path / "missing"), upstream=())
    assert (found.servers, found.searches, found.options) == ((), (), ())


@pytest.mark.parametrize("server", ["127.0.0.53", "::1", "0.0.0.0", "fe80::1%eth0", "resolver", ""])
def test_what_only_the_host_reaches_is_known(server: str) -> None:
    assert not names.is_reachable(server)


def test_a_hosts_file_begins_with_the_loopback() -> None:
    text = names.hosts_file([("10.90.0.2", "web abc")], [("10.90.0.3", "db")]).decode()
    assert text.splitlines() == [
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        "10.90.0.2\tweb abc",
        "10.90.0.3\tdb",
    ]


def test_pods_know_each_other_but_not_themselves(tmp_path: Path) -> None:
    directory = tmp_path / "names"
    assert names.others(directory, "a") == []
    names.announce(directory, "a", [("10.90.0.2", "web")])
    names.announce(directory, "b", [("10.90.0.3", "db"), ("fd00::3", "db")])
    (directory / "broken").write_text("{")
    (directory / "foreign").write_text("[1]")
    assert names.others(directory, "a") == [("10.90.0.3", "db"), ("fd00::3", "db")]
    assert names.others(directory, "b") == [("10.90.0.2", "web")]
    names.withdraw(directory, "a")
    names.withdraw(directory, "a")
    assert names.others(directory, "b") == []


async def test_every_change_is_told_and_many_as_one(tmp_path: Path) -> None:
    directory = tmp_path / "names"
    seen: list[list[tuple[str, str]]] = []
    first = asyncio.Event()

    async def watch() -> None:
        async for _ in names.changes(directory):
            seen.append(names.others(directory, "me"))
            first.set()
            if seen[-1] == [("10.90.0.9", "last")]:
                return

    watching = asyncio.create_task(watch())
    await first.wait()
    for number in range(20):
        names.announce(directory, f"pod{number}", [("10.90.0.2", "web")])
        names.withdraw(directory, f"pod{number}")
    names.announce(directory, "last", [("10.90.0.9", "last")])
    await watching
    assert seen[0] == []
    assert len(seen) < 20
