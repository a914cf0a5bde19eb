"""`vmsandbox guest` shows and removes what is in the store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from vmsandbox.admin import guest
from vmsandbox.errors import InvalidStateError, NotFoundError
from vmsandbox.guestbuild import store
from vmsandbox.paths import Roots

if TYPE_CHECKING:
    from pathlib import Path

KEY = "0123456789abcdef" * 2
OTHER = "fedcba9876543210" * 2


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    made = Roots(tmp_path / "run", tmp_path / "data")
    with store.locked(made):
        for key in (KEY, OTHER):
            with store.staging(made.guests / key) as directory:
                (directory / "vmlinux").write_bytes(b"kernel")
                (directory / "root.erofs").write_bytes(b"image of the guest")
                store.write_manifest(
                    directory,
                    flavour="packaged",
                    files={"kernel": "vmlinux", "image": "root.erofs"},
                    cmdline=["quiet"],
                    release="6.1.0",
                    versions={"packages": {"crun": "1.8.1"}},
                )
        store.select(made, "packaged", KEY)
    return made


def test_inspect_names_the_files_in_use(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    assert guest.main(["inspect", "--format", "json"], roots) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["key"] == KEY
    assert facts["kernel"]["path"] == str(roots.guests / KEY / "vmlinux")
    assert facts["image"]["path"] == str(roots.guests / KEY / "root.erofs")
    assert facts["image"]["size"] == 18
    assert facts["initrd"] is None
    assert facts["cmdline"] == ["quiet"]
    assert facts["current"] is True
    assert facts["versions"] == {"packages": {"crun": "1.8.1"}}


def test_inspect_takes_the_beginning_of_a_key(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    assert guest.main(["inspect", "fed"], roots) == 0
    shown = capsys.readouterr().out
    assert OTHER in shown
    assert "crun     1.8.1" in shown


@pytest.mark.parametrize("argv", [["inspect", "77"], ["inspect", "--kernel", "tuned"], ["rm", "77"]])
def test_what_does_not_exist_is_not_found(roots: Roots, argv: list[str]) -> None:
    with pytest.raises(NotFoundError):
        guest.main(argv, roots)


def test_ls_marks_the_one_in_use(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    assert guest.main(["ls"], roots) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["KEY", "KERNEL", "RELEASE", "SIZE", "BUILT", "IN", "USE"]
    assert {row.split()[0]: row.split()[-1] == "yes" for row in rows} == {KEY[:12]: True, OTHER[:12]: False}


def test_a_guest_in_use_is_removed_by_force_only(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidStateError, match="it is the one that new pods boot: use '--force',"):
        guest.main(["rm", OTHER[:4], KEY], roots)
    assert len(store.entries(roots)) == 2
    assert guest.main(["rm", OTHER[:4]], roots) == 0
    assert guest.main(["rm", "--force", KEY], roots) == 0
    assert capsys.readouterr().out == f"{OTHER}\n{KEY}\n"
    assert store.entries(roots) == []


def test_unused_guests_are_removed_at_once(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    assert guest.main(["rm", "--unused"], roots) == 0
    assert capsys.readouterr().out == f"{OTHER}\n"
    assert [entry.key for entry in store.entries(roots)] == [KEY]
