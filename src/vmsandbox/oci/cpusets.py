"""Lists of processors and memory nodes as the kernel writes them: ``0-2,4``."""

from __future__ import annotations

from vmsandbox.errors import InvalidBundleError

#: the highest number that Linux can be built for
MOST = 8192


def parse(text: str, *, name: str, of: str = "processors") -> frozenset[int]:
    """The numbers in a list, none for an empty one; InvalidBundleError says of what `name` it is."""
    found: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        low, high = _number(first), _number(last if dash else first)
        if low is None or high is None or low > high:
            raise InvalidBundleError(f"'{name}' is '{text[:64]}', which is no list of {of}: write '0-2,4'")
        found.update(range(low, high + 1))
    return frozenset(found)


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 5 and int(text) < MOST else None
