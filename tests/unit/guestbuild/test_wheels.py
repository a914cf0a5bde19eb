"""The guest's Python libraries are those of the lock file, by hash."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

import pytest

from vmsandbox.guestbuild import image, wheels
from vmsandbox.guestbuild.steps import BuildError

if TYPE_CHECKING:
    from pathlib import Path

LOCK = """\
one==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
one-more==2.0 \\
    --hash=sha256:cc
bare==3.0
"""


def test_pins_are_read_with_their_hashes() -> None:
    (pin,) = wheels.pins(LOCK, ["one"])
    assert (pin.name, pin.version) == ("one", "1.0")
    assert pin.text == "one==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb"


@pytest.mark.parametrize("name", ["missing", "bare"])
def test_what_is_not_pinned_by_hash_is_refused(name: str) -> None:
    with pytest.raises(BuildError, match=f"'{name}'"):
        wheels.pins(LOCK, [name])


def test_the_projects_lock_file_pins_what_the_image_takes() -> None:
    pins = wheels.pins(wheels.lock_file().read_text(), image.WHEELS)
    assert [pin.name for pin in pins] == list(image.WHEELS)


def test_only_the_packages_of_a_wheel_are_unpacked(tmp_path: Path) -> None:
    wheel = tmp_path / "one-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("one/__init__.py", "module.py", "one-1.0.dist-info/RECORD", "one-1.0.data/scripts/one"):
            archive.writestr(name, "")
    wheels.extract([wheel], tmp_path / "out")
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.py"))
    assert found == ["module.py", "one/__init__.py"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["module.py", "one"]
