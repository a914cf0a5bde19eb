"""A container's writable layer: a sparse file with an ext4 file system of the size the layer may grow to.

A file system of each size is made once and kept in a cache; a layer is a copy of its metadata, some 50 KiB, which takes
less than a millisecond.  The options are chosen for that and for emulated guests: metadata lies together, is known to
be zero where it is not written (so that no kernel thread writes it later), has no checksums that cost CPU, and
keeps a small journal, which costs nothing here and makes the layer survive a virtual machine that was killed.

The content is the guest's: it must never be mounted on the host.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmsandbox.errors import ExhaustedError, InvalidArgumentError, SandboxError, UnsupportedError
from vmsandbox_hypervisor import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
#: Below this, little is left beside the journal.
SIZE_MIN_MIB = 16
#: The most that ext4 with 32-bit block numbers holds.
SIZE_MAX_MIB = 16 * MIB - 1
#: Part of the cached files' names; to be changed with `_FEATURES` or `_argv`.
_FORMAT = 1
_FEATURES = (
    "none,has_journal,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super2,large_file,huge_file,uninit_bg,"
    "dir_nlink,extra_isize"
)
_MAGIC_OFFSET = 1080
_MAGIC = b"\x53\xef"


def create(path: Path, size_mib: int, cache: Path) -> None:
    """Make the new file `path`, an empty ext4 of `size_mib`.  Blocks; the first time of a size for 10 to 100 ms.

    `cache` is a directory for formatted files; it is made if missing.  Raises `InvalidArgumentError` for a size that
    cannot be, `ExhaustedError` on a full disk, `UnsupportedError` without mkfs.ext4; then `path` does not exist.
    """
    if not SIZE_MIN_MIB <= size_mib <= SIZE_MAX_MIB:
        raise InvalidArgumentError(
            f"a writable layer of {_shown(size_mib)} is not possible: "
            f"choose {_shown(SIZE_MIN_MIB)} to {_shown(SIZE_MAX_MIB)} ('--scratch-size')"
        )
    with _failing_as(path):
        copy(_golden(size_mib, cache), path)


def _shown(size_mib: int) -> str:
    """A size in the units that users write."""
    for unit, mib in (("t", 1024 * 1024), ("g", 1024)):
        if size_mib and size_mib % mib == 0:
            return f"{size_mib // mib}{unit}"
    return f"{size_mib}m"


def copy(source: Path, path: Path) -> None:
    """Make the new file `path`, what is not a hole of `source`.  Fails as `create`."""
    with _failing_as(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(source, "rb") as file:
                sparse.copy(file.fileno(), descriptor)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a writable layer; one that does not exist is no error."""
    path.unlink(missing_ok=True)


def _golden(size_mib: int, cache: Path) -> Path:
    """The formatted file of this size, made now if the cache has none that is whole."""
    golden = cache / f"ext4-{_FORMAT}-{size_mib}m"
    if _whole(golden, size_mib):
        return golden
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(cache / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _whole(golden, size_mib):
            # One name for whoever holds the lock: what a killed process left is overwritten.
            draft = cache / "draft"
            try:
                _format(draft, size_mib)
                os.rename(draft, golden)
            finally:
                draft.unlink(missing_ok=True)
    finally:
        os.close(lock)
    return golden


def _whole(golden: Path, size_mib: int) -> bool:
    try:
        with open(golden, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size == size_mib * MIB and os.pread(file.fileno(), 2, _MAGIC_OFFSET) == _MAGIC
    except FileNotFoundError:
        return False


def _format(path: Path, size_mib: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size_mib * MIB)
    # The machine's own configuration of mkfs is kept out.
    environment = {**os.environ, "MKE2FS_CONFIG": os.devnull, "LC_ALL": "C"}
    environment["PATH"] = f"{environment.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    try:
        result = subprocess.run(
            _argv(path, size_mib), stdin=subprocess.DEVNULL, capture_output=True, env=environment, check=False
        )
    except FileNotFoundError as error:
        raise UnsupportedError(
            "cannot make a writable layer: mkfs.ext4 is missing: 'apt-get install e2fsprogs'"
        ) from error
    if result.returncode != 0:
        said = result.stderr.decode(errors="replace").strip()
        if os.strerror(errno.ENOSPC) in said:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        last = said.splitlines()[-1] if said else f"it ended with status {result.returncode}"
        raise SandboxError(f"cannot make a writable layer: mkfs.ext4: {last}", detail=said)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _argv(path: Path, size_mib: int) -> list[str]:
    journal_mib = 16 if size_mib >= 256 else 4
    return [
        "mkfs.ext4", "-q", "-F",
        "-b", "4096",
        "-I", "256",
        "-i", "16384",
        "-m", "0",
        "-J", f"size={journal_mib}",
        "-O", _FEATURES,
        "-E", "nodiscard,assume_storage_prezeroed=1,packed_meta_blocks=1,num_backup_sb=0,root_owner=0:0",
        os.fspath(path),
    ]  # fmt: skip


@contextmanager
def _failing_as(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExhaustedError(
                f"cannot make writable layer '{path}': no space left on device: free some or move the data root"
            ) from error
        where = f": '{error.filename}'" if error.filename is not None else ""
        raise SandboxError(f"cannot make writable layer '{path}': {error.strerror or error}{where}") from error
