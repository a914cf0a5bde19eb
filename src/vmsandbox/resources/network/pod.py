"""The host's side of one pod's network, from its making to its end.

What is made is written down before it is made, so that after everything was killed it can be taken apart again, by the
pod's next supervisor or by `vmsandbox gc`.  The documents, and the namespaces of our own, are beside the pods'
directories, not in them: those are removed as trees, and before the last of the network is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmsandbox import documents
from vmsandbox.errors import InvalidArgumentError, NotFoundError, SandboxError
from vmsandbox.paths import SHORT_ID
from vmsandbox.resources.network import attach, cni, names, namespaces, ports
from vmsandbox.resources.network.bridge import Bridge, subnets_of
from vmsandbox.resources.network.model import Endpoint
from vmsandbox.resources.network.options import HOST_GATEWAY, NetworkOptions
from vmsandbox_hypervisor.aio import finish

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Sequence

    from vmsandbox.config.model import NetworkSettings
    from vmsandbox.paths import Roots
    from vmsandbox.resources.network.attach import Tap

log = logging.getLogger(__name__)

#: below the run root
DIRECTORY = "net"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a pod's network belongs."""

    roots: Roots
    sandbox_id: str

    @property
    def _stem(self) -> str:
        return f"{self.roots.run_dir}/{DIRECTORY}/{self.sandbox_id[:SHORT_ID]}"

    @property
    def file(self) -> str:
        return f"{self._stem}.json"

    @property
    def own_namespace(self) -> str:
        return self._stem


class PodNetwork:
    """What was made for a pod.  Obtain one from `made` or `known`."""

    def __init__(self, place: Place, options: NetworkOptions, document: dict[str, Any]) -> None:
        self.place = place
        self.options = options
        self.taps: list[Tap] = []
        #: what `attach.watch` answered; -1: nobody but us changes the namespace
        self.changes = -1
        self._document = document
        self._reserved: list[socket.socket] = []

    @property
    def endpoints(self) -> list[Endpoint]:
        return [tap.endpoint for tap in self.taps]

    @property
    def namespace(self) -> str:
        return str(self._document.get("netns") or "")

    @property
    def gateway(self) -> str:
        """The host as the pod sees it: where its IPv4 default route leads."""
        return next((route.gateway for each in self.endpoints for route in each.routes if _is_default(route)), "")

    def remember(self, **values: object) -> None:
        """Write down what is about to be made."""
        self._document.update(values)
        os.makedirs(os.path.dirname(self.place.file), mode=0o700, exist_ok=True)
        documents.write(self.place.file, self._document)

    def remember_plugged(self, first: str, coming: Sequence[Endpoint] = ()) -> None:
        """Write down what the machine was given of a namespace that others change, and which is its `first` one.

        Those that are `coming` it may have or not, and its guest may not have been told of them.
        """
        if self.options.kind == "namespace":
            plugged = {each.name: each.document() for each in (*self.endpoints, *coming)}
            self.remember(plugged=[*plugged.values()], coming=[each.name for each in coming], first=first)

    def plugged(self) -> list[Endpoint]:
        """What `remember_plugged` wrote down."""
        return [Endpoint.of(document) for document in self._document.get("plugged") or ()]

    def coming(self) -> list[str]:
        """Names of those that were on their way when it was written down."""
        return [str(name) for name in self._document.get("coming") or ()]

    def name_servers(self) -> list[str]:
        """At loopback addresses of the namespace, which the guest is to reach."""
        return [str(address) for address in self._document.get("name_servers") or ()]

    @property
    def first(self) -> str:
        """The interface that the machine's first network card is, as far as is written down; else none or the first."""
        if self.options.kind == "namespace":
            return str(self._document.get("first") or "")
        return next((each.name for each in self.endpoints), "")

    def hold_ports(self, *, ipv6: bool) -> None:
        """Reserve the published ports, so that nobody else on the host takes them.

        Raises AlreadyExistsError for one that is in use, ExhaustedError for more than this process may have open.
        """
        self._reserved += ports.reserved(self.options.ports, ipv6=ipv6)

    def hold_free_ports(self, *, ipv6: bool) -> None:
        """As `hold_ports`, but for those that somebody has taken meanwhile."""
        for port in self.options.ports:
            with suppress(SandboxError):
                self._reserved += ports.reserved([port], ipv6=ipv6)

    def let_go(self) -> None:
        """Close what this process holds; what is made stays."""
        for tap in self.taps:
            tap.close()
        if self.changes >= 0:
            os.close(self.changes)
            self.changes = -1
        for held in self._reserved:
            held.close()
        self._reserved.clear()

    # ------------------------------------------------------------ names

    def host_entries(self, own: Sequence[str]) -> list[tuple[str, str]]:
        """The pod's own part of its hosts file; `own` are its names."""
        entries = []
        for name, address in self.options.hosts:
            if address == HOST_GATEWAY:
                if not self.gateway:
                    raise InvalidArgumentError(
                        f"host '{name}:{HOST_GATEWAY}' needs a gateway, which this network has not: leave it out"
                    )
                address = self.gateway
            entries.append((address, name))
        words = " ".join(dict.fromkeys(own))
        entries += [(address, words) for address in self.addresses()]
        return entries or [("127.0.1.1", words)]

    def addresses(self) -> list[str]:
        """Of the first interface that has any."""
        return next(([each.address for each in one.addresses] for one in self.endpoints if one.addresses), [])

    @property
    def announces(self) -> bool:
        """Whether other pods know this one by name."""
        return self.options.kind == "default"

    def announce(self, own: Sequence[str]) -> None:
        words = " ".join(dict.fromkeys(own))
        entries = [(address, words) for address in self.addresses()]
        names.announce(Bridge(self.place.roots).names(), self.place.sandbox_id, entries)


