"""The guest's network configuration, in namespaces of the host's kernel."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

import pytest

from tests.harness.netns import Netns, namespace
from vmsandbox.resources.network import attach
from vmsandbox.supervisor.interfaces import interface_of, neighbours_of, routes_of
from vmsandbox_agent import errors
from vmsandbox_agent.network import Network
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmsandbox.resources.network.model import Endpoint

FIRST = "02:aa:bb:cc:dd:01"
SECOND = "02:aa:bb:cc:dd:02"


@pytest.fixture
def guest() -> Iterator[Netns]:
    """A namespace that plays the guest, with two devices under names the kernel chose, and the far ends of them."""
    with namespace("vmstest-guest") as made, namespace("vmstest-far") as far:
        made.run(
            f"ip link add eth0 address {SECOND} type veth peer name far1 netns {far.name}",
            f"ip link add eth1 address {FIRST} type veth peer name far0 netns {far.name}",
        )
        far.run("ip link set far0 mtu 9000 up", "ip link set far1 mtu 9000 up")
        yield made


def address(text: str, *, peer: str = "", no_prefix_route: bool = False) -> pb.IpAddress:
    plain, _, prefix = text.partition("/")
    return pb.IpAddress(address=plain, prefix=int(prefix), peer=peer, no_prefix_route=no_prefix_route)


def eth0(*addresses: str, **fields: object) -> pb.Interface:
    return pb.Interface(
        **{
            "name": "eth0",
            "mac": FIRST,
            "mtu": 1500,
            "up": True,
            "addresses": [address(each) for each in addresses],
            **fields,
        }
    )


@pytest.mark.deadline(60)
async def test_the_guest_gets_exactly_what_the_namespace_has(guest: Netns) -> None:
    with namespace("vmstest-engine") as engine:
        engine.run(
            f"ip link add eth0 mtu 9000 address {FIRST} type veth peer name p0",
            f"ip link add lan address {SECOND} type veth peer name p1",
            "ip link set p0 mtu 9000 up; ip link set p1 up",
            "ip addr add 10.9.0.2/24 dev eth0; ip addr add 10.9.0.3/24 dev eth0",
            "ip addr add 10.9.1.1 peer 10.9.1.2/32 dev eth0",
            "ip addr add fd09::2/64 dev eth0 nodad; ip addr add 10.10.0.2/16 dev lan",
            "sysctl -qw net.ipv6.conf.eth0.accept_ra=0 net.ipv6.conf.lan.disable_ipv6=1",
            "ip link set eth0 up; ip link set lan up",
            "ip route add 169.254.1.1 dev eth0 scope link",
            "ip route add default via 169.254.1.1 dev eth0 metric 100",
            "ip route add 10.50.0.0/16 via 10.77.0.1 dev eth0 onlink mtu 1400 src 10.9.0.2",
            "ip route add 10.60.0.0/16 nexthop via 10.9.0.1 weight 2 nexthop via 10.10.0.1 weight 5",
            "ip route add unreachable 10.70.0.0/16; ip -6 route add default via fd09::1 metric 50",
            "ip route add 10.80.0.0/16 via inet6 fd09::1 dev eth0",
            # As the ptp plugin does it: the route that the address brought is replaced.
            "ip route del 10.10.0.0/16 dev lan; ip route add 10.10.0.1 dev lan scope link src 10.10.0.2",
            "ip route add 10.10.0.0/16 via 10.10.0.1 dev lan",
            "ip neigh add 10.9.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
            "ip neigh add fd09::9 lladdr 02:00:00:00:00:0a dev eth0 nud noarp",
        )
        told = [endpoint for endpoint in await attach.scan(engine.path) if not endpoint.name.startswith("p")]
    assert {endpoint.name for endpoint in told} == {"eth0", "lan"}
    guest.within(
        lambda: Network().configure([interface_of(each) for each in told], routes_of(told), neighbours_of(told))
    )
    assert {bare(each) for each in await attach.scan(guest.path)} == {bare(each) for each in told}


def bare(endpoint: Endpoint) -> tuple[object, ...]:
    """What has to be the same in namespace and guest."""
    return (
        endpoint.name,
        endpoint.mac,
        endpoint.mtu,
        endpoint.up,
        frozenset(endpoint.addresses),
        frozenset(dataclasses.replace(route, scope="") for route in endpoint.routes if route.version == 6),
        frozenset(route for route in endpoint.routes if route.version == 4),
        frozenset(endpoint.neighbours),
        tuple(sorted(endpoint.sysctls.items())),
    )


def test_a_device_is_found_by_its_mac_and_takes_a_name_that_another_has(guest: Netns) -> None:
    answer = guest.within(lambda: Network().update_interface(eth0("10.9.0.2/24", "fd09::2/64", mtu=9000)))
    assert (answer.name, answer.mac, answer.mtu, answer.up) == ("eth0", FIRST, 9000, True)
    assert {f"{each.address}/{each.prefix}" for each in answer.addresses} >= {"10.9.0.2/24", "fd09::2/64"}
    assert "10.9.0.0/24 dev eth0" in guest.run("ip route")
    answer = guest.within(lambda: Network().update_interface(eth0(name="lan", mac=SECOND)))
    assert (answer.name, answer.mac) == ("lan", SECOND)
    assert {each.name for each in guest.within(Network().interfaces)} == {"eth0", "lan"}


def test_a_device_is_found_by_its_place(guest: Netns, tmp_path: Path) -> None:
    port = tmp_path / "bus/pci/devices/0000:00:02.3/0000:01:00.0/virtio3/net/eth1"
    port.mkdir(parents=True)
    network = Network(sys=tmp_path)
    answer = guest.within(lambda: network.update_interface(eth0(mac="", name="net7", pci_path="02.3/00.0")))
    assert (answer.name, answer.mac) == ("net7", FIRST)


def test_a_device_takes_the_mac_address_that_its_place_is_told(guest: Netns, tmp_path: Path) -> None:
    (tmp_path / "bus/pci/devices/0000:00:02.3/0000:01:00.0/virtio3/net/eth1").mkdir(parents=True)
    wanted = eth0("10.9.0.2/24", mac="02:00:00:00:00:44", name="net7", pci_path="02.3/00.0", mtu=9000)
    answer = guest.within(lambda: Network(sys=tmp_path).update_interface(wanted))
    assert (answer.name, answer.mac, answer.mtu) == ("net7", "02:00:00:00:00:44", 9000)


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A card of the machine with its driver, in a /sys of the test's own."""
    found = tmp_path / "bus/virtio/drivers/virtio_net"
    found.mkdir(parents=True)
    for name in ("bind", "unbind"):
        (found / name).touch()
    (tmp_path / "bus/pci/devices/0000:00:01.0/0000:01:00.0/virtio3/net/eth1").mkdir(parents=True)
    (found / "virtio3").symlink_to("../../../pci/devices/0000:00:01.0/0000:01:00.0/virtio3")
    return found


