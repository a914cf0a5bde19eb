"""Bytes of a stream between two offsets, in memory that is used again and again.

Under emulation fresh memory costs more than the copying: each of its pages is a fault.
"""

from __future__ import annotations

#: what the memory of a stream that carries little takes, in bytes
SMALL = 16 * 1024


class Ring:
    """What was appended and not yet released; grows as it is needed, at most to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._memory = memoryview(b"")
        #: offset of the first byte that is kept
        self.base = 0
        #: offset behind the last
        self.end = 0

    def __len__(self) -> int:
        return self.end - self.base

    def room(self, least: int, most: int) -> list[memoryview]:
        """Where more can be put, in one or two places; `appended` says how many bytes were.

        It grows until there is room for `least`; more than `most` is not given.
        """
        while len(self._memory) - len(self) < least and len(self._memory) < self._limit:
            self._grow()
        return self._places(self.end, min(most, len(self._memory) - len(self)))

    def appended(self, count: int) -> None:
        self.end += count

    def views(self, offset: int, count: int) -> list[memoryview]:
        """Up to `count` bytes from `offset` on, valid until they are released."""
        return self._places(offset, min(count, self.end - offset))

    def release(self, offset: int) -> None:
        """Let go of what is below `offset`."""
        self.base = max(self.base, min(offset, self.end))

    def clear(self) -> None:
        """Let go of everything, and of the memory."""
        self.base = self.end
        self._memory = memoryview(b"")

    def _places(self, offset: int, count: int) -> list[memoryview]:
        if count <= 0:
            return []
        start = offset % len(self._memory)
        first = self._memory[start : start + count]
        rest = count - len(first)
        return [first, self._memory[:rest]] if rest else [first]

    def _grow(self) -> None:
        grown = memoryview(bytearray(min(self._limit, max(SMALL, 4 * len(self._memory)))))
        at = self.base
        for view in self.views(self.base, len(self)):
            start = at % len(grown)
            fits = min(len(view), len(grown) - start)
            grown[start : start + fits] = view[:fits]
            grown[: len(view) - fits] = view[fits:]
            at += len(view)
        self._memory = grown
