"""Reads a tar archive from a stream that cannot seek, at bounded memory, from somebody who may be hostile.

`tarfile` decodes the 512-byte header blocks.  What follows some of them (pax records, GNU long names, sparse maps) is
read here, because `tarfile` reads those of any size into memory and recurses for each of them.  Global pax headers
are skipped, as every container engine does.

Paths and link targets are as `os.fsdecode` gives them, exactly as the archive spells them: judging them is
the caller's.
"""

from __future__ import annotations

import os
import re
import sys
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vmsandbox.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 512
#: Bytes of file data handed out at once.
CHUNK = 1 << 18
#: The most bytes of pax records, of a long name or of a sparse map that one entry may have.
EXTENSION_MAX = 1 << 20
#: The most extension headers in front of one entry.
EXTENSIONS_MAX = 64
XATTR_PREFIX = "SCHILY.xattr."

_ENCODING = sys.getfilesystemencoding()
_PAX_LENGTH = re.compile(rb"([0-9]{1,8}) ")
_DECIMAL = re.compile(rb"(-?)([0-9]{1,18})(?:\.([0-9]*))?\Z")
_POSIX_MAGIC = b"ustar\0"
_GNU_LONG_NAME, _GNU_LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)
#: These have no data, whatever their size field says.
_HEADER_ONLY = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)


class Stream(Protocol):
    """Gives up to `size` bytes at a time, and none at its end."""

    def read(self, size: int, /) -> bytes: ...


class TarError(InvalidArgumentError):
    """The archive is malformed; `entry` is the name of the entry, as far as it is known."""

    def __init__(self, message: str, *, entry: str = "") -> None:
        super().__init__(message)
        self.entry = entry


@dataclass
class Entry:
    """One member of an archive.

    `kind` is tar's type flag with every sort of regular file as `tarfile.REGTYPE`; `size` is that of the file when it
    is unpacked, `segments` are the (offset, length) pairs of a sparse file's data, None if it is not sparse.
    """

    name: str
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    segments: list[tuple[int, int]] | None = None


