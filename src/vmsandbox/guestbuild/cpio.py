"""Writes initramfs archives: uncompressed "newc" cpio with identical bytes for identical input.

Uncompressed, because unpacking a compressed one costs an emulated guest 100 ms.  Times and owners are zero, and
entries keep the order in which they were added.
"""

from __future__ import annotations

import stat


class Archive:
    """An initramfs in the making; parents have to be added before what is in them."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._count = 0

    def directory(self, path: str, *, mode: int = 0o755) -> None:
        self._add(path, stat.S_IFDIR | mode)

    def file(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        self._add(path, stat.S_IFREG | mode, content)

    def character_device(self, path: str, *, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(path, stat.S_IFCHR | mode, device=(major, minor))

    def done(self) -> bytes:
        """The complete archive; nothing can be added afterwards."""
        self._count = -1
        self._add("TRAILER!!!", 0)
        self._content += bytes(-len(self._content) % 512)
        return bytes(self._content)

    def _add(self, path: str, mode: int, content: bytes = b"", *, device: tuple[int, int] = (0, 0)) -> None:
        name = path.lstrip("/").encode() + b"\0"
        self._count += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        # inode, mode, uid, gid, links, time, size, device it is on, device it is, name's length, check sum
        fields = (self._count, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(name), 0)
        self._content += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self._pad()
        self._content += content
        self._pad()

    def _pad(self) -> None:
        self._content += bytes(-len(self._content) % 4)
