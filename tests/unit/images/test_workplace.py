"""Workplaces: alone for one key, gone afterwards, and rid of what killed imports left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from vmsandbox.resources.images.workplace import clean, working

if TYPE_CHECKING:
    from pathlib import Path


def test_a_workplace_is_empty_and_gone_afterwards(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with working(work, "key") as place:
        assert os.listdir(place.directory) == []
        (place.directory / "deep").mkdir()
        (place.directory / "deep" / "file").write_bytes(b"x")
    assert os.listdir(work) == []


def test_a_failure_leaves_nothing_either(tmp_path: Path) -> None:
    def fail() -> None:
        with working(tmp_path, "key") as place:
            (place.directory / "file").write_bytes(b"x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == []


def test_workplaces_of_different_keys_exist_at_once(tmp_path: Path) -> None:
    with working(tmp_path, "one") as one, working(tmp_path, "two") as two, working(tmp_path) as three:
        assert len({one.directory, two.directory, three.directory}) == 3
        assert clean(tmp_path) == []
        assert one.directory.exists()


def test_the_second_of_two_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    waiting, entered = threading.Event(), threading.Event()

    def second() -> None:
        with working(tmp_path, "key", waiting=waiting.set) as place:
            assert os.listdir(place.directory) == []
            entered.set()

    with working(tmp_path, "key") as place:
        (place.directory / "file").write_bytes(b"x")
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        assert not entered.is_set()
    thread.join(10)
    assert entered.is_set()
    assert os.listdir(tmp_path) == []


def test_many_at_once_are_alone_one_after_the_other(tmp_path: Path) -> None:
    inside = 0
    most = 0
    rounds = 0

    def enter() -> None:
        nonlocal inside, most, rounds
        for _ in range(20):
            with working(tmp_path, "key"):
                inside += 1
                most = max(most, inside)
                inside -= 1
                rounds += 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, rounds) == (1, 80)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from vmsandbox.resources.images.workplace import working\n"
        "with working(Path(sys.argv[1]), 'killed') as place:\n"
        "    (place.directory / 'file').write_bytes(b'x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["killed", "killed.lock"]
    with working(tmp_path, "other"):
        assert sorted(os.listdir(tmp_path)) == ["other", "other.lock"]


def test_rubbish_without_a_lock_is_removed(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("/etc")
    assert sorted(clean(tmp_path)) == ["directory", "file", "link"]
    assert os.listdir(tmp_path) == []
    assert os.path.exists("/etc/passwd")


def test_nothing_to_clean_is_no_error(tmp_path: Path) -> None:
    assert clean(tmp_path / "nowhere") == []