class TarReader:
    """Iterates over the entries of `stream`; `data` reads the content of the entry at hand.

    `skip` passes over that many bytes without reading them and says whether there were so many; without it, what is
    passed over is read.
    """

    def __init__(self, stream: Stream, *, skip: Callable[[int], bool] | None = None) -> None:
        self._stream = stream
        self._pass_over = self._read_over if skip is None else skip
        #: bytes of the entry's data that were not read yet, without and with padding
        self._left = 0
        self._padding = 0
        self._count = 0

    def __iter__(self) -> Iterator[Entry]:
        while True:
            self._skip(self._left)
            if self._padding and not self._pass_over(self._padding):
                return  # some writers leave out the padding at the end
            self._left = self._padding = 0
            entry = self._next()
            if entry is None:
                return
            self._count += 1
            yield entry

    def data(self, entry: Entry) -> Iterator[tuple[int, bytes]]:
        """Yield (offset in the file, bytes) of the entry that iteration gave last."""
        segments = [(0, entry.size)] if entry.segments is None else entry.segments
        for offset, length in segments:
            done = 0
            while done < length:
                chunk = self._stream.read(min(CHUNK, length - done))
                if not chunk:
                    raise TarError(f"the archive ends within '{entry.name}'", entry=entry.name)
                self._left -= len(chunk)
                yield offset + done, chunk
                done += len(chunk)

    def _next(self) -> Entry | None:
        """Read headers up to and including the next entry's own."""
        pax: dict[str, bytes] = {}
        sparse_pairs: list[tuple[int, int]] = []
        name: bytes | None = None
        link: bytes | None = None
        for _ in range(EXTENSIONS_MAX):
            block = self._header_block()
            if block is None:
                if pax or name or link:
                    raise TarError(f"the archive ends within the headers of entry {self._count + 1}")
                return None
            info = self._decode(block)
            if info.type in _PAX:
                pax, sparse_pairs = _pax_records(self._extension(info))
            elif info.type == tarfile.XGLTYPE:
                self._extension(info)
            elif info.type == _GNU_LONG_NAME:
                name = self._extension(info).partition(b"\0")[0]
            elif info.type == _GNU_LONG_LINK:
                link = self._extension(info).partition(b"\0")[0]
            elif info.type == b"V":  # a volume's label
                self._skip(_padded(max(info.size, 0)))
            else:
                return self._entry(block, info, pax, sparse_pairs, name, link)
        raise TarError(f"entry {self._count + 1} has more than {EXTENSIONS_MAX} extension headers")

    def _header_block(self) -> bytes | None:
        block = self._read_up_to(BLOCK)
        if not block:
            return None
        if len(block) < BLOCK:
            raise TarError(f"the archive ends within the header of entry {self._count + 1}")
        if block.count(0) < BLOCK:
            return block
        following = self._read_up_to(BLOCK)
        if following.count(0) < len(following):
            raise TarError(f"there is data after the end mark that follows entry {self._count}")
        return None

    def _decode(self, block: bytes) -> tarfile.TarInfo:
        try:
            info = tarfile.TarInfo.frombuf(block, _ENCODING, "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise TarError(f"the header of entry {self._count + 1} is malformed: {error}") from error
        if info.size < 0:
            raise TarError(f"'{info.name}' has a negative size", entry=info.name)
        return info

    def _extension(self, info: tarfile.TarInfo) -> bytes:
        if info.size > EXTENSION_MAX:
            raise TarError(f"entry {self._count + 1} has {info.size} bytes of extended header: at most {EXTENSION_MAX}")
        data = self._read_up_to(_padded(info.size))
        if len(data) < info.size:
            raise TarError(f"the archive ends within the headers of entry {self._count + 1}")
        return data[: info.size]

    def _entry(
        self,
        block: bytes,
        info: tarfile.TarInfo,
        pax: dict[str, bytes],
        sparse_pairs: list[tuple[int, int]],
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> Entry:
        name = info.name if long_name is None else os.fsdecode(long_name)
        if long_name is None and block[257:263] != _POSIX_MAGIC:
            # GNU's own format keeps times where the posix one continues the name.
            name = os.fsdecode(block[:100].partition(b"\0")[0])
        name = os.fsdecode(pax["path"]) if "path" in pax else name
        name = os.fsdecode(pax["GNU.sparse.name"]) if "GNU.sparse.name" in pax else name
        link = info.linkname if long_link is None else os.fsdecode(long_link)
        link = os.fsdecode(pax["linkpath"]) if "linkpath" in pax else link
        kind = tarfile.REGTYPE if info.type in _REGULAR else info.type
        if kind == tarfile.REGTYPE and info.type == tarfile.AREGTYPE and name.endswith("/"):
            kind = tarfile.DIRTYPE

        def number(key: str, default: int) -> int:
            return _seconds_ns(name, key, pax[key]) // 1_000_000_000 if key in pax else default

        stored = number("size", info.size)
        if stored < 0:
            raise TarError(f"'{name}' has a negative size", entry=name)
        if kind in _HEADER_ONLY:
            stored = 0
        self._left = stored
        self._padding = _padded(stored) - stored
        entry = Entry(
            name=name,
            kind=kind,
            mode=info.mode & 0o7777,
            uid=number("uid", info.uid),
            gid=number("gid", info.gid),
            size=stored,
            mtime_ns=_seconds_ns(name, "mtime", pax["mtime"]) if "mtime" in pax else int(info.mtime) * 1_000_000_000,
            link=link,
            device=(info.devmajor, info.devminor),
            xattrs={k.removeprefix(XATTR_PREFIX): v for k, v in pax.items() if k.startswith(XATTR_PREFIX)},
        )
        if kind == tarfile.REGTYPE:
            self._apply_sparse(entry, block, info, pax, sparse_pairs)
        return entry

    def _apply_sparse(
        self,
        entry: Entry,
        block: bytes,
        info: tarfile.TarInfo,
        pax: dict[str, bytes],
        pairs: list[tuple[int, int]],
    ) -> None:
        """Find out the real size and the segments of a sparse file, in any of the four ways of writing them."""

        def number(key: str) -> int:
            return _natural(entry.name, key, pax[key])

        if info.type == tarfile.GNUTYPE_SPARSE:
            segments, size = self._old_gnu_map(entry.name, block)
        elif pax.get("GNU.sparse.major") == b"1" and pax.get("GNU.sparse.minor", b"0") == b"0":
            size = number("GNU.sparse.realsize")
            segments = self._map_in_data(entry.name)
        elif "GNU.sparse.map" in pax:
            size = number("GNU.sparse.size")
            parts = pax["GNU.sparse.map"].split(b",") if pax["GNU.sparse.map"] else []
            numbers = [_natural(entry.name, "sparse map", part) for part in parts]
            if len(numbers) % 2:
                raise TarError(f"'{entry.name}' has a malformed sparse map", entry=entry.name)
            segments = list(zip(numbers[::2], numbers[1::2], strict=True))
        elif "GNU.sparse.size" in pax:
            size = number("GNU.sparse.size")
            segments = pairs
        elif "GNU.sparse.major" in pax:
            raise TarError(f"'{entry.name}' is sparse in a way that is not known", entry=entry.name)
        else:
            return
        end = 0
        for offset, length in segments:
            if offset < end or length < 0:
                raise TarError(f"'{entry.name}' has a malformed sparse map", entry=entry.name)
            end = offset + length
        if end > size or sum(length for _, length in segments) != self._left:
            raise TarError(f"'{entry.name}' has a sparse map that does not fit its size", entry=entry.name)
        entry.size = size
        entry.segments = [(offset, length) for offset, length in segments if length]

    def _old_gnu_map(self, name: str, block: bytes) -> tuple[list[tuple[int, int]], int]:
        segments: list[tuple[int, int]] = []
        position, count = 386, 4
        size = _field(name, block[483:495])
        extended = block[482]
        read = 0
        while True:
            for _ in range(count):
                pair = block[position : position + 24]
                if pair[12:13] in (b"\0", b""):
                    break
                segments.append((_field(name, pair[:12]), _field(name, pair[12:])))
                position += 24
            if not extended:
                return segments, size
            block = self._read_up_to(BLOCK)
            read += BLOCK
            if len(block) < BLOCK or read > EXTENSION_MAX:
                raise TarError(f"'{name}' has a sparse map that is cut or too long", entry=name)
            position, count, extended = 0, 21, block[504]

    def _map_in_data(self, name: str) -> list[tuple[int, int]]:
        """The map is decimal lines at the start of the data, padded to a block: a count, then that many pairs."""
        numbers: list[int] = []
        rest = b""
        read = 0
        while not numbers or len(numbers) < 1 + 2 * numbers[0]:
            block = self._read_up_to(BLOCK)
            read += BLOCK
            if len(block) < BLOCK or read > min(EXTENSION_MAX, self._left):
                raise TarError(f"'{name}' has a sparse map that is cut or too long", entry=name)
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                if numbers and len(numbers) == 1 + 2 * numbers[0]:
                    break
                numbers.append(_natural(name, "sparse map", line))
        self._left -= read
        return list(zip(numbers[1::2], numbers[2::2], strict=True))

    def _read_up_to(self, size: int) -> bytes:
        """Read `size` bytes, fewer only at the end of the stream."""
        data = self._stream.read(size)
        if len(data) == size or not data:
            return data
        parts = [data]
        missing = size - len(data)
        while missing:
            data = self._stream.read(missing)
            if not data:
                break
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def _skip(self, size: int) -> None:
        if size and not self._pass_over(size):
            raise TarError(f"the archive ends within entry {self._count}")

    def _read_over(self, size: int) -> bool:
        while size:
            data = self._stream.read(min(size, CHUNK))
            if not data:
                return False
            size -= len(data)
        return True


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _pax_records(data: bytes) -> tuple[dict[str, bytes], list[tuple[int, int]]]:
    """Decode pax records; also the repeated offset and numbytes records of GNU's sparse format 0.0."""
    records: dict[str, bytes] = {}
    offsets: list[int] = []
    pairs: list[tuple[int, int]] = []
    position = 0
    while position < len(data) and data[position]:
        match = _PAX_LENGTH.match(data, position)
        length = int(match[1]) if match else 0
        record = data[match.end() : position + length] if match else b""
        key, equals, value = record.partition(b"=")
        if not key or not equals or not value.endswith(b"\n") or position + length > len(data):
            raise TarError("a pax record is malformed")
        value = value[:-1]
        name = os.fsdecode(key)
        if name == "GNU.sparse.offset":
            offsets.append(_natural("", name, value))
        elif name == "GNU.sparse.numbytes":
            if len(offsets) != len(pairs) + 1:
                raise TarError("a sparse map is malformed")
            pairs.append((offsets[-1], _natural("", name, value)))
        elif value or name.startswith(XATTR_PREFIX):
            if b"\0" in value and not name.startswith(XATTR_PREFIX):
                raise TarError(f"pax record '{name}' contains a zero byte")
            records[name] = value
        else:
            records.pop(name, None)  # an empty value takes back an earlier one
        position += length
    return records, pairs


def _natural(entry: str, what: str, value: bytes) -> int:
    if not value.isdigit() or len(value) > 18:
        raise TarError(f"'{entry}' has a malformed {what}", entry=entry)
    return int(value)


def _field(entry: str, value: bytes) -> int:
    """A number field of a header: octal, or base 256 when its first bit is set."""
    try:
        if value[0] & 0x80:
            number = int.from_bytes(value, "big") - (0x80 << 8 * (len(value) - 1))
        else:
            number = int(value.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise TarError(f"'{entry}' has a malformed sparse map", entry=entry) from error
    if number >= 1 << 62:
        raise TarError(f"'{entry}' has a malformed sparse map", entry=entry)
    return number


def _seconds_ns(entry: str, key: str, value: bytes) -> int:
    """Decimal seconds with any number of decimals, as nanoseconds; cut, not rounded."""
    match = _DECIMAL.match(value)
    if match is None:
        raise TarError(f"'{entry}' has a malformed {key}", entry=entry)
    ns = int(match[2]) * 1_000_000_000 + int(((match[3] or b"") + b"0" * 9)[:9])
    return -ns if match[1] else ns
