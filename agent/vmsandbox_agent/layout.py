"""Where the agent keeps things: all of it below one directory, which is a tmpfs in the guest."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from vmsandbox_agent.errors import InvalidArgumentError

GUEST_BASE = Path("/run/vmsandbox")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")


class Layout(NamedTuple):
    """The directories below `base`."""

    base: Path

    @property
    def etc(self) -> Path:
        """What the image's /etc/hostname, hosts, resolv.conf and machine-id point to."""
        return self.base / "etc"

    @property
    def files(self) -> Path:
        return self.base / "files"

    @property
    def bundles(self) -> Path:
        return self.base / "containers"

    @property
    def crun(self) -> Path:
        return self.base / "crun"

    def bundle(self, container_id: str) -> Path:
        return self.bundles / container_id

    def make(self) -> None:
        for directory in (self.base, self.etc, self.files, self.bundles, self.crun):
            directory.mkdir(parents=True, exist_ok=True, mode=0o755)


def checked_id(text: str, what: str) -> str:
    """An id that is safe as a file name; raises InvalidArgumentError."""
    if not _ID.fullmatch(text):
        raise InvalidArgumentError(f"{what} id '{text[:130]}' is not made of letters, digits and '_.+-'")
    return text


def put(path: Path, text: str) -> None:
    """Write a file anew.  Python's own files take an emulated guest several times as long to open."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        data = memoryview(text.encode())
        while len(data):
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)
