"""A validated configuration, kept so that the next process need not validate it again.

Importing pydantic and building its schema costs more than everything else a supervisor does before it spawns QEMU.
Each distinct input has a file of its own, named by the hash of that input.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from vmsandbox import cache
from vmsandbox.config.model import SECTIONS, Settings

if TYPE_CHECKING:
    from pathlib import Path

KIND = "config"


def read(directory: Path, key: str) -> Settings | None:
    """The settings stored under `key`, or None if there are none that can be trusted."""
    data = cache.read(directory, KIND, key)
    if data is None:
        return None
    try:
        document = json.loads(data)
        if document["key"] != key:
            return None
        values = document["settings"]
        return Settings(**{name: cls(**values[name]) for name, cls in SECTIONS.items()})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def write(directory: Path, key: str, settings: Settings) -> None:
    """Store `settings` if the run root exists and can be written; otherwise do nothing."""
    cache.write(directory, KIND, key, json.dumps({"key": key, "settings": asdict(settings)}).encode())
