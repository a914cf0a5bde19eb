"""The main routing table, made what the host says."""

from __future__ import annotations

import _socket as socket
import errno
import struct
from typing import TYPE_CHECKING, TypeAlias

from vmsandbox_agent import inet
from vmsandbox_agent.errors import AgentError, InvalidArgumentError, NotFoundError
from vmsandbox_agent.rtnetlink import CREATE, REPLACE, Rtnetlink, packed, refused
from vmsandbox_agent.rtnetlink import attributes as nested
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmsandbox_agent.rtnetlink import Attribute

_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEXT_HOP = struct.Struct("=HBBi")
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_METRICS = 1, 4, 5, 6, 7, 8
_RTA_MULTIPATH, _RTA_VIA = 9, 18
_RTAX_MTU = 2
_TABLE_MAIN = 254
_PROTO_KERNEL, _PROTO_STATIC, _PROTO_ANNOUNCED = 2, 4, 9
_ONLINK, _CLONED = 4, 0x200
#: what the kernel takes where none is given
_IPV6_METRIC = 1024
_SCOPES = {"universe": 0, "global": 0, "": 0, "site": 200, "link": 253, "host": 254}
_SCOPE_NAMES = {0: "universe", 200: "site", 253: "link", 254: "host"}
_TYPES = {"": 1, "unicast": 1, "blackhole": 6, "unreachable": 7, "prohibit": 8}
_TYPE_NAMES = {1: "unicast", 6: "blackhole", 7: "unreachable", 8: "prohibit"}

_Request: TypeAlias = "tuple[bytes, list[Attribute]]"


def update(kernel: Rtnetlink, wanted: list[pb.Route], links: Mapping[str, int]) -> None:
    """Make the main table exactly this; if the kernel refuses one, the table stays as it was.

    `links` are the indices of interfaces by name.
    """
    requests = _requests(wanted, links)
    before = {_key(*route): route for route in _main_table(kernel)}
    replaced: dict[tuple[object, ...], _Request] = {}
    try:
        for description, head, content in requests:
            try:
                kernel.change(_NEWROUTE, head, content, flags=CREATE | REPLACE)
            except OSError as error:
                raise refused(f"cannot add {description}", error) from error
            replaced[_key(head, content)] = (head, content)
    except AgentError:
        for key, route in reversed(replaced.items()):
            if key not in before:
                _delete(kernel, *route)
        for route in before.values():
            _restore(kernel, *route)
        raise
    # Last, so that traffic finds a route all the time.
    for key, route in before.items():
        if key not in replaced:
            _delete(kernel, *route)


def _key(head: bytes, content: list[Attribute]) -> tuple[object, ...]:
    """What two routes cannot both have."""
    family, length, *_ = _ROUTE.unpack(head)
    table = dict(content)
    metric = table.get(_RTA_PRIORITY, b"")
    number = int.from_bytes(metric, "little") if isinstance(metric, bytes) else metric
    if family == socket.AF_INET6 and not number:
        number = _IPV6_METRIC
    return family, length, table.get(_RTA_DST, b"") if length else b"", number


def _requests(routes: Iterable[pb.Route], links: Mapping[str, int]) -> list[tuple[str, bytes, list[Attribute]]]:
    """What to tell the kernel, in an order in which each gateway is reachable when it is needed."""
    groups: dict[tuple[object, ...], list[pb.Route]] = {}
    for number, route in enumerate(routes):
        family, destination, length = _destination(route)
        # Routes with a weight are the hops of one route; any other stands for itself.
        key = (family, destination, length, route.metric) if route.weight else (number,)
        groups.setdefault(key, []).append(route)
    ordered = sorted(groups.values(), key=lambda hops: any(hop.gateway for hop in hops))
    return [_request(hops, links) for hops in ordered]


def _request(hops: list[pb.Route], links: Mapping[str, int]) -> tuple[str, bytes, list[Attribute]]:
    route = hops[0]
    family, destination, length = _destination(route)
    kind, scope = _TYPES.get(route.type), _SCOPES.get(route.scope)
    description = f"route to '{inet.text(destination)}/{length}'"
    if kind is None or scope is None:
        raise InvalidArgumentError(f"{description} has type '{route.type[:32]}', scope '{route.scope[:32]}'")
    content: list[Attribute] = [(_RTA_DST, destination)] if length else []
    if route.metric:
        content.append((_RTA_PRIORITY, route.metric))
    if route.source:
        content.append((_RTA_PREFSRC, inet.packed(route.source)[1]))
    if route.mtu:
        content.append((_RTA_METRICS, [(_RTAX_MTU, route.mtu)]))
    flags = 0
    if kind == _TYPES["unicast"]:
        for hop in hops:
            if hop.interface not in links:
                raise NotFoundError(f"{description} needs interface '{hop.interface[:64]}', which the guest has not")
        if len(hops) > 1:
            content.append((_RTA_MULTIPATH, b"".join(_next_hop(family, hop, links) for hop in hops)))
        else:
            content.append((_RTA_OIF, links[route.interface]))
            content += _gateway(family, route.gateway)
            flags = _ONLINK if route.onlink else 0
    head = _ROUTE.pack(family, length, 0, 0, _TABLE_MAIN, _PROTO_STATIC, scope, kind, flags)
    return description, head, content


