"""What authors of hypervisor tests need: fixtures by stage, a guest to look from, and a fake.

Load it with ``pytest_plugins = ["vmsandbox_hypervisor.testing"]`` in a conftest.  The stages `vm` (QEMU runs) and
`vm_booted` (the guest answers) hand out blocks, because a machine belongs to the event loop of the test:

    async def test_a_disk_arrives(vm_booted):
        async with vm_booted as (machine, guest):
            await machine.attach_disk(Disk(id="d", path=image))
            await guest.eventually("ls /sys/block", "vda")

`vm_shared` is `vm_booted` on one machine for a whole module: it is booted once and adopted by each test, which
has to leave it as it was.  What is started is described by `vm_files`, `vm_memory`, `vm_cpus`, `vm_ports` and
`vm_confinement`; override any of them, or `vm_config` as a whole.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import pytest

from vmsandbox_hypervisor import kernel
from vmsandbox_hypervisor.api import Confinement, Cpus, Kernel, Memory, Port, VmConfig
from vmsandbox_hypervisor.frequency import host_khz
from vmsandbox_hypervisor.qemu.machine import QemuHypervisor
from vmsandbox_hypervisor.testing.fake import FakeHypervisor, FakeVm
from vmsandbox_hypervisor.testing.guest import PORT, GuestError, GuestFiles, TestGuest, guest_files

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from vmsandbox_hypervisor.api import Hypervisor, Vm

T = TypeVar("T")

__all__ = [
    "PORT",
    "FakeHypervisor",
    "FakeVm",
    "GuestError",
    "GuestFiles",
    "Stage",
    "TestGuest",
    "booted",
    "guest_files",
    "shown",
]

#: seconds a guest may take until it answers, on a busy machine without KVM
BOOT_TIMEOUT = 60.0


@asynccontextmanager
async def shown(block: AbstractAsyncContextManager[Vm]) -> AsyncIterator[Vm]:
    """`block`, but a test that fails in it prints the machine's evidence, which pytest keeps with the failure."""
    async with block as machine:
        try:
            yield machine
        except BaseException:
            print(machine.evidence())
            raise


@asynccontextmanager
async def booted(block: AbstractAsyncContextManager[Vm]) -> AsyncIterator[tuple[Vm, TestGuest]]:
    """`block`, once the guest in it answers."""
    async with shown(block) as machine:
        guest = TestGuest(machine.port_path(PORT))
        await guest.run("true", timeout=BOOT_TIMEOUT)
        yield machine, guest


class Stage(Generic[T]):
    """An ``async with`` block that can be entered again once it was left."""

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._make = make
        self._entered: AbstractAsyncContextManager[T] | None = None

    async def __aenter__(self) -> T:
        self._entered = self._make()
        return await self._entered.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._entered is not None
        return await self._entered.__aexit__(kind, error, trace)


@pytest.fixture(scope="session")
def hypervisor() -> Hypervisor:
    """The driver under test."""
    return QemuHypervisor()


@pytest.fixture(scope="session")
def vm_files() -> GuestFiles:
    """Kernel and initrd of the test guest."""
    return guest_files()


@pytest.fixture(scope="module")
def vm_memory() -> Memory:
    return Memory(size_mib=256, hotplug_mib=512)


@pytest.fixture(scope="module")
def vm_cpus() -> Cpus:
    return Cpus(boot=1, maximum=4)


@pytest.fixture(scope="module")
def vm_ports() -> tuple[Port, ...]:
    """Ports beside the one that the test guest listens on."""
    return ()


@pytest.fixture(scope="module")
def vm_confinement() -> Confinement | None:
    """The identity of QEMU; nobody's, which needs root to take on."""
    return Confinement(uid=65534, gid=65534)


@pytest.fixture(scope="module")
def vm_template(
    vm_files: GuestFiles,
    vm_memory: Memory,
    vm_cpus: Cpus,
    vm_ports: tuple[Port, ...],
    vm_confinement: Confinement | None,
) -> VmConfig:
    """Everything of `vm_config` but the directory, which every machine needs for itself."""
    return VmConfig(
        name="test",
        directory=Path("/nonexistent"),
        kernel=Kernel(
            path=vm_files.kernel,
            initrd=vm_files.initrd,
            cmdline=kernel.parameters("tcg", khz=host_khz()),
        ),
        memory=vm_memory,
        cpus=vm_cpus,
        ports=(Port(name=PORT), *vm_ports),
        confinement=vm_confinement,
    )


@pytest.fixture
def vm_directory() -> Iterator[Path]:
    """A directory with a path short enough for sockets; fails the test that leaves something of ours in it."""
    directory = Path(tempfile.mkdtemp(prefix="vm-"))
    yield directory
    left = sorted(path.name for path in directory.iterdir())
    shutil.rmtree(directory)
    assert not left, f"the machine left files behind: {left}"


@pytest.fixture
def vm_config(vm_template: VmConfig, vm_directory: Path) -> VmConfig:
    """The machine that `vm` and `vm_booted` start."""
    return replace(vm_template, directory=vm_directory)


@pytest.fixture
def vm(hypervisor: Hypervisor, vm_config: VmConfig) -> Stage[Vm]:
    """Stage one: QEMU runs and its monitor answers."""
    return Stage(lambda: shown(hypervisor.running(vm_config)))


@pytest.fixture
def vm_booted(hypervisor: Hypervisor, vm_config: VmConfig) -> Stage[tuple[Vm, TestGuest]]:
    """Stage two: the guest answers."""
    return Stage(lambda: booted(hypervisor.running(vm_config)))


@pytest.fixture(scope="module")
def vm_kept(hypervisor: Hypervisor, vm_template: VmConfig) -> Iterator[tuple[VmConfig, int, int]]:
    """A booted machine that nobody holds, for as long as the module's tests run: its configuration, pid, start time."""
    directory = Path(tempfile.mkdtemp(prefix="vm-"))
    config = replace(vm_template, directory=directory)

    async def start() -> tuple[int, int]:
        async with booted(hypervisor.running(config)) as (machine, _):
            machine.release()
            return machine.pid, machine.start_time

    async def end(pid: int, start_time: int) -> None:
        async with hypervisor.adopted(config, pid=pid, start_time=start_time):
            pass

    try:
        pid, start_time = asyncio.run(start())
        try:
            yield config, pid, start_time
        finally:
            asyncio.run(end(pid, start_time))
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def vm_shared(hypervisor: Hypervisor, vm_kept: tuple[VmConfig, int, int]) -> Stage[tuple[Vm, TestGuest]]:
    """Stage two on the module's own machine; leave it as it was."""
    config, pid, start_time = vm_kept

    @asynccontextmanager
    async def borrowed() -> AsyncIterator[tuple[Vm, TestGuest]]:
        async with shown(hypervisor.adopted(config, pid=pid, start_time=start_time)) as machine:
            machine.release()
            yield machine, TestGuest(machine.port_path(PORT))

    return Stage(borrowed)
