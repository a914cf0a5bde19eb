"""The store: looking up, names that move, users that keep an image, and damage that stays where it is."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from vmsandbox.errors import AmbiguousError, InvalidArgumentError, InvalidStateError, NotFoundError, SandboxError
from vmsandbox.resources.images.document import DamagedError, Image

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmsandbox.resources.images.store import ImageStore

    Publish = Callable[..., Image]

HEAVY = ("asyncio", "tarfile", "subprocess", "shutil", "tempfile", "zlib", "hashlib", "pydantic", "grpc")


def test_the_store_is_cheap_to_import() -> None:
    code = "import sys, vmsandbox.resources.images.store; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(HEAVY).isdisjoint(loaded)


def test_an_image_is_found_by_name_by_id_and_by_the_beginning_of_its_id(store: ImageStore, publish: Publish) -> None:
    image = publish("demo", image_id="ab12")
    for reference in ("demo", "demo:latest", "docker.io/library/demo", image.id, f"sha256:{image.id}", "ab12", "ab"):
        assert store.resolve(reference) == image
    assert store.resolve(f"demo@{image.digest}") == image
    assert image.names == ("demo:latest",)
    assert image.erofs.read_bytes() == b"file system"
    assert store.get(image.id) == image


def test_a_name_made_of_hex_digits_wins_over_the_beginning_of_an_id(store: ImageStore, publish: Publish) -> None:
    publish("other", image_id="cafe")
    named = publish("cafe", image_id="0123")
    assert store.resolve("cafe") == named
    assert store.resolve("sha256:cafe").names == ("other:latest",)


def test_an_ambiguous_beginning_lists_the_candidates(store: ImageStore, publish: Publish) -> None:
    first = publish("one", image_id="ab1")
    second = publish("two", image_id="ab2")
    with pytest.raises(AmbiguousError) as caught:
        store.resolve("ab")
    message = str(caught.value)
    assert first.id[:12] in message
    assert "one:latest" in message
    assert second.id[:12] in message
    assert "two:latest" in message


@pytest.mark.parametrize("reference", ["nowhere", "nowhere:1", "abcdef", "a" * 64, "x@sha256:00"])
def test_a_missing_image_says_how_to_import_one(store: ImageStore, publish: Publish, reference: str) -> None:
    publish("demo", image_id="01")
    with pytest.raises(NotFoundError, match="image import") as caught:
        store.resolve(reference)
    assert not isinstance(caught.value, AmbiguousError)
    assert f"'{reference}'" in str(caught.value)


def test_images_that_one_may_not_read_are_not_taken_for_missing(
    store: ImageStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("demo", image_id="01")

    def refused(path: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("vmsandbox.resources.images.store.os.listdir", refused)
    with pytest.raises(SandboxError, match=r"cannot read the images .*: run it as root, or choose .*'--data-root'"):
        store.resolve("other")


def test_an_empty_store_has_no_images_and_is_not_made_by_looking(store: ImageStore) -> None:
    assert list(store.list()) == []
    with pytest.raises(NotFoundError):
        store.resolve("demo")
    store.release("nobody")
    assert not store.root.exists()


def test_what_can_be_no_name_is_said_to_be_none(store: ImageStore) -> None:
    with pytest.raises(InvalidArgumentError):
        store.resolve("../../etc/passwd")


def test_images_are_listed_youngest_first(store: ImageStore, publish: Publish) -> None:
    publish("old", created="2020-01-01T00:00:00Z")
    publish("new", created="2024-01-01T00:00:00Z")
    assert [image.names for image in store.list()] == [("new:latest",), ("old:latest",)]


def test_a_name_moves_to_the_image_that_took_it_last(store: ImageStore, publish: Publish) -> None:
    first = publish("demo", content=b"one")
    second = publish("demo", content=b"two")
    assert store.resolve("demo") == second
    assert store.resolve(first.id).names == ()


def test_removing_the_last_name_removes_image_and_blob(store: ImageStore, publish: Publish) -> None:
    image = publish("one", "two")
    assert store.remove("one") == (("one:latest",), None)
    assert store.resolve("two").id == image.id
    assert store.remove("two") == (("two:latest",), image.id)
    assert not image.erofs.exists()
    assert list(store.list()) == []
    assert os.listdir(store.documents) == os.listdir(store.names) == []


def test_removing_by_id_removes_every_name(store: ImageStore, publish: Publish) -> None:
    image = publish("one", "two")
    assert store.remove(image.id[:12]) == (("one:latest", "two:latest"), image.id)


def test_a_blob_stays_while_another_image_needs_it(store: ImageStore, publish: Publish) -> None:
    publish("one", image_id="aa")
    other = publish("two", image_id="bb")
    store.remove("one")
    assert other.erofs.exists()
    store.remove("two")
    assert not other.erofs.exists()


def test_an_image_in_use_is_not_removed_and_the_user_is_named(store: ImageStore, publish: Publish) -> None:
    image = publish("demo")
    store.hold(image.id, "container1")
    store.hold(image.id, "container1")
    for reference in ("demo", image.id):
        with pytest.raises(InvalidStateError, match="container1"):
            store.remove(reference)
    assert store.references() == {image.id: ("container1",)}
    store.release("container1")
    assert store.references() == {}
    assert store.remove("demo") == (("demo:latest",), image.id)


def test_one_of_several_names_of_an_image_in_use_may_go(store: ImageStore, publish: Publish) -> None:
    image = publish("one", "two")
    store.hold(image.id, "c1")
    assert store.remove("one") == (("one:latest",), None)


def test_force_takes_the_name_and_leaves_an_image_in_use(store: ImageStore, publish: Publish) -> None:
    image = publish("demo")
    store.hold(image.id, "c1")
    assert store.remove("demo", force=True) == (("demo:latest",), None)
    assert store.resolve(image.id).names == ()
    assert image.erofs.exists()
    store.release("c1")
    assert store.remove(image.id) == ((), image.id)


def test_an_image_that_is_gone_cannot_be_held(store: ImageStore) -> None:
    with pytest.raises(NotFoundError):
        store.hold("0" * 64, "c1")
    assert store.references() == {}


@pytest.mark.parametrize("owner", ["", "../x", "a/b", ".", "x" * 129])
def test_an_owner_cannot_name_a_file_elsewhere(store: ImageStore, publish: Publish, owner: str) -> None:
    image = publish("demo")
    with pytest.raises(InvalidArgumentError):
        store.hold(image.id, owner)
    store.release(owner)
    assert store.references() == {}


DAMAGES: dict[str, Callable[[ImageStore, Image], object]] = {
    "empty": lambda store, image: (store.documents / f"{image.id}.json").write_bytes(b""),
    "cut": lambda store, image: os.truncate(store.documents / f"{image.id}.json", 40),
    "foreign": lambda store, image: (store.documents / f"{image.id}.json").write_bytes(b"[1]"),
    "nested": lambda store, image: (store.documents / f"{image.id}.json").write_bytes(b"[" * 100_000),
    "newer": lambda store, image: (store.documents / f"{image.id}.json").write_text(json.dumps({"version": 99})),
    "directory": lambda store, image: (
        (store.documents / f"{image.id}.json").unlink(),
        (store.documents / f"{image.id}.json").mkdir(),
    ),
    "blob gone": lambda _store, image: image.erofs.unlink(),
    "blob cut": lambda _store, image: os.truncate(image.erofs, 3),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_image_is_named_and_spoils_no_other(
    store: ImageStore, publish: Publish, damage: Callable[[ImageStore, Image], object]
) -> None:
    broken = publish("broken", content=b"broken")
    whole = publish("whole", content=b"whole")
    damage(store, broken)
    with pytest.raises(DamagedError, match=str(store.root)):
        store.resolve("broken")
    found, messages = store.scan()
    assert list(found) == [whole]
    assert len(messages) == 1
    assert store.get(broken.id) is None
    store.sweep()
    assert store.resolve("whole") == whole


@pytest.mark.parametrize("kind", ["empty", "newer", "blob gone"])
def test_a_damaged_image_can_be_removed(store: ImageStore, publish: Publish, kind: str) -> None:
    broken = publish("broken")
    DAMAGES[kind](store, broken)
    assert store.remove("broken") == (("broken:latest",), broken.id)
    assert os.listdir(store.blobs) == os.listdir(store.documents) == []


def test_a_sweep_removes_what_no_image_has(store: ImageStore, publish: Publish) -> None:
    image = publish("demo")
    (store.blobs / f"{'0' * 64}.erofs").write_bytes(b"half")
    (store.documents / ".x.json").write_bytes(b"half")
    (store.names / ".y:latest").symlink_to(image.id)
    (store.names / "z:latest").symlink_to("0" * 64)
    store.sweep()
    assert os.listdir(store.blobs) == [image.erofs.name]
    assert os.listdir(store.documents) == [f"{image.id}.json"]
    assert os.listdir(store.names) == ["demo:latest"]
