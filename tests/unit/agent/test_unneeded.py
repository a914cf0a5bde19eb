"""What the agent never uses is not imported at its start, and is the real thing for whoever uses it after all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import vmsandbox_agent

AGENT = Path(vmsandbox_agent.__file__).parent.parent


def printed(code: str) -> str:
    prelude = "from vmsandbox_agent import unneeded; unneeded.postpone(); "
    return subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, check=True, cwd=AGENT
    ).stdout.strip()


def test_the_server_starts_without_what_it_does_not_use() -> None:
    code = "from vmsandbox_agent import server, service; import sys; print(*sys.modules)"
    imported = set(printed(code).split())
    assert "grpc" in imported
    assert not {"asyncio.base_events", "grpc.aio._server", "google.protobuf.internal.decoder"} & imported


def test_what_was_postponed_is_the_real_thing_for_who_uses_it() -> None:
    code = """
import grpc, asyncio
async def three(): return 3
print(asyncio.run(three()), grpc.aio.server.__name__, isinstance(grpc.aio.AioRpcError, type))
import sys
print(sys.modules['asyncio'].run is asyncio.run)
"""
    assert printed("exec('''" + code + "''')").split() == ["3", "server", "True", "True"]


def test_submodules_of_what_was_postponed_can_be_imported() -> None:
    assert printed("import asyncio.events; from asyncio import tasks; print(tasks.Task is asyncio.Task)") == "True"


def test_a_missing_attribute_is_missing() -> None:
    assert printed("import asyncio; print(hasattr(asyncio, 'nothing'))") == "False"
