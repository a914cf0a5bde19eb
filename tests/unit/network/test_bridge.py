"""The range of the default network is nobody else's, and nothing is written for one that cannot be had."""

from __future__ import annotations

import ipaddress
import json
from typing import TYPE_CHECKING

import pytest

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.paths import Roots
from vmsandbox.resources.network import bridge as bridges
from vmsandbox.resources.network.bridge import Bridge

if TYPE_CHECKING:
    from pathlib import Path

#: a host with a loopback, the network 192.0.2.0/24 with a default route, and single addresses of its own
FIB = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 192.0.2.0/24 2 0 2
        |-- 192.0.2.0
           /24 link UNICAST
        |-- 192.0.2.9
           /32 host LOCAL
        |-- 192.0.2.255
           /32 link BROADCAST
     |-- 10.90.0.2
        /32 host LOCAL
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.0
           /8 host LOCAL
"""


@pytest.fixture
def bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bridge:
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/fib_trie").write_text(FIB)
    monkeypatch.setattr(Bridge, "exists", staticmethod(lambda _name: False))
    return Bridge(Roots(str(tmp_path / "run"), str(tmp_path / "data")), proc=str(tmp_path / "proc"))


def test_a_range_is_chosen_in_which_the_host_has_no_address_either(bridge: Bridge) -> None:
    (own,) = bridges.subnets_of(bridge.prepare())
    assert own == ipaddress.ip_network("10.91.0.0/16")


@pytest.mark.parametrize(
    ("subnet", "why"),
    [
        ("10.93.0.7/16", "is not a network"),
        ("10.93.0.0/40", "is not a network"),
        ("lan", "is not a network"),
        ("10.93.0.0/31", "too small"),
        ("10.93.0.0/32", "too small"),
        ("fd00:93::/64", "needs a range of IPv4"),
        ("0.0.0.0/0", "hosts cannot have"),
        ("127.0.0.0/8", "hosts cannot have"),
        ("224.0.0.0/16", "hosts cannot have"),
        ("255.255.255.0/24", "hosts cannot have"),
        ("192.0.2.0/24", "the host uses '192.0.2.0/24'"),
        ("192.0.0.0/16", "the host uses '192.0.2.0/24'"),
        ("10.90.0.0/24", "the host uses '10.90.0.2/32'"),
    ],
)
def test_a_range_that_cannot_be_had_is_refused_before_anything_is_written(
    bridge: Bridge, subnet: str, why: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=why):
        bridge.prepare(subnet=subnet)
    assert not bridge.file.exists()


@pytest.mark.parametrize("subnet", ["10.93.0.0/30", "100.64.0.0/10", "203.0.113.0/24"])
def test_any_other_range_can_be_chosen(bridge: Bridge, subnet: str) -> None:
    assert [str(each) for each in bridges.subnets_of(bridge.prepare(subnet=subnet))] == [subnet]


def test_a_file_with_a_range_that_is_too_small_is_refused(bridge: Bridge) -> None:
    edited = bridge.prepare()
    del edited["vmsandbox"]
    edited["plugins"][0]["ipam"]["ranges"] = [[{"subnet": "10.93.0.0/31"}]]
    bridge.file.write_text(json.dumps(edited))
    with pytest.raises(InvalidArgumentError, match="too small"):
        bridge.prepare()


def test_a_range_that_was_chosen_and_has_become_the_hosts_is_refused(bridge: Bridge, tmp_path: Path) -> None:
    bridge.prepare(subnet="10.93.0.0/16")
    (tmp_path / "proc/net/fib_trie").write_text(FIB.replace("192.0.2.", "10.93.7."))
    with pytest.raises(InvalidArgumentError, match="the host uses"):
        bridge.prepare(subnet="10.93.0.0/16")