def _is_default(route: Any) -> bool:  # noqa: ANN401
    return bool(route.destination == "0.0.0.0/0" and route.gateway)


# ---------------------------------------------------------------- making


async def made(
    place: Place,
    options: NetworkOptions,
    settings: NetworkSettings,
    helper: attach.Helper,
    early: Callable[[], Awaitable[int]] | None = None,
) -> PodNetwork:
    """Make a pod's network; if that fails, nothing of it is left.

    The `helper` enters its namespace; it and the tap that is made `early` stay the caller's.
    Raises what `attach.attach`, `cni.add` and `Bridge` do, and AlreadyExistsError for a port that is in use.
    """
    network = PodNetwork(place, options, {"netns": options.path, "sandbox": place.sandbox_id})
    try:
        if options.kind == "namespace":
            namespaces.check(options.path)
            network.remember()
        elif options.kind == "default":
            await _join_bridge(network, settings)
        network.taps, network.changes = await attach.attach_by(
            helper,
            network.namespace,
            source_check=settings.source_check,
            owner=place.sandbox_id,
            watched=options.kind == "namespace",
            early=-1 if early is None else await early(),
        )
    except BaseException:
        network.let_go()
        await finish(_released(place), seconds=2 * cni.TIMEOUT)
        raise
    return network


async def _released(place: Place) -> None:
    try:
        await release(place)
    except SandboxError:
        return  # logged there; the error that made this necessary is the one to be told


async def _join_bridge(network: PodNetwork, settings: NetworkSettings) -> None:
    place, options = network.place, network.options
    bridge = Bridge(place.roots)
    plugins = [each for each in settings.plugins.split(":") if each]
    async with bridge.in_use():
        configuration = await asyncio.to_thread(bridge.prepare, subnet=settings.subnet, ipv6=settings.ipv6)
        runtime: dict[str, Any] = {}
        if options.ports:
            runtime["portMappings"] = [ports.mapping(port) for port in options.ports]
        if options.ip:
            runtime["ips"] = [bridge.check_address(configuration, options.ip)]
        attachment = cni.Attachment(
            network=configuration,
            container_id=place.sandbox_id,
            netns=place.own_namespace,
            runtime=runtime,
            plugins=plugins,
        )
        for program in cni.programs(configuration):
            cni.find(program, plugins)
        ipv6 = _has_ipv6(configuration)
        ports.check_addresses(options.ports, ipv6=ipv6)
        network.hold_ports(ipv6=ipv6)
        network.remember(netns=place.own_namespace, owned=True, attachment=attachment.document())
        await namespaces.create(place.own_namespace)
        network.remember(result=await cni.add(attachment))


def _has_ipv6(configuration: dict[str, Any]) -> bool:
    return any(subnet.version == 6 for subnet in subnets_of(configuration))


def known(place: Place, options: NetworkOptions) -> PodNetwork:
    """The network of a pod that an earlier supervisor made; ports are reserved again where nobody took them."""
    try:
        document = documents.read(place.file)
    except SandboxError:
        document = {"netns": options.path, "sandbox": place.sandbox_id}
    network = PodNetwork(place, options, document)
    network.hold_free_ports(ipv6=_has_ipv6((document.get("attachment") or {}).get("network") or {"plugins": []}))
    return network


# ---------------------------------------------------------------- the end


async def release(place: Place) -> bool:
    """Take a pod's network apart, by its document; says whether there was one.  Safe to repeat.

    The pod's virtual machine has ended.  Every step is attempted; what fails is logged, and the first error is raised.
    """
    try:
        document = documents.read(place.file)
    except NotFoundError:
        forget(place)
        return False
    netns = str(document.get("netns") or "")
    first: SandboxError | None = None
    bridge = Bridge(place.roots)
    names.withdraw(bridge.names(), place.sandbox_id)
    for step in (_leave_network(bridge, document), _leave_namespace(document, netns, place.sandbox_id)):
        try:
            await step
        except SandboxError as error:
            log.warning("the pod's network was not taken apart completely: %s", error)
            first = first or error
    if document.get("attachment"):
        bridge.remove_if_unused()
    if first is not None:
        raise first
    forget(place)
    return True


def forget(place: Place) -> None:
    """Remove what is written down of a network that is not there, or was never begun."""
    with suppress(FileNotFoundError):
        documents.remove(place.file)


async def _leave_network(bridge: Bridge, document: dict[str, Any]) -> None:
    if document.get("attachment"):
        attachment = cni.Attachment.of(document["attachment"])
        await cni.remove(attachment, document.get("result") or bridge.leased(attachment))


async def _leave_namespace(document: dict[str, Any], netns: str, owner: str) -> None:
    if document.get("owned"):
        namespaces.remove(netns)
    elif netns:
        await attach.detach(netns, owner=owner)


def remembered(roots: Roots) -> list[Place]:
    """The places of all networks that are written down, or were about to be."""
    directory = f"{roots.run_dir}/{DIRECTORY}"
    try:
        entries = os.listdir(directory)
    except FileNotFoundError:
        return []
    found = []
    for stem in sorted({entry.partition(".")[0] for entry in entries if "." in entry}):
        try:
            document = documents.read(f"{directory}/{stem}.json")
        except NotFoundError:
            document = {}
        except SandboxError as error:
            log.warning("%s", error)
            document = {}
        found.append(Place(roots=roots, sandbox_id=str(document.get("sandbox") or stem)))
    return found
