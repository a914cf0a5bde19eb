"""Kernels and images that pass for ones and do not work."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_LOAD, _NOTE = 1, 4
_ADDRESS = 1 << 20
#: cli; again: hlt; jmp again
_CODE = b"\xfa\xf4\xeb\xfd"
_HEADERS = 64 + 2 * 56


def hanging_kernel(path: Path) -> Path:
    """A kernel that is entered by PVH and says nothing for ever."""
    note = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", _ADDRESS)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, _ADDRESS, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    segments = b""
    for kind, offset, size in ((_LOAD, _HEADERS + len(note), len(_CODE)), (_NOTE, _HEADERS, len(note))):
        segments += struct.pack("<IIQQQQQQ", kind, 5, offset, _ADDRESS, _ADDRESS, size, size, 4)
    path.write_bytes(header + segments + note + _CODE)
    return path


def broken_image(path: Path) -> Path:
    """A file with the mark of an erofs and nothing else."""
    path.write_bytes(bytes(1024) + b"\xe2\xe1\xf5\xe0" + bytes(64 * 1024))
    return path
