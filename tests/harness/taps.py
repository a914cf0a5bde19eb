"""Taps for machines of a test."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


def opened_tap(name: str = "vmtest%d") -> int:
    """A tap without an address, gone with its descriptor."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    # TUNSETIFF with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x0002 | 0x1000 | 0x4000))
    return fd


@pytest.fixture
def tap() -> Iterator[int]:
    fd = opened_tap()
    yield fd
    os.close(fd)
