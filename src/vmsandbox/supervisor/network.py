"""A pod's network: made while its machine starts, plugged into it, told to its guest, and followed.

`connected` is entered before the machine is started and left after it has ended; the work in between is a task of its
own, so that neither waits for the other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from vmsandbox.errors import NotFoundError, SandboxError
from vmsandbox.resources.network import attach, names, pod
from vmsandbox.resources.network.bridge import Bridge
from vmsandbox.resources.network.options import NetworkOptions
from vmsandbox.supervisor import cards, resolving
from vmsandbox.supervisor.interfaces import interface_of, neighbours_of, routes_of
from vmsandbox.supervisor.translation import translating
from vmsandbox_hypervisor.aio import finish
from vmsandbox_hypervisor.api import Nic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from vmsandbox.guest.client import AgentClient
    from vmsandbox.resources.network.attach import Tap
    from vmsandbox.resources.network.model import Endpoint
    from vmsandbox.supervisor.sandbox import SandboxSpec, Surroundings
    from vmsandbox_hypervisor.api import Vm, VmConfig
    from vmsandbox_protocol import agent_pb2 as pb

log = logging.getLogger(__name__)

#: seconds for taking a network apart
RELEASE_TIMEOUT = 90.0
#: seconds between the first sign of a change and a look at what has changed
SETTLE_SECONDS = 0.1
#: seconds that a container waits for the guest to reach its name servers
NAMES_TIMEOUT = 10.0


class Connection:
    """What a pod's network is to its supervisor.  Obtain one from `connected` or `resumed`."""

    def __init__(self, around: Surroundings, spec: SandboxSpec) -> None:
        self.spec = spec
        self.options = NetworkOptions.of(spec.network)
        self.place = pod.Place(roots=around.roots, sandbox_id=spec.id)
        self.settings = around.settings.network
        self.network: pod.PodNetwork | None = None
        #: seconds it took to be made
        self.seconds = 0.0
        #: what `plug` was called for last, and where its guest finds what it was given
        self._machine: Vm | None = None
        self._paths: dict[str, str] = {}
        #: interfaces that the machine has: name -> id of the device
        self.plugged: dict[str, str] = {}
        #: what follows the namespace and who starts a container may both do it
        self._refreshing = asyncio.Lock()
        self._making: asyncio.Task[pod.PodNetwork] | None = None
        self._helper: attach.Helper | None = None
        #: that the machine has from its start, and the interface that it is
        self.card = cards.Card()
        self._first = ""
        #: what an interface was plugged in as
        self._looks: dict[str, tuple[object, ...]] = {}
        self._routes: list[pb.Route] = []
        #: nobody watched the namespace for a while
        self._unattended = False
        self._told = b""
        #: name servers at the namespace's loopback that the guest reaches, and whether it does
        self._name_servers: dict[str, asyncio.Event] = {}
        self._more_name_servers: asyncio.Queue[str] = asyncio.Queue()

    def begin(self, config: VmConfig) -> None:
        """Start to make the network for a machine that is to be started."""
        if cards.has(config):
            self.card.begin()
        if self.options.kind != "none":
            self._helper = attach.Helper()  # now, because soon this process cannot fork any more
            self._making = asyncio.create_task(self._make(self._helper), name="network")

    async def _make(self, helper: attach.Helper) -> pod.PodNetwork:
        began = time.monotonic()
        try:
            network = await pod.made(self.place, self.options, self.settings, helper, self.card.tap)
        finally:
            await helper.close()
        self.seconds = time.monotonic() - began
        return network

    async def plug(self, vm: Vm) -> None:
        """Give the machine its interfaces, as soon as there are any."""
        if self._making is not None:
            self.network = await asyncio.shield(self._making)
            self.plugged.clear()
            self._machine = vm
            self._paths = {tap.endpoint.name: await self._attach(vm, tap) for tap in self.network.taps}

    def is_plugged_into(self, vm: Vm) -> bool:
        """Whether this machine has its interfaces; one that failed may have had them."""
        return self._machine is vm

    def describe(self, request: pb.CreateSandboxRequest) -> None:
        """Say in the request to its guest what the machine was given."""
        if self.network is not None:
            for endpoint in self.network.endpoints:
                request.interfaces.append(interface_of(endpoint, pci_path=self._paths[endpoint.name]))
            self._routes = routes_of(self.network.endpoints)
            request.routes.extend(self._routes)
            request.neighbours.extend(neighbours_of(self.network.endpoints))
        self._told = request.hosts = self._hosts()
        if self.network is not None or self.options.dns or self.options.dns_search or self.options.dns_options:
            self._tell_resolver(request.dns)

    def become(self, spec: SandboxSpec) -> None:
        """Be the network of a pod that was not known when this one was made; `suits` has said that it can."""
        self.spec, self.options = spec, NetworkOptions.of(spec.network)
        if self.network is not None:
            self.network.options = self.options

    def suits(self, spec: SandboxSpec) -> bool:
        """Whether what was made is what a pod would get: names and resolvers are only told to the guest."""
        wanted = NetworkOptions.of(spec.network)
        return (wanted.kind, wanted.path, wanted.ports, wanted.ip) == (
            self.options.kind,
            self.options.path,
            self.options.ports,
            self.options.ip,
        )

    @property
    def failed(self) -> bool:
        """The network cannot be made: no machine will have it."""
        making = self._making
        return making is not None and making.done() and (making.cancelled() or making.exception() is not None)

    async def _attach(self, vm: Vm, tap: Tap) -> str:
        endpoint = tap.endpoint
        if tap.early:
            identifier, path = cards.FIRST, cards.address(vm.config)
            self._first = endpoint.name
        else:
            identifier = f"if{endpoint.index}"
            nic = Nic(id=identifier, tap_fd=tap.fd, mac=endpoint.mac, mtu=endpoint.mtu, vhost_fd=tap.vhost_fd)
            path = (await vm.attach_nic(nic)).pci_path
        self.plugged[endpoint.name] = identifier
        self._looks[endpoint.name] = _look(endpoint)
        return path

    def recognise(self, vm: Vm) -> None:
        """Find the interfaces that an earlier supervisor plugged in, also those that the namespace has no more."""
        devices = vm.devices()
        network = self.network
        if network is None:
            return
        self._first = network.first if f"nic-{cards.FIRST}" in devices else ""
        known = {each.name: each for each in (*network.endpoints, *network.plugged())}
        names = {name: cards.FIRST if name == self._first else f"if{each.index}" for name, each in known.items()}
        self.plugged = {name: device for name, device in names.items() if f"nic-{device}" in devices}
        coming = network.coming()  # to be plugged in once more: nobody knows what the guest was told
        self._looks = {name: () if name in coming else _look(known[name]) for name in self.plugged}
        self._unattended = True

    async def settle(self) -> None:
        """The machine runs and has the taps: our copies would keep them alive after its end."""
        if self._first or self.options.kind != "namespace":
            await self.card.close()
        if self.network is not None:
            for tap in self.network.taps:
                tap.close()
            self.network.remember_plugged(self._first)
            if self.network.announces:
                self.network.announce(self._names())

    def _names(self) -> list[str]:
        own = [self.spec.hostname, *self.spec.aliases, self.spec.id[:12]]
        return [name for name in own if name]

    def _hosts(self) -> bytes:
        network = self.network or pod.PodNetwork(self.place, self.options, {})
        others = names.others(self._directory, self.spec.id) if network.announces else []
        return names.hosts_file(network.host_entries(self._names()), others)

    @property
    def _directory(self) -> Path:
        return Bridge(self.place.roots).names()

    def _tell_resolver(self, dns: pb.Dns) -> None:
        host = names.host_resolver()
        servers = self.options.dns or host.servers or tuple(self.settings.dns_fallback.split())
        dns.servers.extend(servers)
        searches = self.options.dns_search or host.searches
        dns.searches.extend(searches if searches != (".",) else ())
        dns.options.extend(self.options.dns_options or host.options)

    async def follow(self, agent: AgentClient) -> None:
        """Keep the guest's hosts file up to date while pods of the same network come and go."""
        if self.network is None or not self.network.announces:
            return
        async for _ in names.changes(self._directory):
            content = self._hosts()
            if content == self._told:
                continue
            try:
                await agent.write_files({"hosts": content})
                self._told = content
            except SandboxError as error:
                log.warning("the guest was not told of its neighbours: %s", error)

    # ------------------------------------------------------------ name servers of the namespace

    async def reach(self, name_servers: Sequence[str]) -> None:
        """Have the guest reach name servers at loopback addresses of the namespace; returns when it does."""
        network = self.network
        if network is None or self.options.kind != "namespace" or not name_servers:
            return
        new = [address for address in name_servers if address not in self._name_servers]
        for address in new:
            self._add_name_server(address)
        if new:
            network.remember(name_servers=[*self._name_servers])
        try:
            async with asyncio.timeout(NAMES_TIMEOUT):
                for address in name_servers:
                    await self._name_servers[address].wait()
        except TimeoutError:
            log.warning("the guest cannot ask the name servers %s of its network", ", ".join(name_servers))

    def _add_name_server(self, address: str) -> None:
        self._name_servers[address] = asyncio.Event()
        self._more_name_servers.put_nowait(address)

    async def relay_names(self, agent: AgentClient) -> None:
        """Answer what the guest asks of such name servers, also those that an earlier supervisor relayed for."""
        network = self.network
        if network is None or self.options.kind != "namespace":
            return
        for address in network.name_servers():
            self._add_name_server(address)
        async with asyncio.TaskGroup() as relays:
            while True:
                address = await self._more_name_servers.get()
                serving = resolving.keep(agent, network.namespace, address, self._name_servers[address])
                relays.create_task(serving, name=f"names of {address}")

    # ------------------------------------------------------------ changes while it runs

    async def watch(self, vm: Vm, agent: AgentClient) -> None:
        """Follow what an engine does to the namespace while the pod runs."""
        network = self.network
        if network is None or network.changes < 0:
            return
        changed = asyncio.Event()
        if self._unattended:
            changed.set()
        loop = asyncio.get_running_loop()
        loop.add_reader(network.changes, _drain, network.changes, changed)
        try:
            while True:
                await changed.wait()
                await asyncio.sleep(SETTLE_SECONDS)  # an interface comes with its addresses and routes
                changed.clear()
                try:
                    await self.refresh(vm, agent)
                except SandboxError as error:
                    log.warning("the guest does not have the interfaces of its network: %s", error)
        finally:
            loop.remove_reader(network.changes)

    async def refresh(self, vm: Vm, agent: AgentClient) -> None:
        """Bring machine and guest in line with what interfaces the namespace has now."""
        async with self._refreshing:
            await self._refresh(vm, agent)

    async def _refresh(self, vm: Vm, agent: AgentClient) -> None:
        network = self.network
        assert network is not None
        found = {endpoint.name: endpoint for endpoint in await attach.scan(network.namespace)}
        gone = [name for name in self.plugged if name not in found or _look(found[name]) != self._looks[name]]
        for name in gone:
            await self._unplug(vm, agent, name)
        await attach.detach(network.namespace, names=gone, owner=self.spec.id)
        new = [name for name in found if name not in self.plugged]
        if new:
            await self._plug_more(vm, agent, new)
        network.taps = [attach.Tap(endpoint, -1) for endpoint in found.values()]
        routes, neighbours = routes_of(found.values()), neighbours_of(found.values())
        if gone or new or routes != self._routes:
            await agent.update_routes(routes)
            await agent.add_neighbours(neighbours)
            self._routes = routes
        if gone or new:
            network.remember_plugged(self._first)
            log.info("interfaces of the pod: %s; new: %s; gone: %s", sorted(found), new, gone)

    async def _plug_more(self, vm: Vm, agent: AgentClient, names: list[str]) -> None:
        network = self.network
        assert network is not None
        check = self.settings.source_check
        # A machine that has had no interface yet has the card for one.
        early = await self.card.tap()
        taps = await attach.attach(network.namespace, names=names, source_check=check, owner=self.spec.id, early=early)
        try:
            await self.card.close()
            first = next((tap.endpoint.name for tap in taps if tap.early), self._first)
            network.remember_plugged(first, coming=[tap.endpoint for tap in taps])
            for tap in taps:
                with translating():
                    pci_path = await self._attach(vm, tap)
                await agent.update_interface(interface_of(tap.endpoint, pci_path=pci_path))
        finally:
            for tap in taps:
                tap.close()

    async def _unplug(self, vm: Vm, agent: AgentClient, name: str) -> None:
        """Take an interface from the guest; one that does not give it back keeps a device that leads nowhere."""
        device = self.plugged.pop(name)
        if device == cards.FIRST:
            self._first = ""
        try:
            with suppress(NotFoundError):  # who plugged it in was killed before it told the guest
                await agent.remove_interface(name)
            with translating():
                await vm.detach_nic(device)
        except SandboxError as error:
            log.warning("the guest keeps interface '%s', which leads nowhere: %s", name, error)

    async def end(self) -> None:
        """Take the network apart; the machine has ended."""
        if self._making is not None:
            self._making.cancel()
            await asyncio.wait({self._making})
            if not self._making.cancelled() and self._making.exception() is None:
                self.network = self._making.result()
        if self._helper is not None:
            await self._helper.close()
        await self.card.close()
        if self.network is not None:
            self.network.let_go()
        try:
            await pod.release(self.place)
        except SandboxError as error:
            log.warning("the network is left to 'vmsandbox gc': %s", error)


