"""The packaged kernel: the distribution's generic kernel, taken out of its package.

The package holds a compressed bzImage.  The ELF file in it is what QEMU enters by PVH, which
spares the guest firmware and decompression (4.3 s against 2 s to power-off under emulation).
"""

from __future__ import annotations

import lzma
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vmsandbox.errors import UnsupportedError
from vmsandbox.guestbuild import elf, initramfs, modules, packages

if TYPE_CHECKING:
    from pathlib import Path

    from vmsandbox.guestbuild.packages import Apt, Package

META_PACKAGE: Final = "linux-image-amd64"
#: loaded by the initramfs, in this order, with what they depend on: all that the agent needs to be reached and
#: that nothing could load later, because the guest has no udev
EARLY: Final = ("virtio_pci", "virtio_blk", "virtio_console", "erofs", "virtio_mem", "virtio_net", "virtio_balloon")
#: in the image, loaded by the kernel itself (through modprobe) when they are first used
LATE: Final = tuple(
    """
    ext4 overlay xfs fuse virtiofs 9p 9pnet_virtio loop virtio_rng vmw_vsock_virtio_transport
    tun dummy veth bridge br_netfilter macvlan ipvlan 8021q sch_fq_codel sch_tbf sch_htb sch_ingress cls_u32 act_mirred
    nf_tables nft_compat nft_chain_nat nft_ct nft_masq nft_redir nft_reject_inet nft_log nft_limit nft_fib_inet
    iptable_filter iptable_nat iptable_mangle ip6table_filter ip6table_nat ipt_REJECT ip6t_REJECT xt_conntrack
    xt_comment xt_multiport xt_addrtype xt_mark xt_nat xt_MASQUERADE xt_REDIRECT xt_LOG
    """.split()  # noqa: SIM905
)
#: what modules look up by name instead of linking to it
BY_NAME: Final = {"libcrc32c": ("crc32c_generic",), "jbd2": ("crc32c_generic",)}
#: a socket of family AF_VSOCK asks for this alias, which no module claims
ALIASES: Final = {"net-pf-40": "vmw_vsock_virtio_transport"}
_XZ = b"\xfd7zXZ\0"


@dataclass(frozen=True)
class KernelTree:
    """What `build` leaves in its directory."""

    directory: Path

    @property
    def vmlinux(self) -> Path:
        return self.directory / "vmlinux"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd.cpio"

    @property
    def modules(self) -> Path:
        """To be copied to /usr/lib/modules of the image; holds one directory, named by the kernel's release."""
        return self.directory / "modules"

    @property
    def release(self) -> str:
        (only,) = self.modules.iterdir()
        return only.name


def resolve(apt: Apt) -> Package:
    """The package that the distribution's generic kernel is in at present."""
    (package,) = apt.exactly(apt.depended_on(META_PACKAGE, r"linux-image-\d\S*"))
    return package


def build(package_file: Path, directory: Path, scratch: Path) -> KernelTree:
    """Take kernel and modules out of a kernel package and make the initramfs, into `directory`."""
    tree = KernelTree(directory)
    packages.extract([package_file], scratch)
    (image,) = (scratch / "boot").glob("vmlinuz-*")
    tree.vmlinux.write_bytes(vmlinux(image.read_bytes()))
    (release,) = (scratch / "lib" / "modules").iterdir()
    available = modules.Modules(release)
    early = available.closure(EARLY, extra=BY_NAME)
    late = available.closure((*EARLY, *LATE), extra=BY_NAME)
    contents = {module.name: modules.without_signature(module.path.read_bytes()) for module in late}
    tree.initrd.write_bytes(initramfs.initramfs({module.name: contents[module.name] for module in early}))
    target = tree.modules / release.name
    for module in late:
        path = target / module.path.relative_to(release)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[module.name])
    for name, text in modules.dependency_files(late, release).items():
        (target / name).write_text(text)
    with open(target / "modules.alias", "a") as stream:
        stream.writelines(f"alias {alias} {name}\n" for alias, name in ALIASES.items())
    return tree


def vmlinux(image: bytes) -> bytes:
    """The ELF file in a bzImage, which must be one that can be entered by PVH.

    Raises UnsupportedError for anything else; xz is what the distribution compresses with.
    """
    if image[0x202:0x206] != b"HdrS":
        raise UnsupportedError("the kernel of the package is not a bzImage: choose another with 'guest.kernel'")
    # Offset and length of the payload are relative to the protected-mode code behind the setup sectors.
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < 0x208:
        raise UnsupportedError(
            f"the kernel's boot protocol {version >> 8}.{version & 255} is older than 2.8: choose a newer one"
        )
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if not payload.startswith(_XZ):
        raise UnsupportedError("the kernel is not compressed with xz: choose another one")
    try:
        # The four bytes behind the stream are its size, for the kernel's own decompressor.
        content = lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(payload)
    except lzma.LZMAError as error:
        raise UnsupportedError(f"the kernel cannot be decompressed: {error}") from error
    if not elf.is_elf(content) or elf.pvh_entry(content) is None:
        raise UnsupportedError("the kernel cannot be booted by PVH: choose one that was built with CONFIG_PVH")
    return content
