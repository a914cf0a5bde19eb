"""The guest image is the same, byte for byte, wherever and whenever it is built."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmsandbox.guestbuild import build, image, packages, store, wheels
from vmsandbox.guestbuild.packages import Apt
from vmsandbox.guestbuild.steps import Steps
from vmsandbox.paths import Roots

if TYPE_CHECKING:
    from collections.abc import Iterator

#: a file system that lists directories in another order than the one tests use
MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def unpacked() -> Iterator[tuple[Path, Path]]:
    """The packages and wheels of the image, unpacked; from the downloads of the last build where there was one."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        cache = Roots.chosen().guests / "cache"
        if cache.exists():
            shutil.copytree(cache, scratch / "cache")
        (scratch / "cache").mkdir(exist_ok=True)
        apt = Apt(scratch / "cache")
        packages.extract(apt.fetch(apt.with_dependencies(*image.PACKAGES)), scratch / "packages")
        pins = wheels.pins(wheels.lock_file().read_text(), image.WHEELS)
        steps = Steps(io.StringIO(), scratch / "log")
        wheels.extract(wheels.fetch(pins, scratch / "cache", steps), scratch / "wheels")
        yield scratch / "packages", scratch / "wheels"


def built(unpacked: tuple[Path, Path], directory: Path) -> bytes:
    steps = Steps(io.StringIO(), directory / "log")
    tree = directory / "tree"
    tree.mkdir()
    image.base(*unpacked, tree, steps)
    image.add_sources([build.source_directory(name) for name in build.SOURCES], tree, steps)
    image.pack(tree, directory / "root.erofs", steps)
    return (directory / "root.erofs").read_bytes()


def test_two_builds_of_the_image_give_identical_bytes(unpacked: tuple[Path, Path], tmp_path: Path) -> None:
    first = built(unpacked, tmp_path)
    before = os.umask(0o077)
    try:
        with tempfile.TemporaryDirectory(dir=MEMORY) as other:
            assert built(unpacked, Path(other)) == first
    finally:
        os.umask(before)


def test_the_image_has_what_the_agent_expects_of_it(unpacked: tuple[Path, Path], tmp_path: Path) -> None:
    built(unpacked, tmp_path)
    tree = tmp_path / "tree"
    for name in ("hostname", "hosts", "resolv.conf", "machine-id"):
        assert os.readlink(tree / "etc" / name) == f"/run/vmsandbox/etc/{name}"
    for name in ("proc", "sys", "dev", "run", "tmp"):
        assert list((tree / name).iterdir()) == []
    for name in ("usr/sbin/init", "usr/bin/python3", "usr/bin/crun", "usr/sbin/modprobe"):
        assert os.access(tree / name, os.X_OK)
    assert (tree / image.COMMAND[-1].lstrip("/")).exists()
    assert not list(tree.rglob("*.py"))
    assert not list(tree.rglob("__pycache__"))


def test_a_second_build_does_nothing_and_names_the_same_guest(tmp_path: Path) -> None:
    """Without building anything: the guest is put where a build would have."""
    roots = Roots(tmp_path / "run", tmp_path / "data")
    shown = io.StringIO()
    with store.locked(roots):
        made = build.plan(Apt(store.cache(roots)), "packaged")
        with store.staging(roots.guests / made.key) as directory:
            for name in ("vmlinux", "root.erofs"):
                (directory / name).write_bytes(b"content")
            files = {"kernel": "vmlinux", "image": "root.erofs"}
            store.write_manifest(directory, flavour="packaged", files=files, cmdline=list(made.cmdline))
    entry = build.build(roots, "packaged", force=False, stream=shown)
    assert entry.key == made.key == store.current(roots).key
    assert shown.getvalue() == ""


def test_the_key_changes_with_our_sources(tmp_path: Path) -> None:
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "main.py").write_text("one = 1\n")
    first = build.digest_of_tree(tmp_path / "agent")
    (tmp_path / "agent" / "data.txt").write_text("not in the image")
    assert build.digest_of_tree(tmp_path / "agent") == first
    (tmp_path / "agent" / "main.py").write_text("one = 2\n")
    second = build.digest_of_tree(tmp_path / "agent")
    (tmp_path / "agent" / "main.py").rename(tmp_path / "agent" / "start.py")
    assert len({first, second, build.digest_of_tree(tmp_path / "agent")}) == 3
