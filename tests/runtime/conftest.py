"""Stages of the runtime's tests: a bundle, engines in namespaces."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import daemons
from tests.harness.boxes import make_rootfs
from tests.harness.bundles import Runtime
from tests.harness.engines import Engines

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What compares the machine with what it was comes when all else has had its turn."""
    items.sort(key=lambda item: item.path.name == "test_nothing_left.py")


@pytest.fixture(scope="session")
def box_rootfs() -> Iterator[Path]:
    """A root file system that tests only read."""
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as scratch:
        yield make_rootfs(Path(scratch, "rootfs"))


@pytest.fixture
def runtime(data_root: Path) -> Iterator[Runtime]:
    """The command with a root of its own; afterwards nothing of it may be left."""
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        made = Runtime(Path(scratch), data_root)
        yield made
        made.remove_all()
        assert made.leftovers() == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A disk of the host: a loop device."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"first\n".ljust(8 << 20, b"\0"))
    device = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, check=True, text=True).stdout
    yield device.strip()
    subprocess.run(["losetup", "-d", device.strip()], check=True)


@pytest.fixture(scope="session")
def engines_session(data_root: Path) -> Iterator[Engines]:
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as scratch:
        made = Engines(Path(scratch), data_root)
        try:
            made.start()
            made.import_images()
            yield made
        finally:
            made.stop()


@pytest.fixture
def engines(engines_session: Engines) -> Iterator[Engines]:
    """Namespaces with podman; afterwards nothing of our runtime may be left."""
    yield engines_session
    engines_session("podman", "rm", "-af", "-t", "0")
    engines_session("podman", "pod", "rm", "-af", "-t", "0")
    assert engines_session.leftovers() == []


@pytest.fixture(scope="session")
def containerd_session(engines_session: Engines) -> Engines:
    daemons.start_containerd(engines_session)
    return engines_session


@pytest.fixture
def containerd(containerd_session: Engines) -> Iterator[Engines]:
    """The engines with containerd; afterwards nothing of our runtime may be left."""
    yield containerd_session
    assert containerd_session.leftovers() == []


@pytest.fixture(scope="session")
def docker_session(containerd_session: Engines) -> Engines:
    daemons.start_docker(containerd_session)
    return containerd_session


@pytest.fixture
def docker(docker_session: Engines) -> Iterator[Engines]:
    """The engines with docker; afterwards nothing of our runtime may be left."""
    yield docker_session
    left = docker_session.ok("docker", "ps", "-aq").split()
    if left:
        docker_session("docker", "rm", "-f", *left)
    assert docker_session.leftovers() == []