def _next_hop(family: int, hop: pb.Route, links: Mapping[str, int]) -> bytes:
    content = packed(_gateway(family, hop.gateway))
    size = _NEXT_HOP.size + len(content)
    weight = max(1, min(hop.weight, 256)) - 1
    return _NEXT_HOP.pack(size, _ONLINK if hop.onlink else 0, weight, links[hop.interface]) + content


def _gateway(family: int, gateway: str) -> list[Attribute]:
    if not gateway:
        return []
    other, address = inet.packed(gateway)
    if other == family:
        return [(_RTA_GATEWAY, address)]
    return [(_RTA_VIA, struct.pack("=H", other) + address)]


def _destination(route: pb.Route) -> tuple[int, bytes, int]:
    """Family, address and length of a route's prefix."""
    return inet.network(route.destination or ("::/0" if route.family == 6 else "0.0.0.0/0"))


def _main_table(kernel: Rtnetlink) -> list[_Request]:
    """The routes of the main table as requests to add them."""
    kept = (_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_METRICS, _RTA_MULTIPATH, _RTA_VIA)
    return [
        (head, [(kind, attributes[kind]) for kind in kept if kind in attributes])
        for head, attributes in _all_routes(kernel)
    ]


def _all_routes(kernel: Rtnetlink) -> list[tuple[bytes, Mapping[int, bytes]]]:
    """The main table but for what the kernel looks after: link-local routes, and those that routers announced."""
    found = []
    for wanted in (socket.AF_INET, socket.AF_INET6):
        request = _ROUTE.pack(wanted, 0, 0, 0, 0, 0, 0, 0, 0)
        for head, attributes in kernel.dump(_GETROUTE, request, _ROUTE.size):
            *_, table, protocol, _, kind, flags = _ROUTE.unpack(head)
            if table != _TABLE_MAIN or kind not in _TYPE_NAMES or flags & _CLONED or protocol == _PROTO_ANNOUNCED:
                continue
            if protocol == _PROTO_KERNEL and attributes.get(_RTA_DST, b"").startswith(b"\xfe\x80"):
                continue
            found.append((head, attributes))
    return found


def _delete(kernel: Rtnetlink, head: bytes, content: list[Attribute]) -> None:
    try:
        kernel.change(_DELROUTE, head, content)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.ENOENT, errno.ENODEV):
            raise refused("cannot remove a route", error) from error


def _restore(kernel: Rtnetlink, head: bytes, content: list[Attribute]) -> None:
    try:
        kernel.change(_NEWROUTE, head, content, flags=CREATE | REPLACE)
    except OSError as error:
        raise refused("cannot put back a route", error) from error


def described(kernel: Rtnetlink, links: Mapping[str, int]) -> list[pb.Route]:
    """The main table; of a route with several gateways each by itself, with a weight."""
    names = {index: name for name, index in links.items()}
    found = []
    for head, attributes in _all_routes(kernel):
        family, length, _, _, _, _, scope, kind, flags = _ROUTE.unpack(head)
        destination = attributes.get(_RTA_DST, bytes(16 if family == socket.AF_INET6 else 4))
        metrics = nested(attributes.get(_RTA_METRICS, b""))
        common = pb.Route(
            destination=f"{inet.text(destination)}/{length}",
            source=inet.text(attributes[_RTA_PREFSRC]) if _RTA_PREFSRC in attributes else "",
            metric=int.from_bytes(attributes.get(_RTA_PRIORITY, b""), "little"),
            scope=_SCOPE_NAMES.get(scope, "universe"),
            family=6 if family == socket.AF_INET6 else 4,
            mtu=int.from_bytes(metrics.get(_RTAX_MTU, b""), "little"),
            type=_TYPE_NAMES[kind],
        )
        for hop_flags, weight, index, hop in _hops(flags, attributes):
            route = pb.Route()
            route.CopyFrom(common)
            route.onlink = bool(hop_flags & _ONLINK)
            route.weight = weight
            route.gateway = _gateway_text(hop)
            if kind == _TYPES["unicast"]:
                route.interface = names.get(index, "")
            found.append(route)
    return found


def _hops(flags: int, attributes: Mapping[int, bytes]) -> Iterable[tuple[int, int, int, Mapping[int, bytes]]]:
    """Flags, weight (0: the only one), index and attributes of each next hop."""
    data = attributes.get(_RTA_MULTIPATH)
    if not data:
        yield flags, 0, int.from_bytes(attributes.get(_RTA_OIF, b""), "little"), attributes
        return
    at = 0
    while at + _NEXT_HOP.size <= len(data):
        size, hop_flags, weight, index = _NEXT_HOP.unpack_from(data, at)
        yield hop_flags, weight + 1, index, nested(data[at + _NEXT_HOP.size : at + size])
        at += size + 3 & ~3


def _gateway_text(attributes: Mapping[int, bytes]) -> str:
    if _RTA_GATEWAY in attributes:
        return inet.text(attributes[_RTA_GATEWAY])
    return inet.text(attributes[_RTA_VIA][2:]) if _RTA_VIA in attributes else ""
