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
    code = "from vmsandbox_agent import link, main, network, rpc, service, storage; import sys; print(*sys.modules)"
    imported = set(printed(code).split())
    assert {"h2.connection", "google._upb._message"} <= imported
    never = {"ast", "asyncio", "google.protobuf.internal.decoder", "grpc", "ipaddress", "locale", "logging", "socket"}
    assert not never & imported


def test_what_was_postponed_is_the_real_thing_for_who_uses_it() -> None:
    code = """
import inspect, sys
print(inspect.signature(lambda x: x), sys.modules['inspect'].signature is inspect.signature)
"""
    assert printed("exec('''" + code + "''')").split() == ["(x)", "True"]


def test_a_function_that_was_taken_early_is_the_real_one_when_it_is_called() -> None:
    code = (
        "from pathlib import Path; print('ipaddress' in sys.modules, Path('/a b').as_uri(), 'ipaddress' in sys.modules)"
    )
    assert printed(f"import sys; {code}") == "False file:///a%20b True"


def test_only_what_is_imported_lightly_is_light() -> None:
    code = """
from vmsandbox_agent import http2
import dataclasses, logging, h2.events
plain = dataclasses.make_dataclass('Plain', ['a'])
print(logging.getLogger('x').name, plain(1) == plain(1), h2.events.PriorityUpdated() == h2.events.PriorityUpdated())
"""
    assert printed("exec('''" + code + "''')").split() == ["x", "True", "False"]


def test_a_missing_attribute_is_missing() -> None:
    assert printed("import inspect; print(hasattr(inspect, 'nothing'))") == "False"
