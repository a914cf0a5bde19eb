"""Stages of the end-to-end tests: a guest, an image, the command, a running container."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import parents
from tests.harness.boxes import add_program, make_rootfs
from tests.harness.cli import Cli

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def box(data_root: Path) -> str:
    """The name of an image with busybox in it."""
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as scratch:
        rootfs = make_rootfs(Path(scratch, "rootfs"))
        cli = Cli(Path(scratch, "run"), data_root)
        cli.ok("image", "import", f"rootfs:{rootfs}", "--name", "box", "--cmd", "/bin/sh")
    return "box"


@pytest.fixture(scope="session")
def tls(data_root: Path) -> str:
    """The name of an image with openssl, and with a clock that shows nanoseconds."""
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as scratch:
        rootfs = make_rootfs(Path(scratch, "rootfs"))
        for program in ("/usr/bin/openssl", "/bin/date"):
            add_program(rootfs, Path(program))
        Cli(Path(scratch, "run"), data_root).ok("image", "import", f"rootfs:{rootfs}", "--name", "tls", "--cmd", "sh")
    return "tls"


@pytest.fixture(scope="session")
def pod_template(data_root: Path) -> None:
    """The template of explicit pods, which have more slots than others."""
    with tempfile.TemporaryDirectory(prefix="vs-") as run:
        Cli(Path(run), data_root).ok("template", "build", "--pod", timeout=300)


@pytest.fixture(scope="module")
def boot(request: pytest.FixtureRequest) -> str:
    """How pods come up: as every test's dimension, see `pytest_generate_tests`."""
    return str(getattr(request, "param", "clone"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Pods of a test are clones of a template; forked and booted cold too in long runs, or always if it is marked."""
    if "boot" in metafunc.fixturenames and not metafunc.definition.get_closest_marker("cloned"):
        marks = () if metafunc.definition.get_closest_marker("all_ways") else (pytest.mark.long,)
        others = [pytest.param(way, marks=marks) for way in ("fork", "cold")]
        metafunc.parametrize("boot", ["clone", *others], indirect=True, scope="module")


@pytest.fixture(scope="session")
def standing(data_root: Path, box: str, pod_template: None) -> Iterator[parents.Standing]:
    """Machines of every kind that pods are forked from."""
    with parents.standing(data_root, box) as made:
        yield made


@pytest.fixture(scope="module")
def cli_at(request: pytest.FixtureRequest, data_root: Path, boot: str) -> Callable[[Path], Cli]:
    """The command, whose pods come up as they are to, by its run root."""
    if boot == "fork":
        # Not with a test: what is started then has to end with it.
        standing: parents.Standing = request.getfixturevalue("standing")
        return standing.cli
    return lambda run_root: Cli(run_root, data_root, boot=boot)


@pytest.fixture
def cli(cli_at: Callable[[Path], Cli]) -> Iterator[Cli]:
    """The command with a run root of its own; afterwards nothing of it may be left."""
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        made = cli_at(Path(scratch))
        yield made
        made.remove_all()
        made("gc", "-q")
        assert made.leftovers() == []


@pytest.fixture(scope="module")
def pod(cli_at: Callable[[Path], Cli], box: str) -> Iterator[tuple[Cli, str]]:
    """A running container that a module's tests share; they only exec in it."""
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        made = cli_at(Path(scratch))
        container = made.ok("run", "-d", "--name", "shared", box, "sleep", "100000").strip()
        yield made, container
        made.remove_all()
        assert made.leftovers() == []
