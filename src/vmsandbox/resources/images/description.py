"""The JSON documents of an image, from somebody who may be hostile: bounded, checked, reduced to what we use."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from vmsandbox.errors import InvalidArgumentError

#: The most bytes a manifest, index or configuration may have.
DOCUMENT_MAX = 4 * 1024 * 1024
_KINDS: dict[type, str] = {str: "a string", list: "a list", dict: "an object", int: "a number"}
T = TypeVar("T")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,18}(?:Z|[+-][0-9]{2}:[0-9]{2})\Z")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z")


@dataclass(frozen=True)
class Configuration:
    """An OCI image configuration.

    `id` is the sha256 of its bytes, `config` its ``config`` object, `created` '' if it is no time.
    """

    id: str
    config: dict[str, Any]
    architecture: str
    os: str
    created: str
    layers: tuple[str, ...]


def parsed(data: bytes, what: str) -> object:
    """Parse JSON; `what` names the document in the error."""
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{what} is not JSON: {error}") from error
    return value


def optional(value: object, key: str, kind: type[T], what: str) -> T | None:
    """Return ``value[key]``, None if it is missing or null; raises `InvalidArgumentError` if it is no `kind`."""
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{what} is not an object")
    found = value.get(key)
    if found is None:
        return None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise InvalidArgumentError(f"'{key}' of {what} is not {_KINDS[kind]}")
    return found


def member(value: object, key: str, kind: type[T], what: str, default: T) -> T:
    """As `optional`, with a default for what is missing or null."""
    found = optional(value, key, kind, what)
    return default if found is None else found


def hex_of(digest: str, what: str) -> str:
    """The hex digits of a ``sha256:`` digest; raises `InvalidArgumentError` for any other sort."""
    match = _DIGEST.match(digest)
    if match is None:
        raise InvalidArgumentError(f"{what} has the digest '{digest[:100]}': only sha256 is supported")
    return match[1]


def configuration(data: bytes, what: str = "the image's configuration") -> Configuration:
    """Check and decode an OCI (or docker) image configuration."""
    document = parsed(data, what)
    root = optional(document, "rootfs", dict, what)
    layers = optional(root, "diff_ids", list, what) if root is not None else None
    if layers is None:
        raise InvalidArgumentError(f"{what} lists no layers: this is not a container image")
    for layer in layers:
        hex_of(layer if isinstance(layer, str) else "", f"a layer in {what}")
    created = member(document, "created", str, what, "")
    return Configuration(
        id=hashlib.sha256(data).hexdigest(),
        config=_checked_config(member(document, "config", dict, what, {}), what),
        architecture=member(document, "architecture", str, what, ""),
        os=member(document, "os", str, what, ""),
        created=created if _TIME.match(created) else "",
        layers=tuple(layers),
    )


def _checked_config(config: dict[str, Any], what: str) -> dict[str, Any]:
    """Make sure that what the run path reads has the types it is to have; the rest stays as it is."""
    checked = {key: value for key, value in config.items() if value is not None}
    for key in ("Entrypoint", "Cmd"):
        if isinstance(checked.get(key), str):
            checked[key] = [checked[key]]  # docker's old way of writing one word
    for key in ("Entrypoint", "Cmd", "Env", "Shell"):
        values = member(checked, key, list, what, [])
        if not all(isinstance(value, str) and "\0" not in value for value in values):
            raise InvalidArgumentError(f"'{key}' of {what} is not a list of strings")
    for key in ("WorkingDir", "User", "StopSignal"):
        if "\0" in member(checked, key, str, what, ""):
            raise InvalidArgumentError(f"'{key}' of {what} contains a zero byte")
    for key in ("Labels", "Volumes", "ExposedPorts"):
        member(checked, key, dict, what, {})
    for key, value in checked.get("Labels", {}).items():
        if not isinstance(value, str):
            raise InvalidArgumentError(f"label '{key}' of {what} is not a string")
    return checked