@asynccontextmanager
async def connected(around: Surroundings, spec: SandboxSpec, config: VmConfig) -> AsyncIterator[Connection]:
    """The network of a pod and its machine for the block, which begins while it is still being made."""
    connection = Connection(around, spec)
    connection.begin(config)
    try:
        yield connection
    finally:
        await finish(connection.end(), seconds=RELEASE_TIMEOUT)


@asynccontextmanager
async def resumed(around: Surroundings, spec: SandboxSpec) -> AsyncIterator[Connection]:
    """The network of a pod that an earlier supervisor made; its machine may or may not still run."""
    connection = Connection(around, spec)
    if connection.options.kind != "none":
        connection.network = network = pod.known(connection.place, connection.options)
        if os.path.exists(network.namespace):
            try:
                if connection.options.kind == "namespace":
                    network.changes = await attach.watch(network.namespace)
                network.taps = [attach.Tap(endpoint, -1) for endpoint in await attach.scan(network.namespace)]
            except SandboxError as error:
                log.warning("the pod's network cannot be looked at: %s", error)
    try:
        yield connection
    finally:
        await finish(connection.end(), seconds=RELEASE_TIMEOUT)


def _look(endpoint: Endpoint) -> tuple[object, ...]:
    """What makes an interface another one when it changes."""
    return endpoint.mac, endpoint.mtu, endpoint.up, frozenset(endpoint.addresses)


def _drain(fd: int, changed: asyncio.Event) -> None:
    """Read all that there is; what exactly has changed is looked up."""
    changed.set()
    try:
        while os.read(fd, 1 << 16):
            pass
    except OSError:
        return  # no more, or more than the kernel keeps
