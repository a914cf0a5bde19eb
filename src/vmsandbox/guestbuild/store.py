"""Where built guests are kept, and which one is in use.

Below `Roots.guests`::

    <key>/manifest.json, vmlinux, root.erofs, ...   one complete guest
    current-<flavour> -> <key>                      the one that new pods boot
    parts/<kind>-<key>/                             intermediate results that several guests share
    cache/                                          downloads, verified again whenever they are used
    lock                                            held by whoever builds or removes
    .staging-*                                      being built, or left by a build that was killed

A name that does not begin with a dot exists only once everything in it is on disk: results are made in a
staging directory, synced, and renamed.  Staging directories are therefore never trusted, and are removed by the
next one to take the lock.  The key is the hash of everything that went in, so what exists need not be built again.

Stdlib only and cheap to import: the supervisor asks `current` before every boot.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox import locks
from vmsandbox.errors import AmbiguousError, InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vmsandbox.paths import Roots

FLAVOURS = ("packaged", "tuned")
MANIFEST = "manifest.json"
#: changes when a manifest of another shape must not be read
FORMAT = 1
KEY_DIGITS = 32
_STAGING = ".staging-"


@dataclass(frozen=True)
class Guest:
    """What is needed to boot one guest.

    `cmdline` is complete: nothing in it depends on the machine.
    """

    key: str
    kernel: Path
    initrd: Path | None
    image: Path
    cmdline: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One guest in the store: what it is (`manifest`), where, and for which flavours it is current."""

    directory: Path
    manifest: Mapping[str, Any]
    current_for: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.directory.name


def key_of(inputs: Mapping[str, Any]) -> str:
    """The content address of a result: a hash of everything that went into it."""
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()[:KEY_DIGITS]


def current(roots: Roots, flavour: str = "packaged") -> Guest:
    """The guest that new pods of this kernel flavour boot.

    Raises `NotFoundError`, which says what to run, when none has been built or its files are not all there.
    """
    try:
        key = os.readlink(_pointer(roots, flavour))
    except FileNotFoundError:
        raise NotFoundError(f"no guest with the '{flavour}' kernel has been built: {_advice(flavour)}") from None
    return _guest(roots.guests / os.path.basename(key), advice=_advice(flavour))


def load(roots: Roots, key: str) -> Guest:
    """The guest with this key, or the only one whose key begins with it."""
    return _guest(find(roots, key), advice="run 'vmsandbox guest build --force'")


def find(roots: Roots, key: str) -> Path:
    """The directory of the guest whose key is, or uniquely begins with, `key`."""
    fits = [directory for directory in _directories(roots) if key and directory.name.startswith(key)]
    if not fits:
        raise NotFoundError(f"no guest '{key}': 'vmsandbox guest ls' shows what there is")
    if len(fits) > 1:
        names = ", ".join(f"'{directory.name}'" for directory in fits)
        raise AmbiguousError(f"guest '{key}' is ambiguous: it fits {names}; give more of it")
    return fits[0]


def entries(roots: Roots) -> list[Entry]:
    """Every readable guest, the most recently built first."""
    pointers = {flavour: _pointed(roots, flavour) for flavour in FLAVOURS}
    found = []
    for directory in _directories(roots):
        try:
            manifest = _manifest(directory, advice="")
        except NotFoundError:
            continue
        flavours = tuple(flavour for flavour, key in pointers.items() if key == directory.name)
        found.append((directory.stat().st_mtime, Entry(directory, manifest, flavours)))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0], reverse=True)]


def is_complete(roots: Roots, key: str) -> bool:
    """Whether this guest exists with all its files at their full size."""
    try:
        _guest(roots.guests / key, advice="")
    except NotFoundError:
        return False
    return True


def select(roots: Roots, flavour: str, key: str) -> None:
    """Make `key` what `current` answers, atomically.  The caller holds the lock."""
    temporary = roots.guests / f"{_STAGING}{flavour}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(key)
    temporary.rename(_pointer(roots, flavour))
    _sync(roots.guests)


def remove(roots: Roots, key: str) -> None:
    """Remove one guest and the pointers at it.  The caller holds the lock.

    A running virtual machine keeps the files that it has open.
    """
    directory = roots.guests / key
    for flavour in FLAVOURS:
        if _pointed(roots, flavour) == key:
            _pointer(roots, flavour).unlink()
    _discard(roots, directory)


