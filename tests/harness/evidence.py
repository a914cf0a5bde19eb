"""What is left to look at when a test has failed: logs of supervisors, QEMU's stderr, consoles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NAMES = frozenset({"supervisor.log", "qemu.stderr", "console.log"})
#: letters of each that are shown
MOST = 8000


def kept(used: Iterable[object]) -> Iterator[tuple[str, str]]:
    """Path and end of each such file below the run roots of what a test has used."""
    for root in sorted({root for each in used for root in _roots(each)}):
        for path in sorted(root.rglob("*")):
            if path.name in NAMES and path.is_file():
                yield str(path), path.read_text(errors="replace")[-MOST:]


def _roots(used: object) -> Iterator[Path]:
    """Of a command, or of what has one."""
    for each in used if isinstance(used, tuple) else (used,):
        for name in ("run_root", "root"):
            root = getattr(each, name, None)
            if isinstance(root, Path):
                yield root
        for name in ("cli", "runtime"):
            if (inner := getattr(each, name, None)) is not None:
                yield from _roots(inner)
