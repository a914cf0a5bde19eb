"""What a guest is told of its pod's interfaces: those of the namespace, in the words of the agent's contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmsandbox.resources.network.model import Endpoint
    from vmsandbox_protocol import agent_pb2 as pb


def interface_of(endpoint: Endpoint, *, pci_path: str = "") -> pb.Interface:
    """The guest's interface: the namespace's in everything."""
    from vmsandbox_protocol import agent_pb2 as pb

    addresses = [
        pb.IpAddress(address=each.address, prefix=each.prefix, peer=each.peer, no_prefix_route=True)
        for each in endpoint.addresses
    ]
    return pb.Interface(
        name=endpoint.name,
        mac=endpoint.mac,
        mtu=endpoint.mtu,
        pci_path=pci_path,
        up=endpoint.up,
        addresses=addresses,
        sysctls=endpoint.sysctls,
    )


def routes_of(endpoints: Iterable[Endpoint]) -> list[pb.Route]:
    """All routes of all interfaces."""
    from vmsandbox_protocol import agent_pb2 as pb

    return [
        pb.Route(
            destination=route.destination,
            gateway=route.gateway,
            interface=endpoint.name,
            source=route.source,
            metric=route.metric,
            scope=route.scope,
            onlink=route.onlink,
            family=route.version,
            mtu=route.mtu,
            type=route.type,
            weight=route.weight,
        )
        for endpoint in endpoints
        for route in endpoint.routes
    ]


def neighbours_of(endpoints: Iterable[Endpoint]) -> list[pb.Neighbour]:
    """All neighbours of all interfaces."""
    from vmsandbox_protocol import agent_pb2 as pb

    return [
        pb.Neighbour(interface=endpoint.name, address=each.address, mac=each.mac, state=each.state)
        for endpoint in endpoints
        for each in endpoint.neighbours
    ]
