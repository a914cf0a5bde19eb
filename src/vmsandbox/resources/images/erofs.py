"""Makes one erofs file of a directory tree, the same bytes for the same tree.

Uncompressed: the guest reads it through a block device from the host's page cache, where decompression would cost
more than it saves.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from typing import TYPE_CHECKING

from vmsandbox.errors import SandboxError, UnsupportedError
from vmsandbox.resources.images.store import storage_error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: The identity of every file system made here: what tells them apart is their content.
UUID = "6d766d73-616e-4462-6f78-65726f667331"
#: Goes into the super block; later modification times (from the year 2242 on) are cut to it.
_EPOCH = str(1 << 33)
_NO_SPACE = "No space left on device"
CHUNK = 1 << 20


def build(tree: Path, image: Path, *, pass_fds: Sequence[int] = ()) -> str:
    """Write the tree into the new file `image`, synced; returns the sha256 of the file in hex.

    The builder inherits `pass_fds`, so that locks among them last as long as it writes.  Raises `ExhaustedError` on a
    full disk, `UnsupportedError` without mkfs.erofs or setpriv.
    """
    argv = [
        "setpriv", "--pdeathsig", "KILL", "--",
        "mkfs.erofs", "--quiet", "-U", UUID, os.fspath(image), os.fspath(tree),
    ]  # fmt: skip
    # Given by option, the time would replace every file's; given this way, it only limits them.
    environment = {**os.environ, "SOURCE_DATE_EPOCH": _EPOCH, "LC_ALL": "C"}
    try:
        result = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, env=environment, pass_fds=pass_fds, check=False
        )
    except FileNotFoundError as error:
        raise UnsupportedError("cannot make a file system: setpriv is missing: 'apt-get install util-linux'") from error
    if result.returncode == 127:
        raise UnsupportedError("cannot make a file system: mkfs.erofs is missing: 'apt-get install erofs-utils'")
    if result.returncode != 0:
        said = (result.stderr + result.stdout).decode(errors="replace").strip()
        if _NO_SPACE in said:
            raise storage_error(OSError(errno.ENOSPC, _NO_SPACE), "write file system", image.parent)
        last = said.splitlines()[-1].strip() if said else f"it ended with status {result.returncode}"
        raise SandboxError(f"cannot make a file system of '{tree}': mkfs.erofs: {last}", detail=said)
    return _synced_digest(image)


def _synced_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        os.fsync(file.fileno())
    return digest.hexdigest()
