"""Kernels and images of the user's own: whether a file is one, told by looking at its head.

A machine with anything else would hang in silence or reset itself, and say nothing about the file.
"""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.errors import InvalidArgumentError, NotFoundError
from vmsandbox.guestbuild import elf

if TYPE_CHECKING:
    from collections.abc import Iterator

#: as the start of the setup code of a kernel's own format says
_BZIMAGE_AT, _BZIMAGE = 0x202, b"HdrS"
#: as the super block of an erofs says
_EROFS_AT, _EROFS = 1024, b"\xe2\xe1\xf5\xe0"


def kernel(text: str) -> Path:
    """The path in `guest.kernel`, if QEMU can boot what is there."""
    with _opened("kernel", text) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or not _is_kernel(fd):
            raise _unfit("kernel", text, "neither a vmlinux with the PVH note nor a bzImage")
    return Path(text)


def image(text: str) -> Path:
    """The path in `guest.image`, if an erofs is there."""
    with _opened("image", text) as fd:
        kind = os.fstat(fd).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)) or os.pread(fd, len(_EROFS), _EROFS_AT) != _EROFS:
            raise _unfit("image", text, "no erofs")
    return Path(text)


def _is_kernel(fd: int) -> bool:
    if os.pread(fd, len(_BZIMAGE), _BZIMAGE_AT) == _BZIMAGE:
        return True
    if not elf.is_elf(os.pread(fd, elf.IDENTITY, 0)):
        return False
    try:
        # It is large, and little of it is looked at.
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as content:
            return elf.pvh_entry(content) is not None
    except elf.ElfError:
        return False


@contextmanager
def _opened(member: str, text: str) -> Iterator[int]:
    try:
        # Without blocking: what turns out to be a FIFO must not wait for its other end.
        fd = os.open(text, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        words = f"cannot open '{text}' ('guest.{member}'): {(error.strerror or str(error)).lower()}"
        raise NotFoundError(f"{words}: correct section 'guest' of the configuration") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _unfit(member: str, text: str, what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"'{text}' ('guest.{member}') is {what}: correct section 'guest' of the configuration")
