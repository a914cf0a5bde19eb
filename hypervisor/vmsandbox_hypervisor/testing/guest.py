"""A guest for tests: the distribution's kernel, an initramfs of busybox and modules, a shell behind a port.

`TestGuest` runs commands in it.  Building takes a few seconds once; the result is kept below a cache directory.
"""

from __future__ import annotations

import asyncio
import fcntl
import lzma
import os
import re
import secrets
import shlex
import shutil
import struct
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT = "test.shell"
BUSYBOX = Path("/bin/busybox")
META_PACKAGE = "linux-image-amd64"
#: what the tests need in the guest; their dependencies are found
MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio_mem",
    "virtio_balloon",
    "virtio-rng",
    "virtiofs",
    "9p",
    "9pnet_virtio",
)
#: built anew when this changes
VERSION = "2"

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /bin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin
while read -r module; do insmod "/modules/$module" || echo "no module $module"; done < /modules/order
echo "test guest is up"
find_port() {
  for name in /sys/class/virtio-ports/*/name; do
    [ "$(cat "$name")" = @PORT@ ] && { basename "$(dirname "$name")"; return; }
  done
}
port=/dev/$(find_port)
exec 3<>"$port"
# Without anybody at the other end a read returns at once: pause between attempts.
while :; do
  if IFS=' ' read -r id command <&3 && [ -n "$id" ]; then
    sh -c "$command" > /tmp/output 2>&1 < /dev/null
    status=$?
    { printf '%s %s %s\\n' "$id" "$status" "$(wc -c < /tmp/output)"; cat /tmp/output; } >&3
  else
    usleep 5000
  fi
done
"""


class GuestError(Exception):
    """The guest cannot be built, or does not answer."""


@dataclass(frozen=True)
class GuestFiles:
    """What a test VM boots."""

    kernel: Path
    initrd: Path


@dataclass(frozen=True)
class Answer:
    """What a command in the guest came to; `output` is stdout and stderr."""

    status: int
    output: str


class TestGuest:
    """The shell in the guest, through the host's end of its port."""

    __test__ = False

    def __init__(self, port: Path) -> None:
        self._port = port

    async def run(self, command: str, *, check: bool = True, timeout: float = 20.0) -> str:
        """Run one line of shell and return what it prints; `GuestError` if it fails."""
        answer = await self.answer(command, timeout=timeout)
        if check and answer.status:
            raise GuestError(f"'{command}' ended with status {answer.status} in the guest: {answer.output}")
        return answer.output.strip()

    async def answer(self, command: str, *, timeout: float = 20.0) -> Answer:
        """Run one line of shell; a guest that is still booting answers when it is up."""
        if "\n" in command:
            raise ValueError("one line only")
        identity = secrets.token_hex(8)
        try:
            async with asyncio.timeout(timeout):
                return await self._exchange(identity, command)
        except TimeoutError as error:
            raise GuestError(f"no answer to '{command}' from the guest within {timeout:g} s") from error

    async def _exchange(self, identity: str, command: str) -> Answer:
        reader, writer = await asyncio.open_unix_connection(str(self._port))
        try:
            writer.write(f"{identity} {command}\n".encode())
            while True:
                # What an earlier, broken connection left behind comes first.
                line = await reader.readline()
                if not line:
                    raise GuestError(f"the port was closed during '{command}'")
                if (found := re.search(rb"%s (\d+) (\d+)\n$" % identity.encode(), line)) is not None:
                    output = await reader.readexactly(int(found[2]))
                    return Answer(int(found[1]), output.decode(errors="replace"))
        finally:
            writer.close()

    async def eventually(self, command: str, wanted: str, *, timeout: float = 20.0) -> str:
        """Run a command until its output is `wanted`: the guest takes a moment to notice a device."""
        quoted = shlex.quote(wanted)
        script = (
            f"i=0; while [ $i -lt {int(timeout * 50)} ]; do "
            f'o=$({{ {command}; }} 2>/tmp/errors); [ "$o" = {quoted} ] && break; '
            f'i=$((i+1)); usleep 20000; done; echo "$o"; [ "$o" = {quoted} ] || cat /tmp/errors'
        )
        output = await self.run(script, timeout=timeout + 10)
        if output != wanted:
            raise GuestError(f"'{command}' gives '{output}' in the guest, never '{wanted}'")
        return output


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/vmsandbox-hypervisor``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vmsandbox-hypervisor"


def guest_files(cache: Path | None = None, *, busybox: Path = BUSYBOX) -> GuestFiles:
    """The distribution's kernel as a vmlinux, and a test initramfs for it; built if they are not there yet.

    Needs apt-get, dpkg-deb and a static busybox; `GuestError` says what is missing.
    """
    cache = cache or default_cache()
    if not busybox.exists():
        raise GuestError(f"no static busybox at '{busybox}': install busybox-static")
    package = kernel_package()
    directory = cache / f"{package}-{VERSION}"
    files = GuestFiles(directory / "vmlinux", directory / "initrd")
    if files.initrd.exists():
        return files
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / ".lock"), tempfile.TemporaryDirectory(dir=cache) as scratch:
        if not files.initrd.exists():
            work = Path(scratch)
            _run(["apt-get", "download", package], cwd=work)
            archive = next(work.glob("*.deb"))
            tree = work / "tree"
            _run(["dpkg-deb", "-x", str(archive), str(tree)], cwd=work)
            built = work / "built"
            built.mkdir()
            image = next((tree / "boot").glob("vmlinuz-*"))
            (built / "vmlinux").write_bytes(extract_vmlinux(image.read_bytes()))
            (built / "initrd").write_bytes(initramfs(busybox, modules(tree / "lib" / "modules")))
            built.chmod(0o755)
            shutil.rmtree(directory, ignore_errors=True)
            built.rename(directory)
    return files


def kernel_package() -> str:
    """The package that the distribution's meta package for kernels stands for."""
    listing = _run(["apt-cache", "depends", META_PACKAGE])
    found = re.search(r"Depends: (linux-image-[0-9]\S*)", listing)
    if found is None:
        raise GuestError(f"package '{META_PACKAGE}' is not known: run apt-get update")
    return found[1]


def extract_vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage that was compressed with xz."""
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise GuestError("not a bzImage")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    try:
        # The payload ends with its unpacked size, which is not part of the xz stream.
        kernel = lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(image[start : start + length - 4])
    except lzma.LZMAError as error:
        raise GuestError(f"the kernel is not compressed with xz: {error}") from error
    if not kernel.startswith(b"\x7fELF"):
        raise GuestError("no ELF kernel in the bzImage")
    return kernel


def modules(tree: Path, wanted: tuple[str, ...] = MODULES) -> list[Path]:
    """The module files for `wanted` below `tree`, dependencies first; those built in have none."""
    files = {path.stem.replace("-", "_"): path for path in tree.rglob("*.ko")}
    order: dict[str, Path] = {}

    def add(name: str) -> None:
        name = name.replace("-", "_")
        path = files.get(name)
        if path is None or name in order:
            return
        found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for needed in found[1].decode().split(",") if found else []:
            if needed:
                add(needed)
        order[name] = path

    for name in wanted:
        add(name)
    return list(order.values())


def initramfs(busybox: Path, module_files: list[Path]) -> bytes:
    """An uncompressed cpio archive with busybox, the modules and an init that serves `TestGuest`."""
    archive = bytearray()
    for directory in ("bin", "modules", "dev"):
        archive += _entry(directory, 0o040755)
    archive += _entry("dev/console", 0o020600, device=(5, 1))
    archive += _entry("bin/busybox", 0o100755, busybox.read_bytes())
    for path in module_files:
        archive += _entry(f"modules/{path.name}", 0o100644, path.read_bytes())
    archive += _entry("modules/order", 0o100644, "".join(f"{path.name}\n" for path in module_files).encode())
    archive += _entry("init", 0o100755, INIT.replace("@PORT@", PORT).encode())
    archive += _entry("TRAILER!!!", 0)
    return bytes(archive)


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One member in the "newc" format."""
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(argv: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise GuestError(f"no program '{argv[0]}'") from error
    except subprocess.CalledProcessError as error:
        raise GuestError(f"'{' '.join(argv)}' failed: {error.stderr.strip()}") from error
    return done.stdout
