"""After all that engines were asked for, the machine has what it had before."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.harness.engines import Engines

#: seconds for what has ended to be gone
TIMEOUT = 60.0


def test_the_machine_is_as_it_was_before_the_first_container(docker_session: Engines) -> None:
    """Run last of the runtime's tests: processes, namespaces, mounts, sockets, interfaces, cgroups, loops and files."""
    engines = docker_session
    done = engines.podman("run", "--rm", "--runtime", "vmsandbox", "localhost/box:1", "echo", "there")
    assert done.stdout == "there\n", done
    engines.end_nurseries()
    deadline = time.monotonic() + TIMEOUT
    while (left := engines.added()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == [], "\n".join(left)
