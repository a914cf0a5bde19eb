"""Huge pages for containers that may have some: the kernel makes them when they are asked for.

None are reserved at boot, where they would cost every pod memory.  A limit says how many a container may come to use,
and so many more the kernel is allowed to make out of free memory.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmsandbox_agent.errors import UnsupportedError

SYS = Path("/sys/kernel/mm/hugepages")
_UNITS = {"K": 1, "M": 1 << 10, "G": 1 << 20}
#: more than any guest has
_MOST = 1 << 30


def allow(resources: dict[str, Any], *, sys: Path = SYS) -> None:
    """Let the kernel make the pages that `hugepageLimits` speak of; UnsupportedError for sizes it does not have."""
    for entry in resources.get("hugepageLimits") or []:
        found = re.fullmatch(r"([1-9][0-9]{0,9})([KMG])B", str(entry.get("pageSize")))
        if not found:
            continue
        size_kib = int(found[1]) * _UNITS[found[2]]
        pages = min(int(entry.get("limit") or 0) // 1024 // size_kib, _MOST)
        path = sys / f"hugepages-{size_kib}kB/nr_overcommit_hugepages"
        if not path.exists():
            sizes = ", ".join(sorted(map(_shown, sys.glob("hugepages-*kB")))) or "none"
            raise UnsupportedError(
                f"'linux.resources.hugepageLimits' names pages of '{entry['pageSize']}': the guest's kernel has {sizes}"
            )
        with suppress(OSError, ValueError):
            allowed = int(path.read_text())
            path.write_text(str(allowed + pages))


def _shown(directory: Path) -> str:
    """A size as specs write it, of the name of its directory."""
    kib = int(directory.name.removeprefix("hugepages-").removesuffix("kB"))
    unit = next(unit for unit in ("G", "M", "K") if kib % _UNITS[unit] == 0)
    return f"{kib // _UNITS[unit]}{unit}B"
