"""Random config.json files, valid and broken, given to crun on this machine and to ours: same acceptance.

What differs is listed here and justified in docs/conformance.md.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.harness import conforming
from vmsandbox.errors import InvalidBundleError, UnsupportedError
from vmsandbox.oci import bundle, translate

if TYPE_CHECKING:
    from collections.abc import Iterator

#: what is refused although crun takes it, by what is said of it
STRICTER = (
    # crun reads what it can of a member with another type, and leaves the rest out.
    r"' should be (a valid (string|integer|boolean|array)|an object|greater than or equal to|less than or equal to)",
    r"' (should match pattern|should be '|has to be an absolute path|is missing)",
    # Documents that say too little: crun makes something up.
    r"'process.args' is empty",
    r"has no major or minor number",
    r"'mounts\[\d+\]\.type' is '.*', which cannot be mounted",
    # Namespaces of the host that a virtual machine cannot share.
    r"'linux.namespaces' has no (mount|network|pid|ipc) namespace",
)
#: what crun refuses as well, but only the guest's crun finds, so that the command says it later
LATER = (
    r"no 'mounts' block specified",
    r"write to /proc/sys/",
    r"capset: Operation not permitted",
    r"open executable|executable file",
    r"invalid mount type",
    r"^mount `.*` to `.*`: (No such device|Invalid argument)",
)
RELAXED = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


class Place:
    """A root with the probe, what mounts are of, and crun."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.rootfs = conforming.prepare_rootfs(scratch / "root")
        self.shared = conforming.prepare_shared(scratch / "shared")
        self.control = conforming.Control(scratch)
        self._numbers = itertools.count()

    def bundle(self, spec: dict[str, Any] | bytes) -> tuple[str, Path]:
        """A new id, and a bundle that is always at the same place."""
        return f"x{next(self._numbers)}", conforming.written(self.scratch / "bundle", spec, self.rootfs)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as scratch:
        made = Place(Path(scratch))
        yield made
        made.control.close()


# ---------------------------------------------------------------- acceptance


def complaint(directory: Path) -> str | None:
    """What is said of a bundle before anything is done with it."""
    try:
        translate.translated(bundle.load(directory), kind="single", cache=None)
    except (InvalidBundleError, UnsupportedError) as error:
        return str(error)
    return None


def check_acceptance(place: Place, spec: dict[str, Any] | bytes, what: str) -> None:
    container_id, directory = place.bundle(spec)
    ours = complaint(directory)
    theirs, said = place.control.accepts(directory, container_id)
    if ours is None:
        assert theirs or any(re.search(each, said) for each in LATER), (what, said)
    elif theirs:
        assert any(re.search(each, ours) for each in STRICTER), (what, ours)


def _accepting(examples: int) -> Any:
    @seed(12)
    @settings(max_examples=examples, **RELAXED)
    @given(data=st.data())
    def run(place: Place, data: st.DataObject) -> None:
        spec, what = data.draw(conforming.damaged(shared=place.shared))
        check_acceptance(place, spec, what)

    return run


def test_what_crun_accepts_is_accepted(place: Place) -> None:
    """Whole documents: none of them may be complained of."""

    @seed(11)
    @settings(max_examples=40, **RELAXED)
    @given(spec=conforming.documents(shared=place.shared, args=("true",)))
    def run(spec: dict[str, Any]) -> None:
        container_id, directory = place.bundle(spec)
        assert complaint(directory) is None
        assert place.control.accepts(directory, container_id) == (True, "")

    run()


def test_what_is_broken_is_refused_by_both_or_for_a_reason(place: Place) -> None:
    _accepting(60)(place)


@pytest.mark.long
def test_what_is_broken_is_refused_by_both_or_for_a_reason_at_length(place: Place) -> None:
    _accepting(3000)(place)
