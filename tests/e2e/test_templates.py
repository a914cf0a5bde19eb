"""Pods as clones of a template: each a machine of its own, and a template that fails is never worse than none."""

from __future__ import annotations

import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import identities, parents
from tests.harness.cli import Cli, awaited, kill

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cloned

CLONES = 8


@pytest.fixture
def apart(data_root: Path, box: str) -> Iterator[Cli]:
    """A command whose templates are a copy of the session's, to be damaged."""
    with (
        tempfile.TemporaryDirectory(prefix="vs-") as run,
        tempfile.TemporaryDirectory(prefix="vmsandbox-data-") as data,
    ):
        for name in ("guest", "images"):
            Path(data, name).symlink_to(data_root / name)
        cli = Cli(Path(run), data_root)
        key = cli("template", "build").stderr.split()[1]
        parents.copy_templates(data_root, Path(data), key)
        cli = Cli(Path(run), Path(data))
        yield cli
        cli.remove_all()
        cli("gc", "-q")
        assert cli.leftovers() == []


def template_of(cli: Cli) -> Path:
    """Where the one template is; that of explicit pods, which other tests may have caused, is not copied."""
    (row,) = json.loads(cli.ok("template", "ls", "--format", "json"))
    return Path(row["path"])


def boot_of(cli: Cli, name: str) -> str:
    return str(cli.inspect(name)["pod"]["boot"])


def test_eight_clones_at_once_are_eight_machines(cli: Cli, tls: str) -> None:
    names = [f"c{number}" for number in range(CLONES)]
    words = ("--template", "require", tls, "sleep", "1000")
    with ThreadPoolExecutor(CLONES) as pool:
        list(pool.map(lambda name: cli.ok("run", "-d", "--name", name, *words), names))
    identities.assert_all_differ(cli, names, facts=8)
    assert {boot_of(cli, name) for name in names} == {"template"}


def test_a_damaged_template_is_a_cold_boot_and_an_error_where_it_is_required(apart: Cli, box: str) -> None:
    damage(template_of(apart) / "state")
    refused = apart("run", "--rm", "--template", "require", box, "true")
    assert refused.code == 125
    assert "is damaged: 'vmsandbox template build' makes it again" in refused.stderr
    assert apart.leftovers() == []
    apart.ok("run", "-d", "--name", "cold", "--template", "auto", box, "sleep", "1000")
    assert boot_of(apart, "cold") == "cold"
    assert "is damaged" in supervisor_log(apart, "cold")


def test_a_clone_that_fails_is_a_cold_boot_and_an_error_where_it_is_required(apart: Cli, box: str) -> None:
    state = template_of(apart) / "state"
    damage(state)
    document = state.with_name("template.json")
    known = json.loads(document.read_text())
    known["files"]["state"] = [state.stat().st_size, state.stat().st_mtime_ns]
    document.write_text(json.dumps(known))
    refused = apart("run", "--rm", "--template", "require", box, "true")
    assert refused.code == 125
    assert "the template's clone failed" in refused.stderr
    assert apart.leftovers() == []
    apart.ok("run", "-d", "--name", "cold", "--template", "auto", box, "sleep", "1000")
    assert boot_of(apart, "cold") == "cold"
    assert "boots cold" in supervisor_log(apart, "cold")


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def supervisor_log(cli: Cli, name: str) -> str:
    return (cli.run_root / "s" / cli.inspect(name)["id"][:12] / "supervisor.log").read_text()


def test_a_template_s_file_holds_no_memory_that_was_free(apart: Cli) -> None:
    memory = (template_of(apart) / "memory").stat()
    assert memory.st_blocks * 512 < memory.st_size * 0.6


def test_a_template_may_go_while_its_clones_run(apart: Cli, box: str) -> None:
    apart.ok("run", "-d", "--name", "one", "--template", "require", box, "sleep", "1000")
    key = template_of(apart).name
    assert apart.ok("template", "rm", key[:8]) == f"{key}\n"
    assert apart.ok("exec", "one", "echo", "still here") == "still here\n"
    refused = apart("run", "--rm", "--template", "require", box, "true")
    assert refused.code == 125
    assert "vmsandbox template build" in refused.stderr


def test_two_builders_make_it_once_and_a_killed_one_leaves_nothing_that_is_used(apart: Cli) -> None:
    apart.ok("template", "rm", template_of(apart).name)
    killed = apart.popen("template", "build", stderr=subprocess.DEVNULL)
    staging = awaited(lambda: list((apart.data_root / "templates").glob(".staging-*/template")))
    kill(killed.pid)
    killed.wait()
    assert staging
    assert json.loads(apart.ok("template", "ls", "--format", "json")) == []
    with ThreadPoolExecutor(2) as pool:
        said = sorted(result.stderr for result in pool.map(lambda _: apart("template", "build", timeout=300), range(2)))
    assert "is there already" in said[0] or "is there already" in said[1]
    assert sum("made in" in text for text in said) == 1
    template_of(apart)
    apart.ok("gc", "-q")
    assert apart.processes() == []
    assert list((apart.data_root / "templates").glob(".staging-*")) == []


def test_the_end_of_a_template_s_machine_is_told_at_once(apart: Cli) -> None:
    building = apart.popen("template", "build", "--force", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    (machine,) = awaited(lambda: [each for each in apart.processes() if each.name().startswith("qemu")])
    machine.kill()
    said = building.communicate(timeout=30)[1].decode()
    assert (building.returncode, "was killed by SIGKILL" in said) == (1, True), said
    assert list((apart.data_root / "templates").glob(".staging-*")) == []
