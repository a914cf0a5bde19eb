"""Documents on disk: JSON, versioned, replaced atomically, and read with suspicion.

A damaged document is named in an error and never spoils the others.  Stdlib only: every client reads some.
"""

from __future__ import annotations

import os

from vmsandbox import plainjson
from vmsandbox.errors import NotFoundError, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Written into every document; a larger number was written by a newer version of the product.
VERSION = 1
#: No document of ours comes near this; a larger file is foreign.
MAX_BYTES = 4 * 1024 * 1024


class DamagedDocumentError(SandboxError):
    """A document is truncated, foreign, unreadable or from a newer version."""

    code = "damaged-document"


class ForeignDocumentError(DamagedDocumentError):
    """A document that may be whole, but not for us: from a newer version, or unreadable.  Nothing may remove it."""

    code = "foreign-document"


def write(path: str, document: dict[str, Any]) -> None:
    """Replace the document at `path` atomically and durably (write, fsync, rename)."""
    import json

    data = json.dumps({"version": VERSION, **document}, separators=(",", ":")).encode()
    temporary = f"{path}.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from error  # a full disk does not say where it is
        raise


def remove(path: str) -> None:
    """Remove a document, if it is there, and what writers of it left that were killed; nobody may be writing it now."""
    directory, name = os.path.split(path)
    for entry in os.listdir(directory):
        if entry == name or (entry.startswith(f"{name}.") and entry.endswith(".tmp")):
            try:
                os.unlink(f"{directory}/{entry}")
            except FileNotFoundError:
                pass


def read(path: str) -> dict[str, Any]:
    """Read a document; `NotFoundError` if there is none, `DamagedDocumentError` naming it if it is no good."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"no document '{path}'") from None
    except OSError as error:
        raise ForeignDocumentError(
            f"cannot read '{path}': {error.strerror}; it is left alone until it can be read"
        ) from error
    if len(data) > MAX_BYTES:
        raise DamagedDocumentError(
            f"'{path}' is not a document of ours: larger than {MAX_BYTES} bytes; 'vmsandbox gc' removes it"
        )
    try:
        document = plainjson.loads(data)
    except (ValueError, RecursionError):
        raise DamagedDocumentError(f"'{path}' is damaged: not valid JSON; 'vmsandbox gc' removes it") from None
    if not isinstance(document, dict) or not isinstance(document.get("version"), int):
        raise DamagedDocumentError(f"'{path}' is not a document of ours; 'vmsandbox gc' removes it")
    if document["version"] > VERSION:
        raise ForeignDocumentError(
            f"'{path}' was written by a newer vmsandbox (document version {document['version']}, known {VERSION}): "
            "use that one for it"
        )
    return document


def read_shaped(path: str, shape: dict[str, Any]) -> dict[str, Any]:
    """As `read`; what is in it but of another type than its readers take is damage as well."""
    document = read(path)
    wrong = _misfit(document, shape)
    if wrong:
        raise DamagedDocumentError(f"'{path}' is damaged: '{wrong}' is of the wrong type; 'vmsandbox gc' removes it")
    return document


def _misfit(value: object, shape: object) -> str:
    """The key of the first value that does not fit, `.` for the value itself, empty if all do."""
    if value is None:
        return ""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return "."
        for key, inner in shape.items():
            wrong = _misfit(value.get(key), inner)
            if wrong:
                return key if wrong == "." else f"{key}.{wrong}"
        return ""
    if isinstance(shape, list):
        fits = isinstance(value, list) and not any(_misfit(item, shape[0]) for item in value)
        return "" if fits else "."
    kinds = (int, float) if shape is float else shape
    return "" if isinstance(value, kinds) else "."  # type: ignore[arg-type]
