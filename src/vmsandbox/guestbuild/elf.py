"""Reads the little that is needed of ELF files: sections, notes, and which libraries a file asks for.

The files come from signed packages and verified wheels; still, whatever does not parse is an `ElfError`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox.errors import SandboxError

if TYPE_CHECKING:
    import mmap

    #: read, or mapped
    Content = bytes | mmap.mmap

#: bytes that tell whether a file is one
IDENTITY = 6
_PT_DYNAMIC = 2
_PT_LOAD = 1
_PT_NOTE = 4
_DT_NEEDED = 1
_DT_STRTAB = 5
_PHYS32_ENTRY = 18


class ElfError(SandboxError):
    """Not a 64-bit little-endian ELF file, or a damaged one."""


class _Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    size: int


def is_elf(data: Content) -> bool:
    return data[:IDENTITY] == b"\x7fELF\x02\x01"


def section(data: bytes, name: str) -> bytes:
    """The content of the first section of this name; empty if there is none."""
    _check(data)
    try:
        (table,) = struct.unpack_from("<Q", data, 40)
        entry_size, count, names_index = struct.unpack_from("<HHH", data, 58)
        headers = [struct.unpack_from("<IIQQQQ", data, table + index * entry_size) for index in range(count)]
        names = headers[names_index][4]
        for name_offset, _, _, _, offset, size in headers:
            start = names + name_offset
            if data[start : data.index(b"\0", start)] == name.encode():
                return data[offset : offset + size]
    except (struct.error, IndexError, ValueError) as error:
        raise ElfError(f"damaged ELF file: {error}") from error
    return b""


def needed(data: bytes) -> list[str]:
    """The shared libraries this file asks the dynamic loader for, in its order."""
    segments = _segments(data)
    try:
        entries = []
        for segment in segments:
            if segment.kind == _PT_DYNAMIC:
                entries += list(struct.iter_unpack("<QQ", data[segment.offset : segment.offset + segment.size]))
        strings = next((value for tag, value in entries if tag == _DT_STRTAB), None)
        if strings is None:
            return []
        table = _file_offset(segments, strings)
        starts = [table + value for tag, value in entries if tag == _DT_NEEDED]
        return [data[start : data.index(b"\0", start)].decode() for start in starts]
    except (struct.error, ValueError) as error:
        raise ElfError(f"damaged ELF file: {error}") from error


def functions_of(data: bytes, library: str) -> dict[str, str]:
    """The symbols that this file takes from a shared library, as far as they have versions, with these."""
    strings, needs, chosen = (section(data, name) for name in (".dynstr", ".gnu.version_r", ".gnu.version"))
    try:
        versions: dict[int, str] = {}
        at, further = 0, bool(needs)
        while further:
            _, count, file, first, following = struct.unpack_from("<HHIII", needs, at)
            aux = at + first
            for _ in range(count if _string(strings, file) == library else 0):
                _, _, number, name, step = struct.unpack_from("<IHHII", needs, aux)
                versions[number] = _string(strings, name)
                aux += step
            at, further = at + following, following > 0
        found = {}
        for index, (name, _, _, place, _, _) in enumerate(struct.iter_unpack("<IBBHQQ", section(data, ".dynsym"))):
            (number,) = struct.unpack_from("<H", chosen, 2 * index)
            if place == 0 and number in versions:
                found[_string(strings, name)] = versions[number]
    except (struct.error, ValueError) as error:
        raise ElfError(f"damaged ELF file: {error}") from error
    return found


def pvh_entry(data: Content) -> int | None:
    """Where a kernel is entered by PVH (a physical address), or None if it cannot be."""
    for segment in _segments(data):
        if segment.kind != _PT_NOTE:
            continue
        notes = data[segment.offset : segment.offset + segment.size]
        while len(notes) >= 12:
            name_size, size, kind = struct.unpack_from("<III", notes)
            start = 12 + (name_size + 3 & ~3)
            if kind == _PHYS32_ENTRY and notes[12 : 12 + name_size] == b"Xen\0":
                return int.from_bytes(notes[start : start + size], "little")
            notes = notes[start + (size + 3 & ~3) :]
    return None


def _string(table: bytes, start: int) -> str:
    return table[start : table.index(b"\0", start)].decode()


def _segments(data: Content) -> list[_Segment]:
    _check(data)
    try:
        (table,) = struct.unpack_from("<Q", data, 32)
        entry_size, count = struct.unpack_from("<HH", data, 54)
        found = []
        for index in range(count):
            kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", data, table + index * entry_size)
            found.append(_Segment(kind, offset, address, size))
    except (struct.error, OverflowError) as error:
        raise ElfError(f"damaged ELF file: {error}") from error
    return found


def _file_offset(segments: list[_Segment], address: int) -> int:
    for segment in segments:
        if segment.kind == _PT_LOAD and segment.address <= address < segment.address + segment.size:
            return address - segment.address + segment.offset
    raise ValueError(f"address {address:#x} is in no segment")


def _check(data: Content) -> None:
    if not is_elf(data):
        raise ElfError("not a 64-bit little-endian ELF file")
