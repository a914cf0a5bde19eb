"""Names of images: what a user may write, and the one form it is stored in.

``demo``, ``demo:latest`` and ``docker.io/library/demo:latest`` are the same name; it is stored as ``demo:latest``.
Stdlib only: the supervisor needs this on its way to a running container.
"""

from __future__ import annotations

import re

from vmsandbox.errors import InvalidArgumentError

DEFAULT_TAG = "latest"
#: Spellings of docker's own registry, which is left out of a name, the longest first.
_HUB = ("docker.io/library/", "index.docker.io/library/", "docker.io/", "index.docker.io/")
_WORD = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(?::[0-9]+)?"
_NAME = re.compile(rf"((?:{_HOST}/)?{_WORD}(?:/{_WORD})*)(?::([A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}))?\Z")
_HEX = re.compile(r"[0-9a-f]{1,64}\Z")
#: as docker's limit; keeps the name usable as a file name
_LONGEST = 200


def normalised(name: str) -> str:
    """Return `name` with its tag and without docker's own registry; raises `InvalidArgumentError`."""
    short = name
    for prefix in _HUB:
        if short.startswith(prefix):
            short = short[len(prefix) :]
            break
    match = _NAME.match(short)
    if match is None or len(short) > _LONGEST:
        raise InvalidArgumentError(
            f"'{name}' is not a name for an image: use lower-case letters, digits and '.', '_', '-', "
            "with parts separated by '/' and perhaps a ':TAG'"
        )
    return f"{match[1]}:{match[2] or DEFAULT_TAG}"


def digits_of_id(reference: str) -> str | None:
    """Return the hex digits if `reference` can be an image's id or the beginning of one, else None."""
    digits = reference.removeprefix("sha256:")
    return digits if _HEX.match(digits) else None
