"""The initramfs of a modular kernel: it loads what the root needs, mounts it, and gives way to /sbin/init.

The initramfs is an uncompressed archive of the modules and one tiny program (`program.py`).  It removes
what it holds before it goes, because nobody can reach it afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmsandbox.guestbuild import program
from vmsandbox.guestbuild.cpio import Archive
from vmsandbox.guestbuild.program import RESULT, Program, Vector

if TYPE_CHECKING:
    from collections.abc import Mapping

#: the first virtio disk, in the order of PCI addresses
ROOT_DEVICE: Final = "/dev/vda"
ROOT_TYPE: Final = "erofs"
#: what a booted kernel executes, whichever kernel it is
INIT: Final = "/sbin/init"
ENVIRONMENT: Final = ("HOME=/", "TERM=linux", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")

_MS_RDONLY: Final = 1
_MS_NODEV: Final = 4
_MS_NOATIME: Final = 1024
_MS_MOVE: Final = 8192
#: probing a disk is synchronous in practice; this is for the day it is not
_ROOT_ATTEMPTS: Final = 400
_MAGIC1: Final = 0xFEE1DEAD
_MAGIC2: Final = 0x28121969
_POWER_OFF: Final = 0x4321FEDC


def initramfs(modules: Mapping[str, bytes]) -> bytes:
    """An archive that loads `modules` (name -> ELF file) in their order and starts the root's init."""
    archive = _empty()
    archive.directory("modules")
    archive.directory("root")
    init = Program()
    for name, content in modules.items():
        path = f"/modules/{name}.ko"
        archive.file(path, content)
        init.call(program.OPEN, path.encode(), 0, 0, failure=f"vmsandbox: cannot open module '{name}'", remember=True)
        failure = f"vmsandbox: cannot load module '{name}'"
        init.call(program.FINIT_MODULE, RESULT, b"", 0, failure=failure)
        init.call(program.CLOSE, RESULT, failure=None)
        init.call(program.UNLINK, path.encode(), failure=None)
    failure = "vmsandbox: cannot mount devtmpfs"
    init.call(program.MOUNT, b"devtmpfs", b"/dev", b"devtmpfs", 0, 0, failure=failure)
    init.call(
        program.MOUNT, ROOT_DEVICE.encode(), b"/root", ROOT_TYPE.encode(), _MS_RDONLY | _MS_NODEV | _MS_NOATIME, 0,
        failure=f"vmsandbox: cannot mount the guest image '{ROOT_DEVICE}'", attempts=_ROOT_ATTEMPTS,
    )  # fmt: skip
    init.call(program.MOUNT, b"/dev", b"/root/dev", 0, _MS_MOVE, 0, failure="vmsandbox: cannot move /dev")
    init.call(program.UNLINK, b"/init", failure=None)
    init.call(program.CHDIR, b"/root", failure="vmsandbox: cannot enter the root")
    init.call(program.MOUNT, b".", b"/", 0, _MS_MOVE, 0, failure="vmsandbox: cannot move the root")
    init.call(program.CHROOT, b".", failure="vmsandbox: cannot change the root")
    _execute(init, INIT)
    archive.file("init", init.elf(), mode=0o755)
    return archive.done()


def launcher(*command: str) -> bytes:
    """A program for the image's /sbin/init: it does nothing but become `command`."""
    init = Program()
    _execute(init, *command)
    return init.elf()


def floor() -> bytes:
    """An initramfs that switches the machine off at once: what no boot of this kernel can be faster than."""
    archive = _empty()
    init = Program()
    init.call(program.REBOOT, _MAGIC1, _MAGIC2, _POWER_OFF, 0, failure="vmsandbox: cannot power off")
    archive.file("init", init.elf(), mode=0o755)
    return archive.done()


def _empty() -> Archive:
    archive = Archive()
    archive.directory("dev")
    # What the kernel opens as the standard streams of the first program.
    archive.character_device("dev/console", major=5, minor=1)
    return archive


def _execute(init: Program, *command: str) -> None:
    arguments = Vector(tuple(word.encode() for word in command))
    environment = Vector(tuple(word.encode() for word in ENVIRONMENT))
    failure = f"vmsandbox: cannot execute '{command[0]}'"
    init.call(program.EXECVE, command[0].encode(), arguments, environment, failure=failure)
