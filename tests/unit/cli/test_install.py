"""`install` and `uninstall` write what engines read, and leave what users have as it is."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

CODE = "import sys; from vmsandbox.cli.runtime.main import main; sys.exit(main())"
#: what users may have, by engine: nothing, something, and something not in our hand
DOCKER = '{\n\t"bip": "10.0.0.1/24", "runtimes": {"crun": {"path": "/usr/bin/crun"}},\n\t"exec-opts": ["a=b"]}'
CONTAINERD = 'version = 2\n# mine\n[plugins."io.containerd.grpc.v1.cri"]\n  sandbox_image = "pause"'
OLD_CONTAINERD = '[plugins.cri]\n  sandbox_image = "pause"\n'


def run(verb: str, engine: str, file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", CODE, verb, engine, "--file", str(file), *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("engine", ["podman", "docker", "containerd"])
@pytest.mark.parametrize("user", [None, "theirs"])
def test_what_is_installed_is_removed_to_the_byte(tmp_path: Path, engine: str, user: str | None) -> None:
    file = tmp_path / "d" / "file"
    content = {"docker": DOCKER, "containerd": CONTAINERD}.get(engine) if user else None
    if content:
        file.parent.mkdir()
        file.write_text(content)
        file.chmod(0o640)
    shown = run("install", engine, file, "--binary", sys.executable, "--dry-run")
    assert shown.returncode == 0
    assert f"+++ {file}" in shown.stdout
    assert file.exists() == bool(content)
    for told in ("wrote", "nothing to change in"):
        done = run("install", engine, file, "--binary", sys.executable)
        assert (done.returncode, done.stderr) == (0, "")
        assert told in done.stdout
        assert sys.executable in file.read_text()
    if content:
        assert file.stat().st_mode & 0o777 == 0o640
    for _ in range(2):
        assert run("uninstall", engine, file).returncode == 0
        assert [*tmp_path.rglob("*")] == ([file.parent, file] if content else [file.parent])
        if content:
            assert file.read_text().rstrip("\n") == content.rstrip("\n")


def test_what_docker_had_stays_although_it_was_changed_since(tmp_path: Path) -> None:
    file = tmp_path / "daemon.json"
    file.write_text(DOCKER)
    run("install", "docker", file, "--binary", sys.executable)
    document = json.loads(file.read_text())
    assert document["runtimes"] == {"crun": {"path": "/usr/bin/crun"}, "vmsandbox": {"path": sys.executable}}
    assert document["exec-opts"] == ["a=b", "native.cgroupdriver=cgroupfs"]
    file.write_text(json.dumps({**document, "debug": True}))
    run("uninstall", "docker", file)
    assert json.loads(file.read_text()) == {**json.loads(DOCKER), "debug": True}


@pytest.mark.parametrize(("text", "plugin"), [(CONTAINERD, "io.containerd.grpc.v1.cri"), (OLD_CONTAINERD, "cri")])
def test_containerd_finds_the_runtime_where_its_version_looks(tmp_path: Path, text: str, plugin: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    run("install", "containerd", file, "--binary", sys.executable)
    cri = tomllib.loads(file.read_text())["plugins"][plugin]
    assert cri["sandbox_image"] == "pause"
    assert cri["containerd"]["runtimes"]["vmsandbox"]["options"]["BinaryName"] == sys.executable


@pytest.mark.parametrize(
    ("engine", "text", "message"),
    [
        ("docker", "{", "not valid JSON"),
        ("docker", "[]", "not a JSON object"),
        ("docker", '{"runtimes": 1}', "not a configuration of docker"),
        ("containerd", "x", "not valid TOML"),
        ("containerd", "version = 9", "is not known"),
        ("containerd", "version = 2\nplugins = {}", "already"),
        ("nosuch", "", "needs the name of an engine"),
    ],
)
def test_what_cannot_be_understood_is_not_touched(tmp_path: Path, engine: str, text: str, message: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    done = run("install", engine, file, "--binary", sys.executable)
    assert done.returncode == 1
    assert message in done.stderr
    assert (file.read_text(), [*tmp_path.iterdir()]) == (text, [file])


def test_a_program_that_is_not_there_is_not_written(tmp_path: Path) -> None:
    done = run("install", "docker", tmp_path / "file", "--binary", "/nosuch")
    assert "not a program that can be run" in done.stderr
    assert [*tmp_path.iterdir()] == []
