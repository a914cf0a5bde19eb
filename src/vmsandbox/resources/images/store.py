"""The images of this machine: which there are, what they are called, who uses them.

    images/
      lock                    held for the moments in which the store changes
      blobs/DIGEST.erofs      a root file system; DIGEST is the sha256 of the file
      images/ID.json          an image (see `document`); ID is the sha256 of its OCI configuration
      names/NAME              a symbolic link whose target is an ID ('/' in a name is written '+')
      refs/ID/OWNER           an empty file: container OWNER uses the image
      work/                   imports under way (see `workplace`)

An image is its document: what has none does not exist, and a blob without a document is rubbish.  Documents
and names appear by rename, so a reader needs no lock.  Stdlib only and cheap to import: the supervisor looks
images up on its way to a running container.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from vmsandbox.errors import (
    AmbiguousError,
    ExhaustedError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    SandboxError,
)
from vmsandbox.resources.images import document
from vmsandbox.resources.images.document import DamagedError, Image, is_id
from vmsandbox.resources.images.reference import digits_of_id, normalised

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from vmsandbox.paths import Roots

    Names = dict[str, tuple[str, ...]]

_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")


class ImageStore:
    """The images below `Roots.images`.  Every method may be called from several processes at once."""

    def __init__(self, roots: Roots) -> None:
        self.root = roots.images
        self.blobs = self.root / "blobs"
        self.documents = self.root / "images"
        self.names = self.root / "names"
        self.refs = self.root / "refs"
        self.work = self.root / "work"

    # looking up

    def resolve(self, reference: str) -> Image:
        """Find an image by name, id or unique beginning of an id.

        Raises `NotFoundError` (which says how to import one), `AmbiguousError`, `InvalidArgumentError` for what can be
        neither name nor id, and `DamagedError`.
        """
        return self._load(self._id_of(reference))

    def get(self, image_id: str) -> Image | None:
        """Return the image with exactly this id, None if there is none or it is not whole."""
        try:
            return self._load(image_id)
        except (NotFoundError, DamagedError):
            return None

    def list(self) -> Sequence[Image]:
        """Every whole image, the youngest first."""
        return self.scan()[0]

    def scan(self) -> tuple[Sequence[Image], Sequence[str]]:
        """Every whole image, the youngest first, and a message for each that is not."""
        names = self._names()
        found = []
        damaged = []
        for image_id in self._ids():
            try:
                found.append(self._load(image_id, names))
            except NotFoundError:
                continue  # removed meanwhile
            except DamagedError as error:
                damaged.append(str(error))
        found.sort(key=lambda image: (image.created, image.id), reverse=True)
        return found, damaged

    def references(self) -> dict[str, tuple[str, ...]]:
        """Who holds what: image id -> owners.  For `gc`, which knows which owners exist."""
        found = {image_id: self.users(image_id) for image_id in _entries(self.refs)}
        return {image_id: owners for image_id, owners in found.items() if owners}

    def users(self, image_id: str) -> tuple[str, ...]:
        """The owners that hold this image."""
        return tuple(sorted(_entries(self.refs / image_id)))

    def _id_of(self, reference: str) -> str:
        digits = digits_of_id(reference)
        if digits is not None and len(digits) == 64:
            if (self.documents / f"{digits}.json").exists():
                return digits
        else:
            target = self._target(_name_or_none(reference))
            if target is not None:
                return target
        if digits is not None:
            fits = [image_id for image_id in self._ids() if image_id.startswith(digits)]
            if len(fits) > 1:
                raise AmbiguousError(
                    f"image '{reference}' is ambiguous: it fits {self._described(fits)}; give more of it"
                )
            if fits:
                return fits[0]
        elif "@" in reference:
            return self._id_of_digest(reference)
        else:
            normalised(reference)
        raise self._missing(reference)

    def _id_of_digest(self, reference: str) -> str:
        digest = reference.partition("@")[2]
        for image in self.list():
            if digest in (image.digest, f"sha256:{image.id}"):
                return image.id
        raise self._missing(reference)

    def _missing(self, reference: str) -> SandboxError:
        try:
            os.listdir(self.names)
        except PermissionError:
            where = f"cannot read the images below '{self.root}': permission denied"
            return SandboxError(f"{where}: run it as root, or choose another data root with '--data-root'")
        except OSError:
            pass  # nothing has been imported
        return NotFoundError(
            f"no image '{reference}': 'vmsandbox image ls' lists those there are, "
            "'vmsandbox image import oci:DIR:TAG --name NAME' makes one"
        )

    def _described(self, ids: Iterable[str]) -> str:
        names = self._names()
        parts = []
        for image_id in sorted(ids):
            own = ", ".join(names.get(image_id, ()))
            parts.append(f"'{image_id[:20]}' ({own})" if own else f"'{image_id[:20]}'")
        return ", ".join(parts)

    def _ids(self) -> Sequence[str]:
        stems = (name.removesuffix(".json") for name in _entries(self.documents))
        return [stem for stem in stems if is_id(stem)]

    def _names(self) -> Names:
        """Image id -> its names."""
        found: Names = {}
        for entry in sorted(_entries(self.names)):
            if entry.startswith("."):
                continue  # on its way
            name = entry.replace("+", "/")
            target = self._target(name)
            if target is not None:
                found[target] = (*found.get(target, ()), name)
        return found

    def _target(self, name: str | None) -> str | None:
        if name is None:
            return None
        try:
            target = os.readlink(self.names / name.replace("/", "+"))
        except OSError:
            return None
        return target if is_id(target) else None

    def _load(self, image_id: str, names: Names | None = None) -> Image:
        try:
            image = document.read(self.documents / f"{image_id}.json", image_id, blobs=self.blobs)
        except FileNotFoundError:
            raise self._missing(image_id) from None
        image = replace(image, names=(self._names() if names is None else names).get(image_id, ()))
        document.check_blob(image)
        return image

    # changing

    def publish(self, image: Image, staged: Path, names: Iterable[str]) -> Image:
        """Move the finished erofs file `staged` into the store as `image`, called `names`.

        `staged` is on the store's file system and has been synced; `image.erofs` names its place.  A name that
        another image has moves over.  Raises `ExhaustedError` when the disk is full; the image is then not there.
        """
        data = document.encoded(image)
        with self._changing("publish image"):
            names = [normalised(name) for name in names]
            before = {name: self._target(name) for name in names}
            try:
                os.rename(staged, image.erofs)
                _sync(self.blobs)
                _write(self.documents / f"{image.id}.json", data)
                for name in names:
                    self._point(name, image.id)
            except OSError:
                self._unpublish(image.id, before)
                raise
        return self._load(image.id)

    def _unpublish(self, image_id: str, names: Mapping[str, str | None]) -> None:
        """Take back what `publish` has done so far; `names` says where they pointed before."""
        (self.documents / f"{image_id}.json").unlink(missing_ok=True)
        for name, target in names.items():
            if target is not None and self._target(name) != target:
                with suppress(OSError):
                    self._point(name, target)
        self._sweep()

    def tag(self, image_id: str, names: Iterable[str]) -> Image:
        """Give an image more names; raises `NotFoundError`, `InvalidArgumentError`."""
        with self._changing("name image"):
            self._load(image_id)
            for name in names:
                self._point(name, image_id)
        return self._load(image_id)

    def remove(self, reference: str, *, force: bool = False) -> tuple[Sequence[str], str | None]:
        """Remove a name, and with its last name the image; by id, every name and the image.

        An image that a container uses stays: `InvalidStateError` names the container.  With `force` the name goes and
        the image stays without it.  Returns the names that went, and the id of the image if it went too.
        """
        with self._changing("remove image"):
            image_id = self._id_of(reference)
            named = _name_or_none(reference)
            all_names = self._names().get(image_id, ())
            by_name = named in all_names and digits_of_id(reference) != image_id
            going = (named,) if by_name and named else all_names
            last = len(going) == len(all_names)
            owners = self.users(image_id)
            if owners and last and not force:
                users = ", ".join(f"'{owner[:12]}'" for owner in owners)
                raise InvalidStateError(
                    f"image '{reference}'",
                    state=f"in use by container {users}",
                    wanted="remove",
                    remedy="remove that first, or use '--force' to remove the name alone",
                )
            for name in going:
                (self.names / name.replace("/", "+")).unlink(missing_ok=True)
            if not last or owners:
                return going, None
            (self.documents / f"{image_id}.json").unlink(missing_ok=True)
            _sync(self.documents)
            self._sweep()
            return going, image_id

    def hold(self, image_id: str, owner_id: str) -> None:
        """Keep the image from being removed while container `owner_id` uses it.  Holding twice is holding once."""
        if not _OWNER.match(owner_id):
            raise InvalidArgumentError(f"'{owner_id}' is not a container id")
        with self._changing("hold image"):
            if not (self.documents / f"{image_id}.json").exists():
                raise self._missing(image_id)
            directory = self.refs / image_id
            directory.mkdir(mode=0o700, exist_ok=True)
            os.close(os.open(directory / owner_id, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))

    def release(self, owner_id: str) -> None:
        """Let go of whatever `owner_id` holds; nothing is no error."""
        if not _OWNER.match(owner_id):
            return
        for image_id in _entries(self.refs):
            (self.refs / image_id / owner_id).unlink(missing_ok=True)
            with suppress(OSError):
                os.rmdir(self.refs / image_id)

    def sweep(self) -> None:
        """Remove blobs and names that no image has: what an interrupted import or removal left."""
        with self._changing("clean up images"):
            self._sweep()

    def _sweep(self) -> None:
        wanted = set()
        for image_id in self._ids():
            blob = document.blob_of(self.documents / f"{image_id}.json")
            if blob is None:
                return  # an unreadable document may own any of the blobs
            wanted.add(blob)
        for entry in _entries(self.blobs):
            if entry not in wanted:
                (self.blobs / entry).unlink(missing_ok=True)
        for directory in (self.documents, self.names):
            for entry in _entries(directory):
                if entry.startswith("."):
                    (directory / entry).unlink(missing_ok=True)
        for entry in _entries(self.names):
            target = self._target(entry)
            if target is None or not (self.documents / f"{target}.json").exists():
                (self.names / entry).unlink(missing_ok=True)

    def _point(self, name: str, image_id: str) -> None:
        entry = normalised(name).replace("/", "+")
        temporary = self.names / f".{entry}"
        temporary.unlink(missing_ok=True)
        os.symlink(image_id, temporary)
        os.rename(temporary, self.names / entry)
        _sync(self.names)

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """Hold the store's lock, and turn the operating system's errors into ours."""
        try:
            for directory in (self.root, self.blobs, self.documents, self.names, self.refs):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
            finally:
                os.close(lock)
        except OSError as error:
            raise storage_error(error, what, self.root) from error


def storage_error(error: OSError, what: str, root: Path) -> SandboxError:
    """The error for a failed system call on the store: `ExhaustedError` when the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExhaustedError(
            f"cannot {what}: no space left on the file system of '{root}': free some or move the data root"
        )
    where = f" '{error.filename}'" if error.filename is not None else f" below '{root}'"
    return SandboxError(f"cannot {what}: {error.strerror or error}:{where}")


def _name_or_none(reference: str) -> str | None:
    try:
        return normalised(reference)
    except InvalidArgumentError:
        return None


def _entries(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _write(path: Path, data: bytes) -> None:
    """Replace `path` so that a crash leaves the old content or the new."""
    temporary = path.with_name(f".{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
