"""What a guest has not let go of in time is in nobody's way later."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmsandbox.errors import UnavailableError
from vmsandbox.supervisor.sandbox import Sandbox, SandboxSpec
from vmsandbox.supervisor.shares import NINEP, VIRTIO_FS, ninep_share
from vmsandbox_hypervisor.api import Kernel, Memory, VmConfig
from vmsandbox_hypervisor.testing import FakeHypervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vmsandbox_hypervisor.testing import FakeVm


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[tuple[Sandbox, FakeVm]]:
    """A pod whose machine is a fake."""
    (directory / "shared").mkdir()
    config = VmConfig(
        name="pod",
        directory=directory,
        kernel=Kernel(path=Path("/dev/null")),
        memory=Memory(size_mib=128),
        shares=(ninep_share(str(directory / "shared")),),
    )
    around = SimpleNamespace(paths=SimpleNamespace(shared_dir=str(directory / "shared")))
    async with FakeHypervisor().running(config) as vm:
        yield Sandbox(cast("Any", around), SandboxSpec(id="pod"), vm, cast("Any", None), cast("Any", None)), vm


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    return path


async def test_an_image_that_was_not_let_go_is_there_for_the_next_container(tmp_path: Path, disk: Path) -> None:
    async with opened(tmp_path) as (sandbox, vm):
        await sandbox.share_disk("image-a", disk, user="first")
        vm.refuses.add("disk-image-a")
        with pytest.raises(UnavailableError, match="the guest refused"):
            await sandbox.unshare_disk("image-a", user="first")
        await sandbox.share_disk("image-a", disk, user="second")
        await sandbox.share_disk("image-a", disk, user="third")
        await sandbox.unshare_disk("image-a", user="second")
        assert set(vm.devices()) == {"disk-image-a"}
        await sandbox.unshare_disk("image-a", user="third")
        assert not vm.devices()


async def test_a_layer_that_was_not_let_go_is_there_for_the_next_life(tmp_path: Path, disk: Path) -> None:
    async with opened(tmp_path) as (sandbox, vm):
        await sandbox.attach_disk("scratch-a", disk, read_only=False)
        vm.refuses.add("disk-scratch-a")
        with pytest.raises(UnavailableError, match="the guest refused"):
            await sandbox.detach_disk("scratch-a")
        await sandbox.attach_disk("scratch-a", disk, read_only=False)
        assert set(vm.devices()) == {"disk-scratch-a"}


@pytest.mark.parametrize(("kind", "device"), [(VIRTIO_FS, "fs-shared"), (NINEP, "ninep-shared")])
async def test_a_share_that_was_not_let_go_is_there_for_the_next_container(
    tmp_path: Path, kind: str, device: str
) -> None:
    async with opened(tmp_path) as (sandbox, vm):
        await sandbox.shares.attach(kind, user="first")
        vm.refuses.add(device)
        with pytest.raises(UnavailableError, match="the guest refused"):
            await sandbox.shares.detach(kind, user="first")
        await sandbox.shares.attach(kind, user="second")
        assert set(vm.devices()) == {device}


async def test_what_the_guest_never_lets_go_is_an_error_that_says_what_to_do(tmp_path: Path, disk: Path) -> None:
    async with opened(tmp_path) as (sandbox, vm):
        await sandbox.share_disk("image-a", disk, user="first")
        vm.refuses.add("disk-image-a")
        with pytest.raises(UnavailableError):
            await sandbox.unshare_disk("image-a", user="first")
        vm.refuses.add("disk-image-a")
        with pytest.raises(UnavailableError, match=r"still has 'disk-image-a' .* stop and start the pod"):
            await sandbox.share_disk("image-a", disk, user="second")


async def test_a_machine_that_ends_meanwhile_is_told_as_such(tmp_path: Path, disk: Path) -> None:
    async with opened(tmp_path) as (sandbox, vm):
        await sandbox.attach_disk("scratch-a", disk, read_only=False)
        vm.die()
        with pytest.raises(UnavailableError, match="virtual machine 'pod' was killed"):
            await sandbox.attach_disk("scratch-a", disk, read_only=False)
