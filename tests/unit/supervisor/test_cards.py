"""Which machines have a network card from their start, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmsandbox.supervisor import cards
from vmsandbox_hypervisor.api import Kernel, Memory, VmConfig

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    return VmConfig(
        name="pod", directory=tmp_path, kernel=Kernel(path=tmp_path / "vmlinux"), memory=Memory(size_mib=128)
    )


@pytest.mark.parametrize(
    ("nodes", "expected"), [(("tun",), True), ((), False), (("tun", "vhost-net"), False)], ids=["taps", "none", "vhost"]
)
def test_a_machine_has_a_card_where_there_are_taps_and_frames_cannot_go_past_qemu(
    config: VmConfig, tmp_path: Path, nodes: tuple[str, ...], expected: bool
) -> None:
    for node in nodes:
        (tmp_path / node).touch()
    made = cards.reserved(config, tun=str(tmp_path / "tun"), vhost_net=str(tmp_path / "vhost-net"))
    assert cards.has(made) == expected
    assert len(made.nics) == expected


def test_the_card_is_in_the_first_root_port(config: VmConfig, tmp_path: Path) -> None:
    (tmp_path / "tun").touch()
    made = cards.reserved(config, tun=str(tmp_path / "tun"), vhost_net=str(tmp_path / "none"))
    assert cards.address(made) == "01.0/00.0"


async def test_a_machine_without_the_card_gets_no_tap(config: VmConfig) -> None:
    card = cards.Card()
    assert await card.put_into(config) == config
    assert await card.tap() == -1
    await card.close()
