"""Interfaces of a namespace and their taps, with real kernels' devices; the test plays QEMU and the guest."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.harness import frames
from tests.harness.frames import BROADCAST, NO_OFFLOAD, OTHER, arp, ipv4
from tests.harness.netns import Netns, namespace
from vmsandbox.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from vmsandbox.resources.network import attach, namespaces
from vmsandbox.resources.network.model import Address, Endpoint, Neighbour, Route

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GUEST = "02:aa:bb:cc:dd:01"
PEER = "02:aa:bb:cc:dd:99"


@pytest.fixture
def pair() -> Iterator[tuple[Netns, Netns]]:
    """A pod's namespace with an interface like an engine's, and the namespace its cable leads to."""
    with namespace("vmstest-pod") as pod, namespace("vmstest-peer") as peer:
        pod.run(
            f"ip link add eth0 address {GUEST} type veth peer name peer0 address {PEER} netns {peer.name}",
            "ip addr add 10.9.0.2/24 dev eth0",
            "ip addr add fd09::2/64 dev eth0 nodad",
            "ip link set eth0 up",
        )
        peer.run(
            "sysctl -qw net.ipv6.conf.peer0.disable_ipv6=1",
            "ip addr add 10.9.0.1/24 dev peer0",
            "ip link set peer0 up",
        )
        pod.run("ip route add default via 10.9.0.1")
        pod.settle("eth0")
        yield pod, peer


def of(taps: list[attach.Tap], name: str) -> attach.Tap:
    return next(tap for tap in taps if tap.endpoint.name == name)


def send(tap: attach.Tap, frame: bytes) -> None:
    os.write(tap.fd, NO_OFFLOAD + frame)


def frames_at(tap: attach.Tap, seconds: float) -> Iterator[bytes]:
    """What the guest receives, until nothing came for so long."""
    poll = select.poll()
    poll.register(tap.fd, select.POLLIN)
    while poll.poll(seconds * 1000):
        yield os.read(tap.fd, 65536)[len(NO_OFFLOAD) :]


@contextmanager
def unchanged(*spaces: Netns) -> Iterator[None]:
    before = [space.state() for space in spaces]
    yield
    for space, old in zip(spaces, before, strict=True):
        assert space.state() == old


# ---------------------------------------------------------------- looking


@pytest.mark.deadline(60)
async def test_an_interface_is_seen_with_all_it_has(pair: tuple[Netns, Netns]) -> None:
    pod, _ = pair
    pod.run(
        "ip link set eth0 mtu 9000",
        "ip addr add 10.9.1.1 peer 10.9.1.2/32 dev eth0",
        "ip route add 10.50.0.0/16 via 169.254.1.1 dev eth0 onlink metric 7 mtu 1400 src 10.9.0.2",
        "ip route add blackhole 10.60.0.0/16",
        "ip -6 route add default via fd09::1 metric 100",
        "ip neigh add 10.9.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
        "ip neigh add fd09::9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
        "sysctl -qw net.ipv6.conf.eth0.accept_ra=0",
    )
    (endpoint,) = await attach.scan(pod.path)
    assert (endpoint.name, endpoint.mac, endpoint.mtu) == ("eth0", GUEST, 9000)
    assert (endpoint.kind, endpoint.up) == ("veth", True)
    assert set(endpoint.addresses) == {
        Address(address="10.9.0.2", prefix=24),
        Address(address="10.9.1.1", prefix=32, peer="10.9.1.2"),
        Address(address="fd09::2", prefix=64),
    }
    assert set(endpoint.routes) == {
        Route(destination="0.0.0.0/0", gateway="10.9.0.1"),
        Route(destination="10.9.0.0/24", source="10.9.0.2", scope="link"),
        Route(destination="10.9.1.2/32", source="10.9.1.1", scope="link"),
        Route(destination="10.50.0.0/16", gateway="169.254.1.1", source="10.9.0.2", metric=7, onlink=True, mtu=1400),
        Route(destination="10.60.0.0/16", type="blackhole"),
        Route(destination="::/0", gateway="fd09::1", metric=100),
        Route(destination="fd09::/64", metric=256),
    }
    assert set(endpoint.neighbours) == {
        Neighbour(address="10.9.0.9", mac="02:00:00:00:00:09"),
        Neighbour(address="fd09::9", mac="02:00:00:00:00:09"),
    }
    assert endpoint.sysctls["ipv6/accept_ra"] == "0"
    assert Endpoint.of(endpoint.document()) == endpoint


@pytest.mark.deadline(60)
async def test_addresses_that_were_leased_or_announced_are_seen_as_well(pair: tuple[Netns, Netns]) -> None:
    pod, _ = pair
    pod.run(
        "ip addr add fd09::77/64 dev eth0 nodad valid_lft 3600 preferred_lft 1800",
        "ip -6 route add default via fe80::1 dev eth0 proto ra metric 1024 expires 600",
        "ip -6 route add fd99::/64 via fe80::1 dev eth0 proto static",
    )
    (endpoint,) = await attach.scan(pod.path)
    assert Address(address="fd09::77", prefix=64) in endpoint.addresses
    assert [each.address for each in endpoint.addresses if each.scope == "link"] == []
    # The guest hears of the router itself, and refuses to if it has such a route already.
    assert "::/0" not in {each.destination for each in endpoint.routes}
    assert "fd99::/64" in {each.destination for each in endpoint.routes}


@pytest.mark.deadline(60)
async def test_link_local_addresses_of_somebodys_choice_are_all_that_the_guest_has(pair: tuple[Netns, Netns]) -> None:
    pod, _ = pair
    pod.settle("eth0")
    pod.run("ip addr add fe80::5/64 dev eth0 nodad")
    (endpoint,) = await attach.scan(pod.path)
    assert "fe80::5" in {each.address for each in endpoint.addresses if each.scope == "link"}
    assert len([each for each in endpoint.addresses if each.scope == "link"]) == 2
    assert endpoint.sysctls["ipv6/addr_gen_mode"] == "1"


@pytest.mark.deadline(60)
async def test_several_interfaces_share_a_route(pair: tuple[Netns, Netns]) -> None:
    pod, peer = pair
    pod.run(
        f"ip link add eth1 type veth peer name peer1 netns {peer.name}",
        "ip addr add 10.10.0.2/24 dev eth1",
        "ip link set eth1 up",
        "ip route add 10.70.0.0/16 nexthop via 10.9.0.1 weight 1 nexthop via 10.10.0.1 weight 3",
    )
    first, second = await attach.scan(pod.path)
    assert (first.name, second.name) == ("eth0", "eth1")
    assert Route(destination="10.70.0.0/16", gateway="10.9.0.1", weight=1) in first.routes
    assert Route(destination="10.70.0.0/16", gateway="10.10.0.1", weight=3) in second.routes


@pytest.mark.deadline(60)
async def test_what_is_no_interface_of_the_pod_is_left_alone(pair: tuple[Netns, Netns]) -> None:
    pod, _ = pair
    pod.run(
        "ip link add unused0 type veth peer name unused1",
        "ip link add port0 type veth peer name port1",
        "ip link add br0 type bridge",
        "ip link set port0 master br0 up",
    )
    assert [endpoint.name for endpoint in await attach.scan(pod.path)] == ["eth0"]


SCAN = """
import asyncio, sys
from vmsandbox.resources.network import attach
print(*[endpoint.name for endpoint in asyncio.run(attach.scan(sys.argv[1]))])
"""


@pytest.mark.parametrize("before", ["", "import grpc"], ids=["forked", "started anew"])
def test_a_helper_comes_about_whatever_is_loaded(pair: tuple[Netns, Netns], before: str) -> None:
    argv = [sys.executable, "-c", before + SCAN, pair[0].path]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("eth0\n", "")


async def test_a_helper_that_is_not_asked_ends() -> None:
    helper = attach.Helper()
    await helper.close()
    await helper.close()


async def test_a_namespace_without_interfaces_has_none() -> None:
    with namespace("vmstest-bare") as bare:
        assert await attach.scan(bare.path) == []
        async with attach.attached(bare.path) as taps:
            assert taps == []


# ---------------------------------------------------------------- refusals


async def test_the_hosts_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(f"/proc/{os.getpid()}/ns/net")
    for path in ("/proc/self/ns/net", str(tmp_path / "link")):
        with pytest.raises(UnsupportedError, match="cannot join the host's network"):
            await attach.attach(path)


async def test_what_is_no_network_namespace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("/proc/self/ns/mnt", str(tmp_path / "file"), str(tmp_path / "missing")):
        with pytest.raises(InvalidArgumentError):
            await attach.attach(path)


@pytest.mark.deadline(60)
async def test_an_unknown_interface_is_refused_and_nothing_changes(pair: tuple[Netns, Netns]) -> None:
    pod, _ = pair
    with unchanged(pod), pytest.raises(NotFoundError, match="'eth7'"):
        await attach.attach(pod.path, names=["eth0", "eth7"])


@pytest.mark.deadline(60)
async def test_an_interface_belongs_to_one_pod(pair: tuple[Netns, Netns]) -> None:
    pod, _ = pair
    async with attach.attached(pod.path):
        with unchanged(pod), pytest.raises(AlreadyExistsError, match="'eth0'"):
            await attach.attach(pod.path)


@pytest.mark.deadline(60)
async def test_a_failure_half_way_leaves_nothing(pair: tuple[Netns, Netns]) -> None:
    pod, peer = pair
    # A size that veth has and a tap cannot have.
    pod.run(f"ip link add eth1 mtu 65535 type veth peer name peer1 netns {peer.name}", "ip link set eth1 up")
    with unchanged(pod), pytest.raises(UnavailableError, match="mtu"):
        await attach.attach(pod.path)


# ---------------------------------------------------------------- frames


@pytest.mark.deadline(60)
async def test_frames_go_both_ways_and_the_namespace_stays_silent(pair: tuple[Netns, Netns]) -> None:
    pod, peer = pair
    async with attach.attached(pod.path) as taps:
        tap = of(taps, "eth0")
        with peer.packet_socket("peer0") as wire:
            wire.send(arp("10.9.0.1", "10.9.0.2", mac=OTHER, source=OTHER))
            assert any(frame[12:14] == b"\x08\x06" and frame[6:12] == OTHER for frame in frames_at(tap, 2.0))
            answer = arp("10.9.0.2", "10.9.0.1", operation=2)
            send(tap, answer)
            heard = []
            while not heard or heard[-1] != answer:
                heard.append(wire.recv(65536))
        # Nothing but the guest's own answer: the namespace has the address too, but must not speak for it.
        assert [frame for frame in heard if frame[12:14] == b"\x08\x06" and frame[6:12] == frames.GUEST] == [answer]


@pytest.mark.deadline(60)
async def test_large_frames_go_through(pair: tuple[Netns, Netns]) -> None:
    pod, peer = pair
    pod.run("ip link set eth0 mtu 9000")
    peer.run("ip link set peer0 mtu 9000")
    async with attach.attached(pod.path) as taps:
        tap = of(taps, "eth0")
        with peer.packet_socket("peer0") as wire:
            frame = ipv4("10.9.0.2", "10.9.0.1", payload=b"x" * 8900)
            send(tap, frame)
            while wire.recv(65536) != frame:
                pass
            wire.send(frames.ipv4("10.9.0.1", "10.9.0.2", source=OTHER, payload=b"y" * 8900))
            assert any(frame.endswith(b"y" * 8900) for frame in frames_at(tap, 2.0))


@pytest.fixture
def early() -> Iterator[int]:
    """A tap that was made before there was an interface."""

    async def make() -> int:
        return await attach.early_tap(attach.Helper(loading=False))

    fd = asyncio.run(make())
    yield fd
    os.close(fd)


@pytest.mark.deadline(60)
async def test_a_tap_that_was_made_early_leads_nowhere_and_then_to_the_interface(
    pair: tuple[Netns, Netns], early: int
) -> None:
    pod, peer = pair
    with pytest.raises(OSError, match="Input/output"):
        os.write(early, NO_OFFLOAD + ipv4("10.9.0.2", "10.9.0.1"))
    with unchanged(pod):
        taps = await attach.attach(pod.path, early=early)
        assert [tap.early for tap in taps] == [True]
        with peer.packet_socket("peer0") as wire:
            frame = ipv4("10.9.0.2", "10.9.0.1", payload=b"by the first descriptor")
            os.write(early, NO_OFFLOAD + frame)
            while wire.recv(65536) != frame:
                pass
            os.write(early, NO_OFFLOAD + ipv4("10.9.0.77", "10.9.0.1"))
            last = ipv4("10.9.0.2", "10.9.0.1", payload=b"last")
            os.write(early, NO_OFFLOAD + last)
            assert wire.recv(65536) == last
        taps[0].close()
        assert await attach.detach(pod.path) == ["eth0"]


@pytest.mark.deadline(60)
async def test_of_several_interfaces_the_first_gets_the_early_tap(pair: tuple[Netns, Netns], early: int) -> None:
    pod, peer = pair
    pod.run(f"ip link add eth1 type veth peer name peer1 netns {peer.name}", "ip link set eth1 up")
    taps = await attach.attach(pod.path, early=early)
    assert [(tap.endpoint.name, tap.early) for tap in taps] == [("eth0", True), ("eth1", False)]
    assert pod.run("ip -o link").count("vmstap") == 2
    for tap in taps:
        tap.close()


@pytest.mark.deadline(60)
async def test_after_a_failure_the_early_tap_is_where_it_was_and_serves_again(
    pair: tuple[Netns, Netns], early: int
) -> None:
    pod, peer = pair
    pod.run(f"ip link add eth1 mtu 65535 type veth peer name peer1 netns {peer.name}", "ip link set eth1 up")
    with unchanged(pod), pytest.raises(UnavailableError, match="mtu"):
        await attach.attach(pod.path, early=early)
    pod.run("ip link del eth1")
    (tap,) = await attach.attach(pod.path, early=early)
    assert tap.early
    tap.close()


async def test_a_tap_is_not_needed_where_there_is_no_interface(early: int) -> None:
    with namespace("vmstest-bare") as bare:
        assert await attach.attach(bare.path, early=early) == []
        assert "vmstap" not in bare.run("ip link")


SPOOFED = {
    "a foreign MAC": ipv4("10.9.0.2", "10.9.0.1", source=OTHER),
    "a foreign address": ipv4("10.9.0.77", "10.9.0.1"),
    "the gateway's ARP": arp("10.9.0.1", "10.9.0.77", operation=2),
    "the host's loopback": ipv4("127.0.0.1", "10.9.0.1"),
    "a router advertisement": frames.icmp6("fe80::aa:bbff:fecc:dd01", "ff02::1", 134),
    "the router's neighbour advertisement": frames.icmp6("fd09::2", "ff02::1", 136, about="fd09::1"),
    "a VLAN": frames.tagged(ipv4("10.9.0.2", "10.9.0.1")),
    "spanning tree": BROADCAST + frames.GUEST + b"\x00\x26" + bytes(38),
    "a cut frame": frames.ether(0x0800, b"\x45"),
}


@pytest.mark.deadline(60)
async def test_spoofed_frames_reach_nobody(pair: tuple[Netns, Netns]) -> None:
    pod, peer = pair
    async with attach.attached(pod.path) as taps:
        tap = of(taps, "eth0")
        with peer.packet_socket("peer0") as wire:
            for frame in SPOOFED.values():
                send(tap, frame)
            last = ipv4("10.9.0.2", "10.9.0.1", payload=b"last")
            send(tap, last)
            heard = [wire.recv(65536)]
            while heard[-1] != last:
                heard.append(wire.recv(65536))
        passed = {what for what, frame in SPOOFED.items() if frame in heard}
        assert not passed
        assert "10.9.0.77" not in peer.run("ip neigh")


@pytest.mark.deadline(60)
async def test_a_guest_that_is_trusted_may_send_anything(pair: tuple[Netns, Netns]) -> None:
    pod, peer = pair
    async with attach.attached(pod.path, source_check=False) as taps:
        with peer.packet_socket("peer0") as wire:
            frame = ipv4("10.9.0.77", "10.9.0.1", source=OTHER)
            send(of(taps, "eth0"), frame)
            while wire.recv(65536) != frame:
                pass


# ---------------------------------------------------------------- ends


@pytest.mark.deadline(60)
async def test_everything_is_undone(pair: tuple[Netns, Netns]) -> None:
    pod, peer = pair
    with unchanged(pod, peer):
        async with attach.attached(pod.path):
            assert "vmstap" in pod.run("ip link")
    with pytest.raises(ConnectionRefusedError):  # the namespace's own stack answers again
        peer.within(lambda: socket.create_connection(("10.9.0.2", 1), timeout=5))


@pytest.mark.deadline(60)
async def test_filters_of_somebody_else_stay(pair: tuple[Netns, Netns]) -> None:
    pod, _ = pair
    pod.run(
        "tc qdisc add dev eth0 clsact",
        "tc filter add dev eth0 ingress protocol 0x88b5 prio 5 bpf da bytecode '1,6 0 0 4294967295'",
    )
    with unchanged(pod):
        async with attach.attached(pod.path) as taps:
            assert of(taps, "eth0").endpoint.mac == GUEST


@pytest.mark.deadline(60)
async def test_what_a_killed_supervisor_left_is_replaced_or_removed(pair: tuple[Netns, Netns]) -> None:
    pod, _ = pair
    with unchanged(pod):
        for tap in await attach.attach(pod.path):
            tap.close()  # as the kernel does when supervisor and QEMU are killed
        for tap in await attach.attach(pod.path):
            tap.close()
        assert await attach.detach(pod.path) == ["eth0"]
        assert await attach.detach(pod.path) == []


@pytest.mark.deadline(60)
async def test_an_interface_can_come_and_go_while_others_stay(pair: tuple[Netns, Netns]) -> None:
    pod, peer = pair
    async with attach.attached(pod.path):
        pod.run(
            f"ip link add eth1 type veth peer name peer1 netns {peer.name}",
            "ip addr add 10.10.0.2/24 dev eth1",
            "ip link set eth1 up",
        )
        peer.run("ip link set peer1 up")
        pod.settle("eth1")
        with unchanged(pod):
            async with attach.attached(pod.path, names=["eth1"]) as taps:
                assert [tap.endpoint.name for tap in taps] == ["eth1"]
        async with attach.attached(pod.path, names=["eth1"]):
            pod.run("ip link del eth1")
        assert "vmstap" in pod.run("ip link")


@pytest.mark.deadline(60)
async def test_what_a_living_pod_has_stays_its_own(pair: tuple[Netns, Netns]) -> None:
    pod, _ = pair
    async with attach.attached(pod.path, owner="one"):
        with unchanged(pod):
            assert await attach.detach(pod.path, owner="another") == []


async def test_a_namespace_that_is_gone_needs_no_detaching(tmp_path: Path) -> None:
    assert await attach.detach(str(tmp_path / "gone")) == []


# ---------------------------------------------------------------- namespaces of our own


async def test_a_namespace_is_made_and_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "netns" / "pod")
    await namespaces.create(path)
    try:
        assert await attach.scan(path) == []
        with pytest.raises(AlreadyExistsError):
            await namespaces.create(path)
    finally:
        assert namespaces.remove(path)
    assert not namespaces.remove(path)
    assert os.listdir(tmp_path / "netns") == []


@pytest.mark.deadline(60)
async def test_an_attachment_is_quick_for_the_host(pair: tuple[Netns, Netns]) -> None:
    """CPU of the helper process, which runs beside the start of the virtual machine."""
    pod, _ = pair
    before = os.times()
    async with attach.attached(pod.path):
        after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 1.0
