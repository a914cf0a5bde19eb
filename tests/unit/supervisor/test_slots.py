"""What is in a machine's slots: as template, as clone, booted cold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vmsandbox.resources import scratch
from vmsandbox.supervisor import slots
from vmsandbox.supervisor.sandbox import SandboxSpec
from vmsandbox_hypervisor.api import Disk, Kernel, Memory, VmConfig

LAYER_MIB = 16


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    (tmp_path / "vm").mkdir()
    return slots.reserved(
        VmConfig(
            name="pod",
            directory=tmp_path / "vm",
            kernel=Kernel(path=Path("/guest/vmlinux")),
            memory=Memory(size_mib=128),
            disks=(Disk(id="root", path=Path("/guest/image"), read_only=True),),
        )
    )


def files(config: VmConfig) -> dict[str, Path]:
    return {disk.id: disk.path for disk in config.disks}


def test_a_clone_has_its_image_and_a_copy_of_the_template_s_layer(config: VmConfig, tmp_path: Path) -> None:
    template = slots.for_template(config, tmp_path / "vm", layer_mib=LAYER_MIB, cache=tmp_path / "cache")
    layer = files(template)["layer"]
    with layer.open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"written by the template's guest")
    spec = SandboxSpec(id="pod", image="/images/box.erofs", layer=str(tmp_path / "own.img"), layer_mib=LAYER_MIB)
    clone = slots.for_clone(config, spec, layer)
    assert files(clone) == {
        "root": Path("/guest/image"),
        "image": Path("/images/box.erofs"),
        "layer": tmp_path / "own.img",
    }
    assert (tmp_path / "own.img").read_bytes() == layer.read_bytes()


def test_a_clone_without_a_container_has_something_in_its_slots(config: VmConfig, tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    scratch.create(layer, LAYER_MIB, tmp_path / "cache")
    clone = slots.for_clone(config, SandboxSpec(id="pod"), layer)
    assert files(clone)["image"] == Path("/guest/image")
    assert files(clone)["layer"].parent == tmp_path / "vm"
    assert files(clone)["layer"].read_bytes() == layer.read_bytes()


def test_a_cold_boot_has_slots_for_what_there_is(config: VmConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert [*files(slots.for_boot(config, SandboxSpec(id="pod"), cache=cache))] == ["root"]
    begun = tmp_path / "own.img"
    begun.write_bytes(b"what a clone that failed has written")
    spec = SandboxSpec(id="pod", image="/images/box.erofs", layer=str(begun), layer_mib=LAYER_MIB)
    assert [*files(slots.for_boot(config, spec, cache=cache))] == ["root", "image", "layer"]
    assert begun.stat().st_size == LAYER_MIB << 20


def test_slots_are_where_the_command_line_says(config: VmConfig) -> None:
    assert [slots.address(config, slot) for slot in (slots.IMAGE, slots.LAYER)] == ["05.0", "06.0"]
    fewer = replace(config, disks=(config.disks[0], config.disks[2]))
    assert slots.address(fewer, slots.LAYER) == "05.0"
    with pytest.raises(ValueError, match="no disk 'image'"):
        slots.address(fewer, slots.IMAGE)


def test_an_image_has_to_fit(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(slots.IMAGE_LIMIT + 1)
    assert not slots.holds(image)
    with image.open("wb") as file:
        file.truncate(slots.IMAGE_LIMIT)
    assert slots.holds(image)
