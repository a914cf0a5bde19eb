"""Shared libraries that stand for ones whose functions a program never calls, written without a compiler.

Each function says that it is not implemented, by a negative error number.  The dynamic loader finds every symbol in
the version that the program was linked with, and has nothing else to do: no relocation, no constructor, no further
library.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_ET_DYN, _X86_64 = 3, 62
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_READ_EXECUTE, _READ, _READ_WRITE = 5, 4, 6
_DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 5, 6, 10, 11, 14
_DT_GNU_HASH, _DT_VERSYM, _DT_VERDEF, _DT_VERDEFNUM = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
_HEADERS: Final = 64 + 3 * 56
_GLOBAL_FUNCTION: Final = 0x12
#: symbols that are defined are in a section; which one nobody asks
_DEFINED: Final = 1
#: mov eax, -ENOSYS; ret
_CODE: Final = b"\xb8" + struct.pack("<i", -errno.ENOSYS) + b"\xc3"
_BLOOM_WORDS, _BLOOM_SHIFT = 4, 6


def library(soname: str, functions: Mapping[str, str]) -> bytes:
    """A library of this name with these functions, each in its version."""
    strings = _Strings()
    names = sorted(functions)
    versions = [soname, *sorted(set(functions.values()))]
    symbols = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0)
    symbols += b"".join(
        struct.pack("<IBBHQQ", strings.add(name), _GLOBAL_FUNCTION, 0, _DEFINED, _HEADERS, len(_CODE)) for name in names
    )
    indices = struct.pack(f"<{len(names) + 1}H", 0, *(versions.index(functions[name]) + 1 for name in names))
    definitions = b"".join(
        # The first is the library itself; the last points at no next one.
        struct.pack("<HHHHIII", 1, position == 0, position + 1, 1, _hash(version), 20, following * 28)
        + struct.pack("<II", strings.add(version), 0)
        for position, version in enumerate(versions)
        for following in [position + 1 < len(versions)]
    )
    where: dict[int, int] = {}
    body = bytearray(_CODE)
    for tag, table in (
        (_DT_SYMTAB, symbols),
        (_DT_GNU_HASH, _hash_table(names)),
        (_DT_VERSYM, indices),
        (_DT_VERDEF, definitions),
        (_DT_STRTAB, bytes(strings.content)),
    ):
        body += bytes(-(_HEADERS + len(body)) % 8)
        where[tag] = _HEADERS + len(body)
        body += table
    body += bytes(-(_HEADERS + len(body)) % 8)
    entries = {
        **where,
        _DT_SONAME: strings.add(soname),
        _DT_STRSZ: len(strings.content),
        _DT_SYMENT: 24,
        _DT_VERDEFNUM: len(versions),
    }
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in (*entries.items(), (0, 0)))
    start, total = _HEADERS + len(body), _HEADERS + len(body) + len(dynamic)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", _ET_DYN, _X86_64, 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0,
    )  # fmt: skip
    segments = _segment(_PT_LOAD, _READ_EXECUTE, 0, total) + _segment(_PT_DYNAMIC, _READ, start, len(dynamic))
    # Without it the loader believes that the code is on the stack, and makes every stack executable.
    segments += _segment(_PT_GNU_STACK, _READ_WRITE, 0, 0)
    return header + segments + bytes(body) + dynamic


class _Strings:
    """Zero-terminated, each once."""

    def __init__(self) -> None:
        self.content = bytearray(b"\0")
        self._known: dict[str, int] = {}

    def add(self, text: str) -> int:
        if text not in self._known:
            self._known[text] = len(self.content)
            self.content += text.encode() + b"\0"
        return self._known[text]


def _segment(kind: int, flags: int, offset: int, size: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, offset, offset, offset, size, size, 0x1000 if kind == _PT_LOAD else 8)


def _hash_table(names: list[str]) -> bytes:
    """All in one bucket behind a filter, which lets hardly anything through that is not here."""
    hashes = [_gnu_hash(name) for name in names]
    bloom = [0] * _BLOOM_WORDS
    for value in hashes:
        bloom[value // 64 % _BLOOM_WORDS] |= 1 << value % 64 | 1 << (value >> _BLOOM_SHIFT) % 64
    chain = [*(value & ~1 for value in hashes[:-1]), *(value | 1 for value in hashes[-1:])]
    # Without any name the bucket is empty, which zero says.
    words = struct.pack("<IIII", 1, 1, _BLOOM_WORDS, _BLOOM_SHIFT) + struct.pack(f"<{_BLOOM_WORDS}Q", *bloom)
    return words + struct.pack(f"<I{len(chain)}I", bool(names), *chain)


def _gnu_hash(name: str) -> int:
    value = 5381
    for byte in name.encode():
        value = value * 33 + byte & 0xFFFFFFFF
    return value


def _hash(name: str) -> int:
    """Of a version's name, by the rule of System V."""
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high & 0xFFFFFFFF
    return value
