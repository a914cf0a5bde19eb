"""The kernel is taken out of a bzImage only if it can be booted the way we boot it."""

from __future__ import annotations

import lzma
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from vmsandbox.errors import NotFoundError, UnsupportedError
from vmsandbox.guestbuild import elf, kernel, modules
from vmsandbox.guestbuild.modules import Modules

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def made_elf(*, note: bytes = b"", sections: Mapping[str, bytes] | None = None) -> bytes:
    """An ELF file with one note segment and these sections."""
    contents = {"": b"", **(sections or {})}
    contents[".shstrtab"] = b"".join(name.encode() + b"\0" for name in (*contents, ".shstrtab"))
    body = note
    headers = b""
    offset = 120 + len(note)
    name_offset = 0
    for name, content in contents.items():
        headers += struct.pack("<IIQQQQIIQQ", name_offset, 1, 0, 0, offset, len(content), 0, 0, 1, 0)
        name_offset += len(name) + 1
        body += content
        offset += len(content)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, 0, 64, offset, 0, 64, 56, 1, 64, len(contents), len(contents) - 1,
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    return header + segment + body + headers


def made_note(kind: int, value: bytes, name: bytes = b"Xen\0") -> bytes:
    padded = value + bytes(-len(value) % 4)
    return struct.pack("<III", len(name), len(value), kind) + name + bytes(-len(name) % 4) + padded


PVH_NOTE = made_note(6, b"linux\0") + made_note(18, struct.pack("<Q", 0x1000000))


def made_image(payload: bytes, *, setup_sectors: int = 3, version: int = 0x20F) -> bytes:
    """A bzImage: boot sector, setup sectors, some code, the payload, and more code."""
    code = b"\xcc" * 100
    head = bytearray((setup_sectors + 1) * 512)
    head[0x1F1] = setup_sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, len(code), len(payload))
    return bytes(head) + code + payload + b"\xcc" * 33


def compressed(content: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
    return lzma.compress(content, check=lzma.CHECK_CRC32, filters=filters) + struct.pack("<I", len(content))


def test_the_kernel_is_taken_out_of_its_image() -> None:
    content = made_elf(note=PVH_NOTE)
    assert kernel.vmlinux(made_image(compressed(content))) == content
    assert elf.pvh_entry(content) == 0x1000000


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"\0" * 4096, "not a bzImage"),
        (b"", "not a bzImage"),
        (made_image(compressed(made_elf(note=PVH_NOTE)), version=0x207), "2.7"),
        (made_image(b"\x1f\x8b gzip"), "xz"),
        (made_image(compressed(made_elf(note=PVH_NOTE))[:40]), "PVH|decompressed"),
        (made_image(b"\xfd7zXZ\0" + b"\xff" * 64), "decompressed"),
        (made_image(compressed(b"no ELF file")), "PVH"),
        (made_image(compressed(made_elf(note=made_note(6, b"linux\0")))), "PVH"),
        (made_image(compressed(made_elf(note=made_note(18, b"\0" * 8, name=b"GNU\0")))), "PVH"),
    ],
)
def test_an_image_that_cannot_be_booted_by_pvh_is_refused(image: bytes, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        kernel.vmlinux(image)


def made_module(*facts: str) -> bytes:
    return made_elf(sections={".text": b"code", ".modinfo": b"".join(fact.encode() + b"\0" for fact in facts)})


@pytest.fixture
def release(tmp_path: Path) -> Path:
    directory = tmp_path / "6.1.0"
    contents = {
        "fs/top.ko": made_module("depends=middle,ground-floor", "alias=fs-top", "alias=other=top"),
        "fs/middle.ko": made_module("depends=ground_floor,builtin"),
        "lib/ground-floor.ko": made_module("depends="),
        "lib/hidden.ko": made_module("license=GPL"),
    }
    for name, content in contents.items():
        (directory / "kernel" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "kernel" / name).write_bytes(content)
    (directory / "modules.builtin").write_text("kernel/lib/builtin.ko\n")
    return directory


def test_what_a_module_depends_on_comes_before_it(release: Path) -> None:
    assert [module.name for module in Modules(release).closure(["top"])] == ["ground_floor", "middle", "top"]


def test_dependencies_by_name_are_loaded_too(release: Path) -> None:
    closure = Modules(release).closure(["top"], extra={"middle": ("hidden",)})
    assert [module.name for module in closure] == ["ground_floor", "hidden", "middle", "top"]


def test_a_module_that_is_built_in_needs_no_loading(release: Path) -> None:
    assert Modules(release).closure(["builtin"]) == []


def test_a_kernel_without_the_module_is_refused(release: Path) -> None:
    with pytest.raises(NotFoundError, match="'missing'"):
        Modules(release).closure(["missing"])


def test_modprobe_is_told_places_dependencies_and_aliases(release: Path) -> None:
    files = modules.dependency_files(Modules(release).closure(["top"]), release)
    assert files["modules.dep"].splitlines() == [
        "kernel/lib/ground-floor.ko:",
        "kernel/fs/middle.ko: kernel/lib/ground-floor.ko",
        "kernel/fs/top.ko: kernel/fs/middle.ko kernel/lib/ground-floor.ko",
    ]
    assert files["modules.alias"] == "alias fs-top top\nalias other=top top\n"


def test_a_dependency_of_several_is_loaded_before_all_of_them(release: Path) -> None:
    (release / "kernel/fs/top.ko").write_bytes(made_module("depends=middle,other"))
    (release / "kernel/fs/other.ko").write_bytes(made_module("depends=ground_floor"))
    files = modules.dependency_files(Modules(release).closure(["top"]), release)
    (line,) = [line for line in files["modules.dep"].splitlines() if line.startswith("kernel/fs/top.ko")]
    # Loaded from last to first.
    assert line.split()[-1] == "kernel/lib/ground-floor.ko"
    assert sorted(line.split()[1:-1]) == ["kernel/fs/middle.ko", "kernel/fs/other.ko"]


def test_a_signature_is_cut_off_and_nothing_else() -> None:
    module = made_module("name=x")
    signature = b"signature" * 7
    info = struct.pack(">BBBBB3xI", 0, 0, 2, 0, 0, len(signature))
    signed = module + signature + info + b"~Module signature appended~\n"
    assert modules.without_signature(signed) == module
    assert modules.without_signature(module) == module


@pytest.mark.parametrize("damage", [slice(0, 70), slice(0, 130), slice(0, -30), slice(1, None)])
def test_a_damaged_file_is_an_error_of_ours(damage: slice) -> None:
    with pytest.raises(elf.ElfError):
        elf.section(made_module("name=x")[damage], ".modinfo")


def test_the_libraries_that_a_program_needs_are_read_from_it() -> None:
    with open("/usr/bin/env", "rb") as stream:
        data = stream.read()
    listed = subprocess.run(["ldd", "/usr/bin/env"], capture_output=True, text=True, check=True).stdout
    assert elf.needed(data)
    assert all(name in listed for name in elf.needed(data))
