"""Pods in a network namespace that somebody else made, as engines make them; see `test_network` for the default one."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.harness.cli import awaited, kill, title
from tests.harness.netns import Netns, mac, namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.cli import Cli

pytestmark = pytest.mark.cloned

MAC, FOREIGN = "02:aa:bb:cc:dd:01", "02:aa:bb:cc:dd:66"
SERVE = "mkdir /tmp/w; echo served > /tmp/w/index.html; exec httpd -f -h /tmp/w"
PATIENCE = 20.0


@pytest.fixture
def spaces() -> Iterator[tuple[Netns, Netns]]:
    """A namespace as an engine leaves it, with two interfaces, and the other ends of their cables."""
    with namespace("vmstest-pod") as pod, namespace("vmstest-peer") as peer:
        pod.run(
            f"ip link add eth0 mtu 9000 address {MAC} type veth peer name peer0 mtu 9000 netns {peer.name}",
            f"ip link add lan type veth peer name peer1 netns {peer.name}",
            "sysctl -qw net.ipv6.conf.lan.disable_ipv6=1",
            "ip addr add 10.9.0.2/24 dev eth0; ip addr add fd09::2/64 dev eth0 nodad; ip addr add 10.10.0.2/16 dev lan",
            "ip link set eth0 up; ip link set lan up",
        )
        peer.run(
            "ip addr add 10.9.0.1/24 dev peer0; ip addr add fd09::1/64 dev peer0 nodad",
            "ip addr add 10.10.0.1/16 dev peer1",
            "ip link set peer0 up; ip link set peer1 up",
            "ip addr add 203.0.113.1/32 dev lo; ip addr add 203.0.113.2/32 dev lo",
        )
        pod.run(
            "ip route add default via 10.9.0.1 metric 100; ip -6 route add default via fd09::1",
            "ip route add 203.0.113.2 via 172.16.0.1 dev lan onlink metric 7",
            "ip neigh add 172.16.0.1 lladdr $(cat /sys/class/net/lan/address) dev lan nud permanent",
            "ip neigh add 10.9.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
            # As DHCP or a router's announcement leaves one.
            "ip addr add fd09::5/64 dev eth0 nodad valid_lft 36000 preferred_lft 36000",
        )
        pod.settle("eth0")
        yield pod, peer


def served(space: Netns, address: str) -> bool:
    """Whether the pod's server answers, wherever it is asked from; it may just be starting."""

    def ask() -> bool:
        with socket.create_connection((address, 80), timeout=PATIENCE) as sock:
            sock.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
            return sock.makefile("rb").read().endswith(b"served\n")

    return space.within(ask)


def await_in(cli: Cli, name: str, condition: str) -> None:
    """Return when a shell's condition holds in a container."""
    cli.ok("exec", name, "sh", "-c", f"until {condition}; do sleep 0.1; done")


