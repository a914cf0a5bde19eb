"""An image's document: what an image is, and the one form in which that is on disk.

A document is read with suspicion, since a crash of the host or another version of this program may have left
something else; what is damaged is named, together with the way to be rid of it.  An image's names are not in it:
they move from image to image, and the store knows them.  Stdlib only, and cheap to import, as the store.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import SandboxError

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 1
_ID = re.compile(r"[0-9a-f]{64}\Z")
#: A document larger than this is not ours.
_LARGEST = 16 * 1024 * 1024


@dataclass(frozen=True)
class Image:
    """One image.

    `config` is the ``config`` object of the OCI image configuration (Entrypoint, Cmd, Env, WorkingDir, User, ...);
    `size` is that of the erofs file in bytes; `created` is the time the image gives itself; `layers` are the
    digests of the uncompressed layers, bottom first; `digest` is that of the manifest, where there was one.
    """

    id: str
    names: tuple[str, ...]
    erofs: Path
    size: int
    config: dict[str, Any]
    architecture: str
    created: str
    source: str
    digest: str = ""
    layers: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What messages call it: a short id, and a name where there is one."""
        return f"{self.id[:12]} ({', '.join(self.names)})" if self.names else self.id[:12]


class DamagedError(SandboxError):
    """An image's document or blob is not what it should be; the message names the file."""


def is_id(text: str) -> bool:
    """Whether this is a whole id of an image, or the digest of a blob: each is a sha256."""
    return _ID.match(text) is not None


def encoded(image: Image) -> bytes:
    """The document of an image."""
    document = {
        "version": VERSION,
        "id": image.id,
        "erofs": image.erofs.stem,
        "size": image.size,
        "config": image.config,
        "architecture": image.architecture,
        "created": image.created,
        "source": image.source,
        "digest": image.digest,
        "layers": list(image.layers),
    }
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def read(path: Path, image_id: str, *, blobs: Path) -> Image:
    """The image whose document is at `path`, without its names.

    Raises `FileNotFoundError` where there is none and `DamagedError` where it is no document of this image.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(f"cannot read image document '{path}': {error.strerror}") from error
    try:
        document = json.loads(raw)
        version = document["version"]
        if version != VERSION:
            raise DamagedError(f"image document '{path}' has version '{version}', this program knows '{VERSION}'")
        if document["id"] != image_id or not is_id(document["erofs"]):
            raise ValueError("it is another image's")
        return Image(
            id=image_id,
            names=(),
            erofs=blobs / f"{document['erofs']}.erofs",
            size=int(document["size"]),
            config=dict(document["config"]),
            architecture=str(document["architecture"]),
            created=str(document["created"]),
            source=str(document["source"]),
            digest=str(document["digest"]),
            layers=tuple(str(layer) for layer in document["layers"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(f"image document '{path}' is damaged: {error!r}", image_id) from error


def check_blob(image: Image) -> None:
    """Raise `DamagedError` unless the erofs file that the document names is there, and as long as it says."""
    try:
        size = image.erofs.stat().st_size
    except OSError as error:
        raise _damaged(f"image '{image.title}' has lost '{image.erofs}': {error.strerror}", image.id) from error
    if size != image.size:
        raise _damaged(f"image file '{image.erofs}' is {size} bytes long, not {image.size}", image.id)


def blob_of(path: Path) -> str | None:
    """The file name of the blob that a document names, however damaged the rest of it; None if it cannot be told."""
    try:
        return f"{json.loads(path.read_bytes())['erofs']}.erofs"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _damaged(what: str, image_id: str) -> DamagedError:
    return DamagedError(f"{what}; remove it with 'vmsandbox image rm {image_id[:12]}' and import the image again")
