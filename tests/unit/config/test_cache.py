"""What the configuration's cache trusts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from vmsandbox.config import cache
from vmsandbox.config.load import load
from vmsandbox.config.model import LogSettings, Settings
from vmsandbox.paths import Roots

if TYPE_CHECKING:
    from pathlib import Path

KEY = "0" * 64
SETTINGS = replace(Settings(), log=LogSettings(level="debug"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    cache.write(path, KEY, SETTINGS)
    return path


def entry(directory: Path) -> Path:
    (found,) = directory.iterdir()
    return found


def test_what_was_written_is_read_back(directory: Path) -> None:
    assert cache.read(directory, KEY) == SETTINGS


def test_directory_and_file_are_private(directory: Path) -> None:
    assert (directory.stat().st_mode & 0o7777, entry(directory).stat().st_mode & 0o7777) == (0o700, 0o600)


def test_another_key_is_not_found(directory: Path) -> None:
    assert cache.read(directory, "1" * 64) is None


def test_a_key_that_shares_the_files_name_is_not_found(directory: Path) -> None:
    assert cache.read(directory, KEY[:32] + "1" * 32) is None


def test_a_file_that_others_can_read_is_not_trusted(directory: Path) -> None:
    entry(directory).chmod(0o644)
    assert cache.read(directory, KEY) is None


def test_a_directory_that_others_can_enter_is_not_trusted(directory: Path) -> None:
    directory.chmod(0o755)
    assert cache.read(directory, KEY) is None


def test_a_foreign_owners_file_is_not_trusted(directory: Path) -> None:
    os.chown(entry(directory), 12345, 12345)
    assert cache.read(directory, KEY) is None


def test_a_foreign_owners_directory_is_not_trusted(directory: Path) -> None:
    os.chown(directory, 12345, 12345)
    assert cache.read(directory, KEY) is None


def test_a_symlink_is_not_followed(directory: Path, tmp_path: Path) -> None:
    target = entry(directory).rename(tmp_path / "elsewhere")
    (directory / "config-00000000000000000000000000000000").symlink_to(target)
    assert cache.read(directory, KEY) is None


def test_a_fifo_does_not_block_the_reader(directory: Path) -> None:
    path = entry(directory)
    path.unlink()
    os.mkfifo(path, 0o600)
    assert cache.read(directory, KEY) is None


def test_a_directory_in_the_files_place_counts_as_absent(directory: Path) -> None:
    path = entry(directory)
    path.unlink()
    path.mkdir(mode=0o600)
    assert cache.read(directory, KEY) is None
    cache.write(directory, KEY, SETTINGS)
    assert path.is_dir()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\xff",
        json.dumps({"key": KEY}),
        json.dumps({"key": KEY, "settings": []}),
        json.dumps({"key": KEY, "settings": {"log": {"level": "debug"}}}),
        json.dumps({"key": KEY, "settings": {name: {"x": 1} for name in ("hypervisor", "log")}}),
        "[" * 50_000,
    ],
)
def test_content_that_is_not_ours_counts_as_absent(directory: Path, content: str) -> None:
    entry(directory).write_text(content, encoding="latin-1")
    assert cache.read(directory, KEY) is None


def test_a_run_root_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    cache.write(tmp_path / "run" / "cache", KEY, SETTINGS)
    assert not (tmp_path / "run").exists()


def test_only_the_newest_files_are_kept(directory: Path) -> None:
    for number in range(1, 40):
        cache.write(directory, f"{number:032x}" + "0" * 32, SETTINGS)
    assert len(list(directory.iterdir())) == 32
    assert cache.read(directory, f"{39:032x}" + "0" * 32) == SETTINGS


def test_a_changed_source_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    roots = Roots(tmp_path / "run", tmp_path / "data")
    path = tmp_path / "c.toml"
    path.write_text("[log]\nlevel = 'debug'\n")
    assert load(roots, config_file=str(path)).log.level == "debug"
    path.write_text("[log]\nlevel = 'error'\n")
    assert load(roots, config_file=str(path)).log.level == "error"
