"""A store in a temporary directory, and images in it that cost nothing to make."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from vmsandbox.paths import Roots
from vmsandbox.resources.images.document import Image
from vmsandbox.resources.images.store import ImageStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(tmp_path / "run", tmp_path / "data")


@pytest.fixture
def store(roots: Roots) -> ImageStore:
    return ImageStore(roots)


@pytest.fixture
def publish(store: ImageStore) -> Callable[..., Image]:
    """Put an image of a few bytes into the store: ``publish("name:tag", ..., content=b"...", image_id="ab")``."""

    def put(*names: str, content: bytes = b"file system", image_id: str | None = None, created: str = "") -> Image:
        store.root.mkdir(parents=True, exist_ok=True)
        staged = store.root / "staged"
        staged.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        identity = hashlib.sha256(repr((names, content)).encode()).hexdigest()
        if image_id is not None:
            identity = image_id + identity[len(image_id) :]
        image = Image(
            id=identity,
            names=(),
            erofs=store.blobs / f"{digest}.erofs",
            size=len(content),
            config={"Cmd": ["sh"]},
            architecture="amd64",
            created=created,
            source="oci:somewhere",
            digest=f"sha256:{digest}",
        )
        return store.publish(image, staged, names)

    return put
