"""The network card that a pod's machine has from its start, for the pod's first interface.

A card that is plugged in later costs an emulated guest as much again as a tenth of its whole start.  So the machine has
one before anybody knows which interface it will be, and a template's guest has brought it up already.  Behind it is a
tap that leads nowhere, alone in a network namespace of its own.  When the first interface is known, the tap is moved
beside it, and the guest gives the card the interface's MAC address, name and size; a guest that is given no interface
lets its driver go of the card, and shows the loopback only.

Where the host has vhost-net there is no such card: frames are made to go past QEMU when a card is plugged in.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from vmsandbox.resources.network import attach
from vmsandbox.resources.network.model import TUN, VHOST_NET
from vmsandbox_hypervisor.api import Nic
from vmsandbox_hypervisor.qemu.argv import nic_address

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vmsandbox_hypervisor.api import VmConfig

FIRST = "first"
#: until the guest gives it another one
_MAC = "02:00:00:00:00:01"


def reserved(config: VmConfig, *, tun: str = TUN, vhost_net: str = VHOST_NET) -> VmConfig:
    """The machine with the card, where that is of use, without saying what is behind it."""
    if os.path.exists(vhost_net) or not _can_be_opened(tun):
        return config
    return replace(config, nics=(Nic(id=FIRST, tap_fd=-1, mac=_MAC, mtu=0),))


def _can_be_opened(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def has(config: VmConfig) -> bool:
    """Whether the machine has the card from its start."""
    return any(nic.id == FIRST for nic in config.nics)


def address(config: VmConfig) -> str:
    """Where the guest finds it."""
    return nic_address(config, FIRST).pci_path


def _behind(config: VmConfig, fd: int) -> VmConfig:
    return replace(config, nics=tuple(replace(nic, tap_fd=fd) if nic.id == FIRST else nic for nic in config.nics))


@asynccontextmanager
async def idle(config: VmConfig) -> AsyncIterator[VmConfig]:
    """The machine with a card, if any, that never becomes an interface, for the block."""
    card = Card()
    if has(config):
        card.begin()
    try:
        yield await card.put_into(config)
    finally:
        await card.close()


class Card:
    """The tap behind a machine's first card, until it is an interface's."""

    def __init__(self) -> None:
        self._making: asyncio.Task[int] | None = None

    def begin(self) -> None:
        """Start to make the tap."""
        helper = attach.Helper(loading=False)  # now, because soon this process cannot fork any more
        self._making = asyncio.create_task(attach.early_tap(helper), name="early tap")

    async def put_into(self, config: VmConfig) -> VmConfig:
        """The machine with the tap behind its card; as it is where it has none."""
        return config if self._making is None else _behind(config, await self.tap())

    async def tap(self) -> int:
        """The tap, which stays ours; -1 if there is none, or none any more."""
        return -1 if self._making is None else await asyncio.shield(self._making)

    async def close(self) -> None:
        """Let go of the tap; a machine that has it keeps it.  Safe to repeat."""
        making, self._making = self._making, None
        if making is not None:
            making.cancel()
            await asyncio.wait({making})
            if not making.cancelled() and making.exception() is None:
                os.close(making.result())
