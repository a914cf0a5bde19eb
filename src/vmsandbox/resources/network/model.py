"""Interfaces of a pod as values, and as documents between processes.

Addresses are texts in the kernel's spelling.  `Route.destination` is always a prefix: the default route is
``0.0.0.0/0`` or ``::/0``.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

TUN, VHOST_NET = "/dev/net/tun", "/dev/vhost-net"
#: of an interface in /proc/sys/net, carried over to the guest's: how IPv6 configures itself
SYSCTLS = ("ipv6/disable_ipv6", "ipv6/accept_ra", "ipv6/autoconf", "ipv6/addr_gen_mode")
#: route types that lead nowhere and so need no interface
DEAD_ENDS = ("blackhole", "unreachable", "prohibit")


@dataclass(frozen=True, kw_only=True)
class Address:
    """An address of an interface; `peer` is the other end of a point-to-point address."""

    address: str
    prefix: int
    #: "global", "site", "link" or "host"
    scope: str = "global"
    peer: str = ""

    @property
    def version(self) -> int:
        return 6 if ":" in self.address else 4


@dataclass(frozen=True, kw_only=True)
class Route:
    """A route of the main table by its interface; `metric` 0 is the kernel's default."""

    destination: str
    gateway: str = ""
    source: str = ""
    metric: int = 0
    #: "universe", "site", "link" or "host"
    scope: str = "universe"
    onlink: bool = False
    #: of this route in bytes; 0: the interface's
    mtu: int = 0
    #: "unicast" or one of `DEAD_ENDS`
    type: str = "unicast"
    #: share of a route with several gateways; 0: it has one
    weight: int = 0

    @property
    def version(self) -> int:
        return 6 if ":" in self.destination else 4


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A neighbour that was set by somebody, not learned."""

    address: str
    mac: str
    #: "permanent" or "noarp"
    state: str = "permanent"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One interface of a namespace with everything the guest's has to have."""

    name: str
    mac: str
    mtu: int
    index: int = 0
    up: bool = True
    #: of the link: "veth", "macvlan", ...; empty for a physical one
    kind: str = ""
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    #: e.g. ``{"ipv6/accept_ra": "0"}``, below /proc/sys/net with the interface's name left out
    sysctls: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Endpoint:
        """The endpoint of a `document`; raises InvalidArgumentError for anything else."""
        try:
            values = dict(document)
            made = cls(
                **{
                    **values,
                    "addresses": tuple(Address(**each) for each in values.get("addresses", ())),
                    "routes": tuple(Route(**each) for each in values.get("routes", ())),
                    "neighbours": tuple(Neighbour(**each) for each in values.get("neighbours", ())),
                }
            )
            made.check()
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidArgumentError(f"this is no description of a network interface: {error}") from error
        return made

    def check(self) -> None:
        """Raise ValueError for addresses that are none."""
        if len(self.mac.split(":")) != 6:
            raise ValueError(f"'{self.mac}' is not a MAC address")
        for address in self.addresses:
            ipaddress.ip_interface(f"{address.address}/{address.prefix}")
        for route in self.routes:
            ipaddress.ip_network(route.destination)
        for neighbour in self.neighbours:
            ipaddress.ip_address(neighbour.address)
