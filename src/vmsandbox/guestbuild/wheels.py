"""The Python libraries of the guest image: wheels pinned by the project's lock file, for the image's Python.

The image's Python is the distribution's and has nothing to do with the one that runs this.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.errors import NotFoundError
from vmsandbox.guestbuild.steps import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmsandbox.guestbuild.steps import Steps

PYTHON = "3.11"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_REQUIREMENT = re.compile(r"^(?P<name>[a-zA-Z0-9_.-]+)==(?P<version>\S+)")


@dataclass(frozen=True)
class Pin:
    """One requirement of the lock file with its hashes, as the lock file has it."""

    name: str
    version: str
    text: str


def lock_file() -> Path:
    """The project's lock file, in a checkout or in an installed package."""
    package = Path(__file__).resolve().parents[1]
    for path in (package.parents[1] / "requirements.lock", package / "requirements.lock"):
        if path.exists():
            return path
    raise NotFoundError("'requirements.lock' is neither in the checkout nor in the installed package")


def pins(lock: str, names: Iterable[str]) -> list[Pin]:
    """The entries of these projects in a lock file's text; raises BuildError if one is missing or has no hash."""
    entries: dict[str, Pin] = {}
    for text in re.split(r"\n(?=\S)", lock):
        match = _REQUIREMENT.match(text)
        if match:
            entries[match["name"]] = Pin(match["name"], match["version"], text.strip())
    found = []
    for name in names:
        pin = entries.get(name)
        if pin is None or "--hash=" not in pin.text:
            raise BuildError(f"the lock file does not pin '{name}' by hash: run 'scripts/lock'")
        found.append(pin)
    return found


def fetch(wanted: list[Pin], cache: Path, steps: Steps) -> list[Path]:
    """The wheels of these pins, downloaded and checked by pip unless that was done before."""
    digest = hashlib.sha256("\n".join([PYTHON, *PLATFORMS, *(pin.text for pin in wanted)]).encode()).hexdigest()
    directory = cache / f"wheels-{digest[:16]}"
    if not directory.exists():
        temporary = directory.with_suffix(".new")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        requirements = temporary / "requirements.txt"
        requirements.write_text("\n".join(pin.text for pin in wanted) + "\n")
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        steps.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
             "--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", *platforms,
             "--require-hashes", f"--requirement={requirements}", f"--dest={temporary}"],
        )  # fmt: skip
        temporary.rename(directory)
    return sorted(directory.glob("*.whl"))


def extract(wheels: Iterable[Path], directory: Path) -> None:
    """Unpack the packages in wheels; nothing else that a wheel may hold (scripts, metadata) is taken."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                top = name.split("/", 1)[0]
                if not top.endswith((".dist-info", ".data")):
                    archive.extract(name, directory)
