"""What the kernel answers about links, addresses, routes and neighbours, as values.

Pure: messages come in as pyroute2 has parsed them, and nothing here asks for any.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vmsandbox.resources.network.guard import link_local
from vmsandbox.resources.network.model import DEAD_ENDS, SYSCTLS, Address, Endpoint, Neighbour, Route

if TYPE_CHECKING:
    from collections.abc import Iterator

#: how taps of ours are known
TAP_PREFIX = "vmstap"
TAP_ALIAS = "vmsandbox: "

_ARPHRD_ETHER = 1
_IFF_LOOPBACK = 0x8
_ROUTE_CLONED, _PROTO_KERNEL, _PROTO_RA = 0x200, 2, 9
_IFA_TEMPORARY, _IFA_DUPLICATE = 0x01, 0x08
#: IN6_ADDR_GEN_MODE_NONE
_GENERATE_NONE = "1"
_NEXT_HOP_ONLINK, _NEXT_HOP_DEAD = 4, 1
_SCOPES = {0: "universe", 200: "site", 253: "link", 254: "host"}
_ROUTE_TYPES = {1: "unicast", 6: "blackhole", 7: "unreachable", 8: "prohibit"}
_NUD_NOARP, _NUD_PERMANENT = 0x40, 0x80


def is_endpoint(link: Any) -> bool:
    if link["ifi_type"] != _ARPHRD_ETHER or link["flags"] & _IFF_LOOPBACK:
        return False
    if link.get_attr("IFLA_MASTER"):
        return False  # a port of a bridge or bond, which is the interface
    return not (
        link.get_attr("IFLA_IFNAME").startswith(TAP_PREFIX)
        and (link.get_attr("IFLA_IFALIAS") or "").startswith(TAP_ALIAS)
    )


def kind(link: Any) -> str:
    information = link.get_attr("IFLA_LINKINFO")
    return (information.get_attr("IFLA_INFO_KIND") or "") if information else ""


def address(message: Any) -> Address | None:
    """None for what is made up for a while (temporary addresses) or could not be had (duplicates)."""
    if message["family"] not in (socket.AF_INET, socket.AF_INET6):
        return None
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    if message["family"] == socket.AF_INET6 and flags & (_IFA_TEMPORARY | _IFA_DUPLICATE):
        return None
    scope = "global" if message["scope"] == 0 else _SCOPES.get(message["scope"], "global")
    local = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    other = message.get_attr("IFA_ADDRESS")
    return Address(
        address=local, prefix=message["prefixlen"], scope=scope, peer=other if other and other != local else ""
    )


def with_own_link_local(endpoint: Endpoint) -> Endpoint:
    """The endpoint with the link-local addresses that its guest does not make by itself; then it makes none at all."""
    made = str(ipaddress.IPv6Address(link_local(bytes.fromhex(endpoint.mac.replace(":", "")))))
    link_locals = {each.address for each in endpoint.addresses if each.version == 6 and each.scope == "link"}
    if link_locals - {made}:
        return replace(endpoint, sysctls={**endpoint.sysctls, "ipv6/addr_gen_mode": _GENERATE_NONE})
    return replace(endpoint, addresses=tuple(each for each in endpoint.addresses if each.address not in link_locals))


def next_hops(message: Any) -> Iterator[tuple[int, Route]]:
    """A route as one or several of ours, with the index of the interface (0: none)."""
    route_type = _ROUTE_TYPES.get(message["type"])
    if (
        message["family"] not in (socket.AF_INET, socket.AF_INET6)
        or route_type is None
        or message["flags"] & _ROUTE_CLONED
    ):
        return
    if (message.get_attr("RTA_DST") or "").startswith("fe80:") and message["proto"] == _PROTO_KERNEL:
        return  # the guest makes its own
    if message["proto"] == _PROTO_RA:
        return  # the guest hears of it as well, and would take no other one beside ours
    any_address = "::" if message["family"] == socket.AF_INET6 else "0.0.0.0"
    metrics = message.get_attr("RTA_METRICS")
    common: dict[str, Any] = {
        "destination": f"{message.get_attr('RTA_DST') or any_address}/{message['dst_len']}",
        "source": message.get_attr("RTA_PREFSRC") or "",
        "metric": message.get_attr("RTA_PRIORITY") or 0,
        "scope": _SCOPES.get(message["scope"], "universe"),
        "mtu": (metrics.get_attr("RTAX_MTU") or 0) if metrics else 0,
        "type": route_type,
    }
    if route_type in DEAD_ENDS:
        yield 0, Route(**common)
        return
    hops = message.get_attr("RTA_MULTIPATH")
    if not hops:
        onlink = bool(message["flags"] & _NEXT_HOP_ONLINK)
        yield message.get_attr("RTA_OIF") or 0, Route(**common, gateway=_gateway(message), onlink=onlink)
        return
    for hop in hops:
        yield (
            hop["oif"],
            Route(
                **common,
                gateway=_gateway(hop),
                onlink=bool(_hop_flags(hop) & _NEXT_HOP_ONLINK),
                weight=hop["hops"] + 1,
            ),
        )


def _hop_flags(hop: Any) -> int:
    flags = hop["flags"]
    if isinstance(flags, int):
        return flags
    return _NEXT_HOP_ONLINK if "onlink" in flags else 0


def _gateway(message: Any) -> str:
    gateway = message.get_attr("RTA_GATEWAY")
    if gateway:
        return str(gateway)
    via = message.get_attr("RTA_VIA")
    return str(via["addr"]) if via else ""


def neighbour(message: Any) -> Neighbour | None:
    mac, address = message.get_attr("NDA_LLADDR"), message.get_attr("NDA_DST")
    if message["family"] not in (socket.AF_INET, socket.AF_INET6) or not mac or not address:
        return None
    if message["state"] & _NUD_PERMANENT:
        return Neighbour(address=address, mac=mac)
    if message["state"] & _NUD_NOARP and not _is_multicast(address):
        return Neighbour(address=address, mac=mac, state="noarp")
    return None


def _is_multicast(address: str) -> bool:
    return address.lower().startswith("ff") if ":" in address else int(address.split(".")[0]) >= 224


def sysctls(name: str) -> dict[str, str]:
    found = {}
    for key in SYSCTLS:
        family, _, setting = key.partition("/")
        try:
            with open(f"/proc/sys/net/{family}/conf/{name}/{setting}", encoding="ascii") as file:
                found[key] = file.read().strip()
        except OSError:
            continue
    return found