@contextmanager
def locked(roots: Roots, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the store for building or removing; whatever a killed holder left behind is removed first.

    `waiting` is called once if another process holds it.
    """
    _make_directory(roots.guests)
    with locks.opened(roots.guests / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in [*roots.guests.glob(f"{_STAGING}*"), *parts(roots).glob(f"{_STAGING}*")]:
            if leftover.is_symlink() or not leftover.is_dir():
                leftover.unlink()
            else:
                # A helper of the killed builder may still be writing: what it leaves goes with the next build.
                shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextmanager
def staging(final: Path) -> Iterator[Path]:
    """A directory to build in, which becomes `final` if the block is left without an error.

    An existing `final` is replaced in one step.  The caller holds the lock.
    """
    _make_directory(final.parent)
    directory = Path(tempfile.mkdtemp(prefix=_STAGING, dir=final.parent))
    try:
        yield directory
        _settle(directory)
        try:
            directory.rename(final)
        except OSError:
            if not final.is_dir():
                raise
            _exchange(directory, final)
        _sync(final.parent)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_manifest(directory: Path, *, flavour: str, files: Mapping[str, str], **facts: object) -> None:
    """Complete a guest being staged: `files` maps a role (kernel, initrd, image) to a file name in `directory`."""
    described = {}
    for role, name in files.items():
        with open(directory / name, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        described[role] = {"name": name, "size": (directory / name).stat().st_size, "sha256": digest}
    manifest = {"format": FORMAT, "flavour": flavour, "files": described, **facts}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def part(roots: Roots, kind: str, key: str) -> Path:
    """Where an intermediate result is kept; it is complete if it exists."""
    return parts(roots) / f"{kind}-{key}"


def parts(roots: Roots) -> Path:
    return roots.guests / "parts"


def remove_unused(roots: Roots) -> list[str]:
    """Remove guests that are not current, and parts and downloads that no current one is made of.

    Answers the keys of the removed guests.  The caller holds the lock.
    """
    used = {name for entry in entries(roots) if entry.current_for for name in entry.manifest.get("parts", ())}
    kept = {_pointed(roots, flavour) for flavour in FLAVOURS}
    removed = [directory.name for directory in _directories(roots) if directory.name not in kept]
    for key in removed:
        remove(roots, key)
    if parts(roots).exists():
        for directory in parts(roots).iterdir():
            if directory.name not in used:
                _discard(roots, directory)
    if (roots.guests / "cache").exists():
        _discard(roots, roots.guests / "cache")
    return removed


def cache(roots: Roots) -> Path:
    directory = roots.guests / "cache"
    _make_directory(directory)
    return directory


def _guest(directory: Path, *, advice: str) -> Guest:
    manifest = _manifest(directory, advice=advice)
    paths = {}
    for role, described in manifest["files"].items():
        path = directory / os.path.basename(described["name"])
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            size = -1
        if size != described["size"]:
            raise NotFoundError(f"guest '{directory.name}' is damaged: '{path}' is not what was built: {advice}")
        paths[role] = path
    return Guest(
        key=directory.name,
        kernel=paths["kernel"],
        initrd=paths.get("initrd"),
        image=paths["image"],
        cmdline=tuple(manifest["cmdline"]),
    )


def _manifest(directory: Path, *, advice: str) -> Mapping[str, Any]:
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise NotFoundError(f"guest '{directory.name}' was built by another version of vmsandbox: {advice}")
        # What is used without looking further.
        manifest["files"]["kernel"], manifest["files"]["image"], manifest["cmdline"], manifest["flavour"]
        for described in manifest["files"].values():
            described["name"], described["size"], described["sha256"]
    except FileNotFoundError:
        raise NotFoundError(f"no guest '{directory.name}': {advice}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise NotFoundError(f"guest '{directory.name}' is damaged: bad '{MANIFEST}' ({error!r}): {advice}") from error
    assert isinstance(manifest, dict)
    return manifest


def _directories(roots: Roots) -> list[Path]:
    try:
        names = sorted(os.listdir(roots.guests))
    except FileNotFoundError:
        return []
    return [roots.guests / name for name in names if len(name) == KEY_DIGITS and not name.startswith(".")]


def _pointer(roots: Roots, flavour: str) -> Path:
    if flavour not in FLAVOURS:
        raise InvalidArgumentError(f"unknown kernel '{flavour}': choose one of {', '.join(FLAVOURS)}")
    return roots.guests / f"current-{flavour}"


def _pointed(roots: Roots, flavour: str) -> str | None:
    try:
        return os.path.basename(os.readlink(_pointer(roots, flavour)))
    except FileNotFoundError:
        return None


def _advice(flavour: str) -> str:
    return "run 'vmsandbox guest build" + ("'" if flavour == "packaged" else f" --kernel {flavour}'")


def _discard(roots: Roots, directory: Path) -> None:
    """Remove a directory so that nobody ever sees half of it."""
    doomed = Path(tempfile.mkdtemp(prefix=_STAGING, dir=roots.guests))
    directory.rename(doomed / "discarded")
    _sync(roots.guests)
    shutil.rmtree(doomed)


def _make_directory(directory: Path) -> None:
    """Like ``mkdir -p``, but readable by the unprivileged QEMU whatever the caller's umask."""
    for path in reversed([directory, *directory.parents]):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        path.chmod(0o755)


def _settle(directory: Path) -> None:
    """Put everything in `directory` on disk, readable by all (QEMU is unprivileged)."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
        os.chmod(parent, 0o755)
    # One call for all of them: a part may have thousands of files.
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _libc("syncfs", descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    at_fdcwd, rename_exchange = -100, 2
    _libc("renameat2", at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange)


def _libc(function: str, *arguments: int | bytes) -> None:
    """Call what the os module lacks; only building needs it, so its import does not burden readers of the store."""
    import ctypes

    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
