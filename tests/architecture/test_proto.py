"""The generated code is that of agent.proto."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("agent_pb2.py", "agent_pb2.pyi", "agent_pb2_grpc.py")


def test_the_generated_code_is_fresh(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([ROOT / "scripts/gen-proto", tmp_path], check=True, env=environment)
    for name in GENERATED:
        committed = ROOT / "agent/vmsandbox_protocol" / name
        assert (tmp_path / "vmsandbox_protocol" / name).read_bytes() == committed.read_bytes(), "run scripts/gen-proto"
