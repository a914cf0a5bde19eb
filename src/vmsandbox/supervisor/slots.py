"""Disks that a pod's machine has from its start: the image and the writable layer of its first container.

A disk that is plugged in later costs an emulated guest a tenth of a second, and mounting a fresh ext4 as much again.
So the machine of an implicit pod has two slots.  A template has them too: nothing is on its image slot, and the file
system on its layer slot is mounted when it is saved.  A clone gets the image of its container and a copy of that very
file system, which its kernel goes on with.

What no container uses stays unused: the slots of a pod that an engine made, or of one whose only container has a
layer that was written to before.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.resources import scratch
from vmsandbox_hypervisor.api import Disk
from vmsandbox_hypervisor.qemu.argv import disk_address

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmsandbox.supervisor.sandbox import SandboxSpec
    from vmsandbox_hypervisor.api import VmConfig

IMAGE, LAYER = "image", "layer"
IDS = frozenset({IMAGE, LAYER})
#: where the layer is mounted in the guest
LAYER_POINT = "/run/vmsandbox/storage/layer"
#: What a template's image slot can hold: its guest never asks again how large that disk is.
IMAGE_LIMIT = 1 << 40
_NOWHERE = Path("/nonexistent")


def reserved(config: VmConfig) -> VmConfig:
    """The machine with both slots, without saying what is in them."""
    empty = (Disk(id=IMAGE, path=_NOWHERE, read_only=True), Disk(id=LAYER, path=_NOWHERE))
    return replace(config, disks=(*config.disks, *empty))


def has(config: VmConfig) -> bool:
    """Whether the machine has slots."""
    return any(disk.id in IDS for disk in config.disks)


def for_template(config: VmConfig, directory: Path, *, layer_mib: int, cache: Path) -> VmConfig:
    """The machine that becomes a template, with files of its own in `directory`."""
    image, layer = empty_image(directory), directory / "layer-slot.img"
    scratch.create(layer, layer_mib, cache)
    return _filled(config, {IMAGE: image, LAYER: layer})


def empty_image(directory: Path) -> Path:
    """A file in `directory` that is as large as any image, and holds nothing."""
    image = directory / "image-slot.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_LIMIT)
    return image


def for_clone(config: VmConfig, spec: SandboxSpec, layer: Path) -> VmConfig:
    """The clone with what its first container needs; `layer` is the template's."""
    own = Path(spec.layer) if spec.layer else config.directory / "layer-slot.img"
    own.unlink(missing_ok=True)
    scratch.copy(layer, own)
    # What nobody asks for is some file of the guest's own.
    return _filled(config, {IMAGE: Path(spec.image) if spec.image else config.disks[0].path, LAYER: own})


def for_boot(config: VmConfig, spec: SandboxSpec, *, cache: Path) -> VmConfig:
    """The machine that boots cold, with slots for what there is."""
    found = {}
    if spec.image:
        found[IMAGE] = Path(spec.image)
    if spec.layer:
        found[LAYER] = Path(spec.layer)
        found[LAYER].unlink(missing_ok=True)  # a clone that failed may have begun to write
        scratch.create(found[LAYER], spec.layer_mib, cache)
    return _filled(config, found)


def holds(image: Path) -> bool:
    """Whether a clone's slot is large enough for an image."""
    return image.stat().st_size <= IMAGE_LIMIT


def address(config: VmConfig, slot: str) -> str:
    """Where the guest finds what is in a slot."""
    return disk_address(config, slot).pci_path


def _filled(config: VmConfig, files: Mapping[str, Path]) -> VmConfig:
    disks = (
        replace(disk, path=files[disk.id]) if disk.id in IDS else disk
        for disk in config.disks
        if disk.id not in IDS or disk.id in files
    )
    return replace(config, disks=tuple(disks))