def test_a_pod_has_what_the_namespace_has_and_follows_it(cli: Cli, box: str, spaces: tuple[Netns, Netns]) -> None:
    pod, peer = spaces
    before = pod.state()
    sysctl = ("--sysctl", "net.ipv4.tcp_keepalive_time=77", "--sysctl", "net.ipv4.conf.lan.rp_filter=2")
    cli.ok("run", "-d", "--name", "web", "--network", f"ns:{pod.path}", *sysctl, box, "sh", "-c", SERVE)
    await_in(cli, "web", "nc 127.0.0.1 80 </dev/null")
    links = cli.ok("exec", "web", "ip", "-o", "link")
    assert "mtu 9000" in links.partition("eth0:")[2].partition("\n")[0]
    assert MAC in links
    assert "mtu 1500" in links.partition("lan:")[2].partition("\n")[0]
    addresses = cli.ok("exec", "web", "ip", "-o", "addr")
    for wanted in ("10.9.0.2/24", "fd09::2/64", "fd09::5/64", "10.10.0.2/16"):
        assert wanted in addresses
    routes = [" ".join(line.split()) for line in cli.ok("exec", "web", "ip", "route").splitlines()]
    assert "default via 10.9.0.1 dev eth0 metric 100" in routes
    assert "203.0.113.2 via 172.16.0.1 dev lan metric 7 onlink" in routes
    assert "default via fd09::1 dev eth0" in cli.ok("exec", "web", "ip", "-6", "route")
    neighbours = cli.ok("exec", "web", "ip", "neigh")
    assert "10.9.0.9 dev eth0 lladdr 02:00:00:00:00:09" in neighbours
    settings = ("/proc/sys/net/ipv4/tcp_keepalive_time", "/proc/sys/net/ipv4/conf/lan/rp_filter")
    assert cli.ok("exec", "web", "cat", *settings).split() == ["77", "2"]
    for address in ("10.9.0.2", "fd09::2", "fd09::5", "10.10.0.2"):
        assert served(peer, address)
    assert "1 packets received" in cli.ok("exec", "web", "ping", "-c", "1", "-W", "20", "-s", "8900", "203.0.113.1")

    pod.run(
        f"ip link add late type veth peer name peer2 netns {peer.name}",
        "ip addr add 10.20.0.2/24 dev late; ip link set late up; ip route add 198.51.100.0/24 via 10.20.0.1",
    )
    peer.run("ip addr add 10.20.0.1/24 dev peer2; ip link set peer2 up")
    await_in(cli, "web", "ip route | grep -q 198.51.100.0/24")
    assert served(peer, "10.20.0.2")
    for process in cli.processes():
        if "vmsandbox supervisor" in title(process):
            kill(process.pid)
    pod.run("ip link del late", "ip addr add 10.10.0.3/16 dev lan")
    await_in(cli, "web", "! grep -q late: /proc/net/dev")
    await_in(cli, "web", "ip addr show lan | grep -q 10.10.0.3/16")
    assert served(peer, "10.10.0.3")
    assert served(peer, "10.9.0.2")
    pod.run("ip link set lan mtu 1400")
    await_in(cli, "web", "ip link show lan | grep -q 'mtu 1400'")
    pod.run("ip route add 198.51.100.0/24 via 10.9.0.1")
    await_in(cli, "web", "ip route | grep -q '198.51.100.0/24 via 10.9.0.1'")
    cli.ok("rm", "-f", "web")
    pod.run("ip addr del 10.10.0.3/16 dev lan; ip link set lan mtu 1500; ip route del 198.51.100.0/24 via 10.9.0.1")
    assert pod.state() == before


def first_interface(cli: Cli) -> str:
    """What is noted as the interface that the machine's own network card is."""
    (document,) = (cli.run_root / "net").glob("*.json")
    return str(json.loads(document.read_text())["first"])


def test_the_first_interface_may_come_late_go_and_come_again(cli: Cli, box: str) -> None:
    with namespace("vmstest-pod") as pod, namespace("vmstest-peer") as peer:

        def plug(address: str) -> None:
            pod.run(
                f"ip link add eth0 type veth peer name peer0 netns {peer.name}",
                f"ip addr add {address} dev eth0; ip link set eth0 up",
            )
            peer.run("ip addr add 10.9.0.1/24 dev peer0; ip link set peer0 up")
            await_in(cli, "web", f"ip addr show eth0 | grep -q {address}")

        before = pod.state()
        cli.ok("run", "-d", "--name", "web", "--network", f"ns:{pod.path}", box, "sh", "-c", SERVE)
        assert cli.ok("exec", "web", "ls", "/sys/class/net") == "lo\n"
        assert first_interface(cli) == ""
        plug("10.9.0.2/24")
        awaited(lambda: first_interface(cli) == "eth0")
        assert served(peer, "10.9.0.2")
        for supervisor in [each for each in cli.processes() if "vmsandbox supervisor" in title(each)]:
            kill(supervisor.pid)
        pod.run("ip link del eth0")
        await_in(cli, "web", "! grep -q eth0: /proc/net/dev")
        awaited(lambda: first_interface(cli) == "")
        plug("10.9.0.3/24")
        assert served(peer, "10.9.0.3")
        assert first_interface(cli) == ""
        cli.ok("rm", "-f", "web")
        pod.run("ip link del eth0")
        assert pod.state() == before


