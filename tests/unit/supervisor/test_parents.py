"""Machines that pods are forked from: whose they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsandbox.paths import Roots
from vmsandbox.supervisor import parents

if TYPE_CHECKING:
    from pathlib import Path

KEY = "ab" * 16


def name(run_root: Path, key: str = KEY, *, shareable: bool = False) -> str:
    return parents.place(Roots(run_root, run_root / "data"), key, shareable=shareable).directory.name


def test_each_template_kind_and_run_root_has_a_parent_of_its_own_by_whose_name_processes_are_found(
    tmp_path: Path,
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert name(one) == name(one)
    assert len({name(one), name(one, KEY[::-1]), name(one, shareable=True), name(other)}) == 4


def test_a_run_root_is_the_same_by_every_path(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "link").symlink_to("one")
    assert name(tmp_path / "one") == name(tmp_path / "link")
