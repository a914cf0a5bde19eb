"""What a machine was given of a namespace that others change is known to the supervisor that follows."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmsandbox.config.model import Settings
from vmsandbox.errors import NotFoundError
from vmsandbox.paths import Roots
from vmsandbox.resources.network import attach, pod
from vmsandbox.resources.network.attach import Tap
from vmsandbox.resources.network.model import Address, Endpoint
from vmsandbox.supervisor.network import Connection
from vmsandbox.supervisor.sandbox import SandboxSpec
from vmsandbox_hypervisor.api import Kernel, Memory, VmConfig
from vmsandbox_hypervisor.testing.fake import FakeHypervisor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vmsandbox_hypervisor.testing.fake import FakeVm

SPEC = SandboxSpec(id="ab" * 32, network={"kind": "namespace", "path": "/run/netns/it"})
LATE = Endpoint(name="late", mac="02:00:00:00:00:07", mtu=1500, index=7)
MOVED = Endpoint(name="late", mac=LATE.mac, mtu=1500, index=7, addresses=(Address(address="10.0.0.1", prefix=24),))


class KilledError(BaseException):
    """What a supervisor does afterwards, it does not."""


class Guest:
    """Knows its interfaces by name, and may see its supervisor killed."""

    def __init__(self, *, killing: str = "") -> None:
        self.killing = killing
        self.interfaces: dict[str, Sequence[object]] = {}

    def _reached(self, point: str) -> None:
        if self.killing == point:
            raise KilledError

    async def update_interface(self, interface: Any) -> None:
        self._reached("plugged in")
        self.interfaces[interface.name] = list(interface.addresses)
        self._reached("told")

    async def remove_interface(self, name: str) -> None:
        if name not in self.interfaces:
            raise NotFoundError(f"the guest has no interface '{name}'")
        del self.interfaces[name]

    async def update_routes(self, _routes: object) -> None:
        return

    async def add_neighbours(self, _neighbours: object) -> None:
        return


class Namespace:
    """A namespace with these interfaces."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.endpoints: list[Endpoint] = []
        monkeypatch.setattr(attach, "scan", self._scan)
        monkeypatch.setattr(attach, "attach", self._attach)
        monkeypatch.setattr(attach, "detach", self._detach)

    async def _scan(self, _namespace: str) -> list[Endpoint]:
        return self.endpoints

    async def _attach(self, _namespace: str, *, names: Sequence[str], **_: object) -> list[Tap]:
        return [Tap(each, os.open(os.devnull, os.O_RDWR)) for each in self.endpoints if each.name in names]

    async def _detach(self, *_: object, **__: object) -> None:
        return


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    return Namespace(monkeypatch)


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(str(tmp_path / "run"), str(tmp_path / "data"))


def connection(roots: Roots, vm: FakeVm | None = None) -> Connection:
    """That of a pod's supervisor; with a machine that of one that takes over."""
    made = Connection(cast("Any", SimpleNamespace(roots=roots, settings=Settings())), SPEC)
    if vm is None:
        made.network = pod.PodNetwork(made.place, made.options, {"netns": "/run/netns/it"})
    else:
        made.network = pod.known(made.place, made.options)
        made.recognise(vm)
    return made


@pytest.mark.parametrize("killed", ["plugged in", "told"])
@pytest.mark.parametrize("then", [[], [LATE], [MOVED]], ids=["it goes", "it stays", "it changes"])
async def test_what_was_being_plugged_in_when_the_supervisor_died(
    roots: Roots, namespace: Namespace, tmp_path: Path, killed: str, then: list[Endpoint]
) -> None:
    (tmp_path / "vmlinux").touch()
    memory = Memory(size_mib=128)
    config = VmConfig(name="p", directory=tmp_path, kernel=Kernel(path=tmp_path / "vmlinux"), memory=memory)
    hypervisor = FakeHypervisor()
    async with hypervisor.running(config) as vm:
        namespace.endpoints = [LATE]
        guest = Guest(killing=killed)
        with pytest.raises(KilledError):
            await connection(roots).refresh(vm, cast("Any", guest))
        assert set(vm.devices()) == {"nic-if7"}
        guest.killing = ""
        namespace.endpoints = then
        await connection(roots, vm).refresh(vm, cast("Any", guest))
        assert set(vm.devices()) == ({"nic-if7"} if then else set())
        assert {name: len(addresses) for name, addresses in guest.interfaces.items()} == {
            each.name: len(each.addresses) for each in then
        }
        # From then on it is known: a third supervisor changes nothing.
        hypervisor.journal.clear()
        await connection(roots, vm).refresh(vm, cast("Any", guest))
        assert hypervisor.journal == []
