"""Who keeps a machine that pods are forked from: there is one, and it leaves nothing."""

from __future__ import annotations

import fcntl
import os
import signal
from typing import TYPE_CHECKING

import pytest

from vmsandbox import locks
from vmsandbox.paths import Roots
from vmsandbox.supervisor import keeping, parents

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def wanted(tmp_path: Path) -> parents.Wish:
    return parents.Wish(
        data_root=str(tmp_path / "data"),
        config_file=None,
        key="ab" * 16,
        implicit=True,
        shareable=False,
        shared_fs=None,
        accel=None,
    )


@pytest.fixture
def place(tmp_path: Path, wanted: parents.Wish) -> Path:
    (tmp_path / "run").mkdir()
    return parents.place(Roots(tmp_path / "run", wanted.data_root), wanted.key, shareable=False).directory


def test_a_keeper_that_is_told_to_end_before_it_listens_leaves_nothing(
    tmp_path: Path, wanted: parents.Wish, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "set_title", lambda _title: None)
    monkeypatch.setattr(keeping, "_run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        # Which is no reason not to try again.
        assert keeping.keep(str(tmp_path / "run"), wanted)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert place.parent.is_dir()
    assert not place.exists()


def test_where_there_is_a_keeper_another_one_does_nothing(
    tmp_path: Path, wanted: parents.Wish, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_run", lambda *_: pytest.fail("there are two"))
    place.mkdir(parents=True)
    (place / "offer.json").touch()
    with locks.opened(place / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keeping.keep(str(tmp_path / "run"), wanted)
    assert (place / "offer.json").exists()
