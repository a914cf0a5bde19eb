"""What a supervisor imports before QEMU runs is time that every start waits for."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: imported while the guest starts, or only by pods that need them
LATE = ("grpc", "pydantic", "pyroute2", "qemu", "psutil")


@pytest.mark.parametrize(
    "module", ["main", "control", "service", "sandbox", "creation", "container", "template", "network", "shares"]
)
def test_a_supervisor_starts_without_heavy_packages(module: str) -> None:
    code = f"import sys, vmsandbox.supervisor.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [package for package in LATE if package in loaded]
