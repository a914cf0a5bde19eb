"""buildah over our runtime, with crun as the control that tells whose fault a failure is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.engines import BOX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.engines import Engines


@pytest.fixture
def working(engines: Engines) -> Iterator[str]:
    """A container that is being built."""
    name = engines.ok("buildah", "from", BOX).strip()
    yield name
    engines.ok("buildah", "rm", name)


@pytest.mark.parametrize("name", ["crun", "vmsandbox"])
def test_buildah_runs_what_builds_an_image(engines: Engines, working: str, name: str) -> None:
    program = str(engines.runtime) if name == "vmsandbox" else "/usr/bin/crun"
    run = ("buildah", "run", "--isolation", "oci", "--runtime", program)
    done = engines(*run, "--network", "none", "--user", "alice", working, "--", "sh", "-c", "id -u; exit 3")
    assert (done.code, done.stdout) == (3, "1000\n"), (done, engines.logs())
    # With a network, which buildah sets up between create and start.
    script = "ip -o -4 addr show eth0; echo made > /made"
    assert " 10.88.8." in engines.ok(*run, working, "--", "sh", "-c", script)
    assert engines(*run, "--network", "none", working, "--", "nosuch").code != 0
    engines.ok("buildah", "commit", "-q", working, "localhost/built:1")
    built = ("podman", "run", "--rm", "--network", "none", "--runtime", name, "localhost/built:1")
    assert engines.ok(*built, "cat", "/made") == "made\n"
    engines.ok("podman", "rmi", "localhost/built:1")