def test_a_pod_without_interfaces_shows_none_until_it_is_given_one(guest: Netns, tmp_path: Path, driver: Path) -> None:
    network = Network(sys=tmp_path)
    guest.within(lambda: network.configure([], [], []))
    assert ((driver / "unbind").read_text(), (driver / "bind").read_text()) == ("virtio3", "")
    guest.within(lambda: network.update_interface(eth0(mac=SECOND)))
    assert (driver / "bind").read_text() == ""
    guest.within(lambda: network.update_interface(eth0(name="net7", pci_path="01.0/00.0")))
    assert (driver / "bind").read_text() == "virtio3"


def test_a_pod_with_an_interface_keeps_its_card(guest: Netns, tmp_path: Path, driver: Path) -> None:
    guest.within(lambda: Network(sys=tmp_path).configure([eth0(pci_path="01.0/00.0")], [], []))
    assert ((driver / "unbind").read_text(), (driver / "bind").read_text()) == ("", "")


def test_a_card_that_starts_again_is_found_anew_whatever_it_was(guest: Netns, tmp_path: Path, driver: Path) -> None:
    network = Network(sys=tmp_path)
    guest.within(lambda: network.configure([eth0(pci_path="01.0/00.0")], [], []))
    guest.within(network.start_again)
    assert ((driver / "unbind").read_text(), (driver / "bind").read_text()) == ("virtio3", "virtio3")


def test_a_card_that_its_driver_keeps_is_an_error(guest: Netns, tmp_path: Path, driver: Path) -> None:
    (driver / "unbind").unlink()
    (driver / "unbind").mkdir()
    with pytest.raises(errors.InvalidArgumentError, match="unbind the driver of network card 'virtio3'"):
        guest.within(lambda: Network(sys=tmp_path).configure([], [], []))


def test_a_device_that_comes_later_is_waited_for(guest: Netns) -> None:
    def plug() -> None:
        guest.run("ip link add late address 02:00:00:00:00:77 type veth peer name late1")

    plugging = threading.Timer(0.3, plug)
    plugging.start()
    answer = guest.within(lambda: Network().update_interface(eth0(mac="02:00:00:00:00:77"), timeout=20))
    plugging.join()
    assert answer.name == "eth0"


def test_a_device_that_never_comes_is_an_error(guest: Netns) -> None:
    with pytest.raises(errors.TimedOutError, match="02:00:00:00:00:66"):
        guest.within(lambda: Network().update_interface(eth0(mac="02:00:00:00:00:66"), timeout=0.1))


def test_an_update_replaces_addresses(guest: Netns) -> None:
    network = Network()
    guest.within(lambda: network.update_interface(eth0("10.9.0.2/24", "fd09::2/64")))
    guest.within(lambda: network.update_interface(eth0("10.9.0.2/24", "10.9.0.5/24")))
    shown = guest.run("ip -br addr show eth0")
    assert "10.9.0.2/24" in shown
    assert "10.9.0.5/24" in shown
    assert "fd09::2" not in shown
    guest.within(lambda: network.update_interface(eth0(up=False)))
    assert "DOWN" in guest.run("ip -br addr show eth0")