@pytest.mark.parametrize("template", ["require", "off"])
def test_an_interface_carries_from_the_first_moment(
    cli: Cli, box: str, spaces: tuple[Netns, Netns], template: str
) -> None:
    pod, _ = spaces
    options = ("--rm", "--template", template, "--network", f"ns:{pod.path}")
    assert cli.ok("run", *options, box, "cat", "/sys/class/net/eth0/carrier") == "1\n"


SPOOF = """
ip addr add 10.9.0.1/32 dev eth0
arping -q -c 2 -U -I eth0 -s 10.9.0.1 10.9.0.1
arping -q -c 2 -A -I eth0 -s 10.9.0.1 10.9.0.1
ip addr del 10.9.0.1/32 dev eth0
ip addr add 10.9.0.77/24 dev eth0
ping -c 2 -W 1 -I 10.9.0.77 10.9.0.1
ip addr del 10.9.0.77/24 dev eth0
ip -6 addr add fd09::77/64 dev eth0
while ip -6 addr show dev eth0 | grep -q tentative; do sleep 0.1; done
ping -6 -c 2 -W 1 -I fd09::77 fd09::1
ip -6 addr del fd09::77/64 dev eth0
ip link add link eth0 name tagged type vlan id 5 && ip addr add 10.9.5.1/24 dev tagged && ip link set tagged up
ping -c 1 -W 1 -I tagged 10.9.5.2
ip link del tagged
ip link set eth0 address FOREIGN
ping -c 2 -W 1 10.9.0.1
ip link set eth0 address MAC
ping -c 1 -W 20 -s 999 10.9.0.1
"""


def test_a_guest_that_speaks_for_others_is_not_heard(cli: Cli, box: str, spaces: tuple[Netns, Netns]) -> None:
    pod, peer = spaces
    script = SPOOF.replace("FOREIGN", FOREIGN).replace("MAC", MAC)
    own = cli.ok("run", "-d", "--privileged", "--network", f"ns:{pod.path}", "--name", "liar", box, "sleep", "100000")
    assert own
    before = peer.run("ip neigh show nud permanent; ip addr; ip route; ip -6 route")
    with peer.packet_socket("peer0") as wire:
        said = cli.ok("exec", "liar", "sh", "-c", f"({script}) 2>&1")
        assert "1 packets received" in said.rpartition("PING")[2], said
        wire.settimeout(0.5)
        heard = []
        with suppress(TimeoutError):
            while True:
                heard.append(wire.recv(65536))
    from_guest = [frame for frame in heard if frame[6:12] != mac(peer_mac(peer))]
    assert from_guest
    assert {frame[6:12] for frame in from_guest} == {mac(MAC)}
    allowed = {socket.inet_aton("10.9.0.2"), bytes(4)}
    for frame in from_guest:
        kind = frame[12:14]
        assert kind in (b"\x08\x00", b"\x08\x06", b"\x86\xdd")
        if kind == b"\x08\x06":
            assert (frame[22:28], frame[28:32] in allowed) == (mac(MAC), True)
        elif kind == b"\x08\x00":
            assert frame[26:30] in allowed
        else:
            assert frame[22:38] != socket.inet_pton(socket.AF_INET6, "fd09::77")
    neighbours = peer.run("ip neigh")
    assert FOREIGN not in neighbours
    assert "10.9.0.77" not in [line.split()[0] for line in neighbours.splitlines() if "lladdr" in line]
    assert peer.run("ip neigh show nud permanent; ip addr; ip route; ip -6 route") == before


def peer_mac(peer: Netns) -> str:
    return peer.run("cat /sys/class/net/peer0/address").strip()
