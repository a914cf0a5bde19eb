"""Files with holes: memory of machines, of which most is untouched."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_AT_ONCE = 64 * 1024 * 1024


def copy(source: int, target: int, *, without: Sequence[tuple[int, int]] = ()) -> None:
    """Make one file as another is, holes included; neither descriptor's position matters or changes in the source.

    The pieces `without` which it is copied, in order, become holes too.
    """
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in _less(extents(source, size), without):
        os.lseek(target, start, os.SEEK_SET)
        position = start
        while position < end:
            copied = os.sendfile(target, source, position, min(end - position, _AT_ONCE))
            if copied == 0:
                raise OSError(errno.EIO, "memory that is copied ended early")
            position += copied


def _less(pieces: Iterator[tuple[int, int]], without: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in pieces:
        for begin, stop in without:
            if start < begin < end:
                yield start, begin
            if begin < end and stop > start:
                start = max(start, stop)
        if start < end:
            yield start, end


def extents(source: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file holds something: begin and end of each piece."""
    position = 0
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        position = min(size, os.lseek(source, start, os.SEEK_HOLE))
        yield start, position
