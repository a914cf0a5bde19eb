"""The library stands alone: installed by itself it works, and pulls in nothing but qemu.qmp."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the build tool that is installed, so no network is needed."""
    out = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(argv, check=True, cwd=ROOT / "hypervisor", capture_output=True)
    return next(out.glob("*.whl"))


def test_its_wheel_needs_only_qemu_qmp(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        needs = [
            line.partition(": ")[2]
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist:") and "extra ==" not in line
        ]
    assert needs == ["qemu-qmp>=0.0.6"]
    assert "vmsandbox_hypervisor/py.typed" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"vmsandbox_hypervisor"}


@pytest.fixture
def alone(wheel: Path, tmp_path: Path) -> Path:
    """A directory to import from, in which the library is as it is installed."""
    made = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(made)
    return made


EXAMPLES = re.findall(r"^```python\n(.*?)^```$", (ROOT / "hypervisor/README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_s_machine_boots_by_the_library_alone(alone: Path) -> None:
    machine, _ = EXAMPLES
    argv = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(alone)!r})\n{machine}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    first, second, third = done.stdout.splitlines()
    assert (first, second[:8], third) == ("booted: Linux", "disk at ", "its content: hello from the host")


def test_the_readme_s_test_passes_by_the_library_alone(alone: Path, tmp_path: Path) -> None:
    _, test = EXAMPLES
    (tmp_path / "test_disk.py").write_text(test)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(alone)}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_it_imports_without_the_rest(wheel: Path, tmp_path: Path) -> None:
    import qemu

    (tmp_path / "qemu").symlink_to(next(iter(qemu.__path__)))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import vmsandbox_hypervisor.qemu.vm, vmsandbox_hypervisor.qemu.machine, vmsandbox_hypervisor.qemu.template\n"
        "print([name for name in sys.modules if name.startswith('vmsandbox') and name[9:12] != '_hy'])"
    )
    argv = [sys.executable, "-I", "-S", "-c", script, str(tmp_path)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
