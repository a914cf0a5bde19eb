"""What a supervisor imports before QEMU runs is time that every start waits for."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: imported while the guest starts, or only by pods that need them
LATE = ("grpc", "pydantic", "pyroute2", "qemu", "psutil")


#: what verbs of `vmsandbox-runtime` have no need for, and each of them costs a millisecond or more
DEAR = (
    "json",
    "re",
    "enum",
    "functools",
    "collections",
    "socket",
    "selectors",
    "hashlib",
    "contextlib",
    "dataclasses",
    "pathlib",
    "subprocess",
    "typing",
    "tempfile",
)


@pytest.mark.parametrize(
    "verbs",
    ["looking", "execution", "creation, vmsandbox.oci.annotations", "lifecycle, vmsandbox.cli.removal"],
)
def test_an_engine_waits_for_few_imports(verbs: str) -> None:
    code = f"import sys, vmsandbox.cli.runtime.main, vmsandbox.cli.runtime.{verbs}; print(*sys.modules)"
    argv = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"]
    loaded = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    assert not [module for module in DEAR if module in loaded]


def test_ps_loads_neither_json_nor_regular_expressions() -> None:
    code = "import sys, vmsandbox.cli.main, vmsandbox.cli.verbs.ps; print(*sys.modules)"
    argv = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"]
    loaded = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    assert not {"json", "re", "argparse"} & set(loaded)


@pytest.mark.parametrize(
    "module", ["main", "control", "service", "sandbox", "creation", "container", "template", "network", "shares"]
)
def test_a_supervisor_starts_without_heavy_packages(module: str) -> None:
    code = f"import sys, vmsandbox.supervisor.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [package for package in LATE if package in loaded]
