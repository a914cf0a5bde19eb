"""Which tests may run beside each other, in two processes.

The tests of one file share what is dear to make, so a file stays in one process.  All tests with real engines share
one set of daemons and look at the whole machine for what these have left: they stay in one process too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest
    from xdist.scheduler import LoadScopeScheduling

#: files of tests/runtime that use engines, as tests/architecture/test_groups.py sees to
ENGINES = ("buildah", "cri", "ctr", "docker", "engine_networks", "nothing_left", "podman")
_ENGINE_FILES = {f"tests/runtime/test_{name}.py" for name in ENGINES}


def group_of(nodeid: str) -> str:
    """What a test shares a process with."""
    path = nodeid.partition("::")[0]
    return "engines" if path in _ENGINE_FILES else path


def scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Gives groups to processes in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    # Small files come last, where they fill what is left of the processes' time.
    config.option.loadscopereorder = False
    return ByGroup(config, log)
