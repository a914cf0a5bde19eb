"""Streams between a blob on disk and the tar reader: sections of files, digests, limits, decompression.

Every stream is read forwards, at bounded memory, whatever its content claims.
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import subprocess
import zlib
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from vmsandbox.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmsandbox.resources.images.tarstream import Stream

CHUNK = 1 << 18
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
#: Formats that no image may use, but some do.
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class StreamError(InvalidArgumentError):
    """The data is cut, is not what it claims to be, or is larger than allowed."""


class Section:
    """`size` bytes of an open file from `offset` on.  The descriptor stays the caller's."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self.descriptor = descriptor
        self.offset = offset
        self.size = size
        self._position = 0

    def read(self, size: int, /) -> bytes:
        wanted = min(size, self.size - self._position)
        if wanted <= 0:
            return b""
        data = os.pread(self.descriptor, wanted, self.offset + self._position)
        if not data:
            raise StreamError(f"the file ends {self.size - self._position} bytes early")
        self._position += len(data)
        return data

    def rewound(self) -> Section:
        """The same section from its start."""
        return Section(self.descriptor, self.offset, self.size)

    def sha256(self) -> str:
        """Digest of the whole section, as ``sha256:...``."""
        digest = hashlib.sha256()
        whole = self.rewound()
        while data := whole.read(CHUNK):
            digest.update(data)
        return f"sha256:{digest.hexdigest()}"


class Measured:
    """Counts and digests what passes; refuses to pass on more than `budget` has left."""

    def __init__(self, stream: Stream, budget: Budget) -> None:
        self._stream = stream
        self._budget = budget
        self._digest = hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._budget.spend(len(data))
        self._digest.update(data)
        return data

    def finish(self) -> str:
        """Read to the end; the digest of everything, as ``sha256:...``."""
        while self.read(CHUNK):
            pass
        return f"sha256:{self._digest.hexdigest()}"


class Budget:
    """How many bytes may still be unpacked, over all layers of an image."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._spent = 0

    def spend(self, size: int) -> None:
        self._spent += size
        if self._spent > self.limit:
            raise StreamError(f"the image unpacks to more than {self.limit} bytes: allow more with '--max-size'")


class Buffered:
    """Small reads from a stream that is better read in large pieces."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = b""
        self._position = 0

    def read(self, size: int, /) -> bytes:
        if self._position == len(self._buffer):
            self._buffer = self._stream.read(CHUNK)
            self._position = 0
        data = self._buffer[self._position : self._position + size]
        self._position += len(data)
        return data


class _Gunzip:
    """Members one after the other, as gzip and its seekable variants write them; zeros may follow the last."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._member = zlib.decompressobj(wbits=31)
        self._input = b""
        self._ended = False

    def read(self, size: int, /) -> bytes:
        while not self._ended:
            if self._member.eof:
                self._next_member()
                continue
            if not self._input:
                self._input = self._stream.read(CHUNK)
            ending = not self._input
            try:
                data = self._member.decompress(self._input, size)
            except zlib.error as error:
                raise StreamError(f"the gzip data is damaged: {error}") from error
            self._input = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if data:
                return data
            if ending and not self._member.eof:
                raise StreamError("the gzip data is cut")
        return b""

    def _next_member(self) -> None:
        while True:
            rest = self._input.lstrip(b"\0")
            if len(rest) >= len(_GZIP):
                break
            more = self._stream.read(CHUNK)
            if not more:
                break
            self._input = rest + more
        self._input = rest
        if not rest:
            self._ended = True
        elif rest.startswith(_GZIP):
            self._member = zlib.decompressobj(wbits=31)
        else:
            raise StreamError("something that is not gzip follows the gzip data")


class _Unzstd:
    """Passes data through the zstd program, feeding it only while it is waited for."""

    def __init__(self, stream: Stream, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stream = stream
        self._process = process
        self._in = process.stdin.fileno()
        self._out = process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._pending = b""
        self._ready = select.poll()
        self._ready.register(self._in, select.POLLOUT)
        self._ready.register(self._out, select.POLLIN)

    def read(self, size: int, /) -> bytes:
        while True:
            ready = [descriptor for descriptor, _ in self._ready.poll()]
            if self._out in ready:
                data = os.read(self._out, size)
                if not data:
                    self._conclude()
                return data
            self._feed()

    def _feed(self) -> None:
        if not self._pending:
            self._pending = self._stream.read(CHUNK)
        try:
            if self._pending:
                written = os.write(self._in, self._pending)
                self._pending = self._pending[written:]
                return
        except BlockingIOError:
            return
        except BrokenPipeError:
            pass  # it has an opinion, which it will tell at its end
        self._ready.unregister(self._in)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _conclude(self) -> None:
        assert self._process.stderr is not None
        complaint = self._process.stderr.read(2000).decode(errors="replace").strip()
        if self._process.wait() != 0:
            reason = complaint.rpartition(" : ")[2].strip() or "for no reason given"
            raise StreamError(f"zstd cannot decompress the data: {reason}")


@contextmanager
def decompressed(section: Section) -> Iterator[Stream]:
    """The content of a blob that may be compressed with gzip or zstd, told by its first bytes.

    Raises `UnsupportedError` for other compressions and when the zstd program is missing; reading raises `StreamError`.
    """
    start = os.pread(section.descriptor, min(6, section.size), section.offset)
    for magic, name in _OTHERS.items():
        if start.startswith(magic):
            raise UnsupportedError(f"it is compressed with {name}: only gzip and zstd are supported")
    if start.startswith(_GZIP):
        yield _Gunzip(section.rewound())
    elif start.startswith(_ZSTD) or (start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50):
        # the second is a frame to be skipped, which some writers put first
        with _zstd(section.rewound()) as stream:
            yield stream
    else:
        yield section.rewound()


def is_compressed(section: Section) -> bool:
    """Whether the section starts as gzip or zstd data does."""
    start = os.pread(section.descriptor, min(4, section.size), section.offset)
    return start.startswith((_GZIP, _ZSTD))


@contextmanager
def _zstd(stream: Stream) -> Iterator[Stream]:
    try:
        process = subprocess.Popen(
            ["zstd", "--decompress", "--stdout", "--quiet", "--no-progress"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        raise UnsupportedError(
            "it is compressed with zstd and the zstd program is missing: install it with 'apt-get install zstd'"
        ) from error
    try:
        yield _Unzstd(stream, process)
    finally:
        process.kill()
        with suppress(BrokenPipeError):
            process.__exit__(None, None, None)
