"""Writable layers: sound, sparse, quick to make, and nothing left when the disk is full or the maker is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from vmsandbox.errors import ExhaustedError, InvalidArgumentError, SandboxError, UnsupportedError
from vmsandbox.resources import scratch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def header(path: Path) -> dict[str, str]:
    told = subprocess.run(["/usr/sbin/dumpe2fs", "-h", path], capture_output=True, text=True, check=True).stdout
    return {key: value.strip() for key, _, value in (line.partition(":") for line in told.splitlines())}


@pytest.mark.parametrize("size_mib", [scratch.SIZE_MIN_MIB, 100, 10_240, 2 * 1024 * 1024])
def test_a_layer_is_a_sound_and_sparse_ext4_of_its_size(tmp_path: Path, size_mib: int) -> None:
    layer = tmp_path / "layer"
    scratch.create(layer, size_mib, tmp_path / "cache")
    status = layer.stat()
    assert status.st_size == size_mib * scratch.MIB
    assert status.st_blocks * 512 < 2 * scratch.MIB
    assert status.st_mode & 0o777 == 0o600
    fields = header(layer)
    assert int(fields["Block count"]) * 4096 == status.st_size
    assert int(fields["Reserved block count"]) == 0
    assert "has_journal" in fields["Filesystem features"]
    if size_mib < 20_000:
        subprocess.run(["/usr/sbin/e2fsck", "-fn", layer], check=True, capture_output=True)


def test_the_second_layer_of_a_size_is_a_copy_that_needs_no_mkfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch.create(tmp_path / "one", 64, tmp_path / "cache")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    scratch.create(tmp_path / "two", 64, tmp_path / "cache")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_layers_do_not_share_what_is_written_to_them(tmp_path: Path) -> None:
    scratch.create(tmp_path / "one", 16, tmp_path / "cache")
    with open(tmp_path / "one", "r+b") as file:
        file.write(b"x" * 8192)
    scratch.create(tmp_path / "two", 16, tmp_path / "cache")
    assert (tmp_path / "two").read_bytes()[:8] == bytes(8)


@pytest.mark.parametrize(
    ("size_mib", "shown"), [(-1, "-1m"), (0, "0m"), (15, "15m"), (1 << 24, "16t"), ((1 << 24) + 1024, "16385g")]
)
def test_a_size_that_cannot_be_is_refused_in_the_units_that_users_write(
    tmp_path: Path, size_mib: int, shown: str
) -> None:
    said = rf"^a writable layer of {shown} is not possible: choose 16m to 16777215m \('--scratch-size'\)$"
    with pytest.raises(InvalidArgumentError, match=said):
        scratch.create(tmp_path / "layer", size_mib, tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error_and_leaves_no_layer(tmp_path: Path) -> None:
    scratch.create(tmp_path / "first", 64, tmp_path / "cache")
    with small_disk(tmp_path / "disk", "16k") as disk:
        with pytest.raises(ExhaustedError, match="no space left"):
            scratch.create(disk / "layer", 64, tmp_path / "cache")
        assert not list(disk.iterdir())


def test_a_disk_too_full_for_the_cache_is_one_error_and_leaves_nothing_to_trust(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "16k") as disk:
        with pytest.raises(ExhaustedError, match="no space left"):
            scratch.create(tmp_path / "layer", 64, disk / "cache")
        assert [path.name for path in (disk / "cache").iterdir()] == ["lock"]
    assert not (tmp_path / "layer").exists()


def test_an_existing_layer_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(b"precious")
    with pytest.raises(SandboxError, match="File exists"):
        scratch.create(tmp_path / "layer", 16, tmp_path / "cache")
    assert (tmp_path / "layer").read_bytes() == b"precious"


@pytest.mark.parametrize("damage", [b"", b"cut"])
def test_a_damaged_cached_file_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    scratch.create(tmp_path / "one", 16, tmp_path / "cache")
    golden = next(path for path in (tmp_path / "cache").iterdir() if path.name.startswith("ext4"))
    golden.write_bytes(damage)
    scratch.create(tmp_path / "two", 16, tmp_path / "cache")
    subprocess.run(["/usr/sbin/e2fsck", "-fn", tmp_path / "two"], check=True, capture_output=True)


def test_many_at_once_make_the_cached_file_once(tmp_path: Path) -> None:
    layers = [tmp_path / f"layer{number}" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda layer: scratch.create(layer, 32, tmp_path / "cache"), layers))
    assert len({layer.read_bytes() for layer in layers}) == 1
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["ext4-1-32m", "lock"]


def test_a_maker_killed_while_formatting_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    fake = programs / "mkfs.ext4"
    fake.write_text('#!/bin/sh\nprintf half >"$(eval echo \\${$#})"\nkill -KILL $PPID\n')
    fake.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from vmsandbox.resources import scratch;"
        "scratch.create(Path(sys.argv[1]), 16, Path(sys.argv[2]))"
    )
    layer, cache = tmp_path / "layer", tmp_path / "cache"
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    killed = subprocess.run([sys.executable, "-c", code, layer, cache], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (cache / "draft").exists()
    assert not layer.exists()
    scratch.create(layer, 16, cache)
    subprocess.run(["/usr/sbin/e2fsck", "-fn", layer], check=True, capture_output=True)
    assert sorted(path.name for path in cache.iterdir()) == ["ext4-1-16m", "lock"]


def test_a_missing_mkfs_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "mkfs.ext4")

    monkeypatch.setattr(scratch.subprocess, "run", missing)
    with pytest.raises(UnsupportedError, match="apt-get install e2fsprogs"):
        scratch.create(tmp_path / "layer", 16, tmp_path / "cache")


def test_removing_is_repeatable(tmp_path: Path) -> None:
    scratch.create(tmp_path / "layer", 16, tmp_path / "cache")
    scratch.remove(tmp_path / "layer")
    scratch.remove(tmp_path / "layer")
    assert not (tmp_path / "layer").exists()