def test_a_removed_interface_is_down_and_empty(guest: Netns) -> None:
    network = Network()
    guest.within(lambda: network.update_interface(eth0("10.9.0.2/24")))
    guest.within(lambda: network.remove_interface("eth0"))
    shown = guest.run("ip -br addr show eth0")
    assert "DOWN" in shown
    assert "10.9" not in shown
    with pytest.raises(errors.NotFoundError, match="'eth7'"):
        guest.within(lambda: network.remove_interface("eth7"))


ROUTES = [
    pb.Route(interface="eth0", gateway="10.9.0.1", family=4),
    pb.Route(destination="10.9.0.0/24", interface="eth0", scope="link", source="10.9.0.2"),
]


def test_routes_become_what_is_told(guest: Netns) -> None:
    network = Network()
    guest.within(lambda: network.update_interface(eth0("10.9.0.2/24")))
    answer = guest.within(
        lambda: network.update_routes([*ROUTES, pb.Route(destination="10.60.0.0/16", type="prohibit")])
    )
    assert {route.destination for route in answer} == {"0.0.0.0/0", "10.9.0.0/24", "10.60.0.0/16"}
    again = guest.within(lambda: network.update_routes(ROUTES))
    assert {(route.destination, route.gateway) for route in again} == {("0.0.0.0/0", "10.9.0.1"), ("10.9.0.0/24", "")}
    assert list(guest.within(network.routes)) == list(again)


def test_a_route_that_the_kernel_refuses_changes_nothing(guest: Netns) -> None:
    network = Network()
    guest.within(lambda: network.update_interface(eth0("10.9.0.2/24")))
    guest.within(lambda: network.update_routes([*ROUTES, pb.Route(destination="10.60.0.0/16", type="prohibit")]))
    before = guest.run("ip route | sort")
    wrong = [
        pb.Route(destination="10.90.0.0/16", interface="eth0", gateway="10.9.0.77"),
        pb.Route(destination="10.91.0.0/16", interface="eth0", gateway="192.0.2.1"),
    ]
    with pytest.raises(errors.InvalidArgumentError, match=r"'10.91.0.0/16'"):
        guest.within(lambda: network.update_routes([*ROUTES, *wrong]))
    assert guest.run("ip route | sort") == before


WRONG = {
    "a name that leads elsewhere": eth0(name="../eth0"),
    "a long name": eth0(name="e" * 16),
    "a wrong MAC": eth0(mac="02:aa"),
    "no MAC": eth0(mac="", name=""),
    "a wrong address": eth0("10.9.0/24"),
    "a wrong prefix": eth0("10.9.0.2/33"),
    "a setting that leads elsewhere": eth0(sysctls={"ipv6/../../kernel/panic": "1"}),
    "a setting of something else": eth0(sysctls={"core/somaxconn": "1"}),
    "a size that cannot be": eth0(mtu=10_000_000),
}


@pytest.mark.parametrize("what", WRONG)
def test_nonsense_is_refused(guest: Netns, what: str) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        guest.within(lambda: Network().update_interface(WRONG[what], timeout=0.1))


@pytest.mark.parametrize(
    "route",
    [
        pb.Route(destination="10.9.0.1/24", interface="eth0"),
        pb.Route(destination="10.9.0.0/240", interface="eth0"),
        pb.Route(destination="nowhere", interface="eth0"),
        pb.Route(destination="10.9.0.0/24", interface="eth0", scope="nowhere"),
        pb.Route(destination="10.9.0.0/24", interface="eth0", type="nat"),
        pb.Route(destination="10.9.0.0/24", interface="eth0", gateway="x"),
    ],
    ids=str,
)
def test_a_route_that_makes_no_sense_is_refused(guest: Netns, route: pb.Route) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        guest.within(lambda: Network().update_routes([route]))


def test_a_route_by_an_unknown_interface_is_refused(guest: Netns) -> None:
    with pytest.raises(errors.NotFoundError, match="'eth7'"):
        guest.within(lambda: Network().update_routes([pb.Route(destination="10.9.0.0/24", interface="eth7")]))


def test_a_neighbour_that_makes_no_sense_is_refused(guest: Netns) -> None:
    for wrong in (
        pb.Neighbour(interface="eth0", address="10.9.0.9", mac="zz"),
        pb.Neighbour(interface="eth0", address="x", mac=FIRST),
        pb.Neighbour(interface="eth0", address="10.9.0.9", mac=FIRST, state="dead"),
    ):
        with pytest.raises(errors.InvalidArgumentError):
            guest.within(lambda wrong=wrong: Network().add_neighbours([wrong]))
