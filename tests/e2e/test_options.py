"""What options and the image's configuration make of a container."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.cli import Cli


def test_environment_directory_and_user_are_as_asked(cli: Cli, box: str) -> None:
    script = 'echo "$A|$B|$HOME|$(pwd)|$(id -un):$(id -gn)|$(id -G)|$HOSTNAME|$(hostname)"'
    output = cli.ok(
        *("run", "--rm", "-e", "A=1=2", "-e", "B", "-w", "/made/here", "-u", "alice", "--hostname", "boxy"),
        *(box, "sh", "-c", script),
        env={"B": "from the client", "PATH": "/usr/bin:/bin"},
    )
    assert output == "1=2|from the client|/home/alice|/made/here|alice:users|1000 10|boxy|boxy\n"


def test_a_read_only_container_cannot_write_but_to_its_tmpfs(cli: Cli, box: str) -> None:
    script = "touch /x || echo refused; touch /t/x && echo written; mount | grep ' /t '"
    result = cli("run", "--rm", "--read-only", "--tmpfs", "/t:size=1m", box, "sh", "-c", script)
    assert result.code == 0, result
    assert result.stdout.startswith("refused\nwritten\ntmpfs on /t")
    assert "size=1024k" in result.stdout


def test_the_entrypoint_is_replaced_and_the_command_with_it(cli: Cli, box: str) -> None:
    assert cli.ok("run", "--rm", "--entrypoint", "echo", box, "a", "b") == "a b\n"


def test_writes_go_to_the_containers_own_layer(cli: Cli, box: str) -> None:
    assert cli.ok("run", "--rm", box, "sh", "-c", "echo x > /etc/mine; cat /etc/mine") == "x\n"
    assert cli("run", "--rm", box, "cat", "/etc/mine").code == 1


@pytest.mark.all_ways
def test_cpus_are_what_nproc_shows_and_memory_what_can_be_had(cli: Cli, box: str) -> None:
    script = "nproc; cat /sys/fs/cgroup/memory.max; grep MemTotal /proc/meminfo"
    cpus, limit, total = cli.ok("run", "--rm", "--cpus", "2", "--memory", "300m", box, "sh", "-c", script).splitlines()
    assert (cpus, limit) == ("2", str(300 << 20))
    assert int(total.split()[1]) > 300 * 1024


def test_limits_of_the_command_line_hold_inside(cli: Cli, box: str) -> None:
    limits = ("--cpu-shares", "2048", "--cpuset-cpus", "1", "--pids-limit", "40", "--shm-size", "3m")
    ulimits = ("--ulimit", "nofile=123:456", "--ulimit", "core=0")
    script = (
        "cd /sys/fs/cgroup; cat cpu.weight cpuset.cpus.effective pids.max; ulimit -Sn; ulimit -Hn; ulimit -c;"
        "df -k /dev/shm | awk 'END { print $2 }'; grep Cpus_allowed_list /proc/self/status | cut -f2; nproc;"
        "for i in $(seq 50); do sleep 100 & done 2>/dev/null; echo unreached"
    )
    result = cli("run", "--rm", "--cpus", "2", *limits, *ulimits, box, "sh", "-c", script)
    weight, *seen = result.stdout.split()
    # Twice the default of 1024, as crun translates it to a weight.
    assert 70 <= int(weight) <= 80, result
    assert seen == ["1", "40", "123", "456", "0", str(3 << 10), "1", "1"], result


def test_memory_can_be_filled_to_nearly_its_limit(cli: Cli, box: str) -> None:
    script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=490 2>/dev/null && echo filled"
    assert cli.ok("run", "--rm", "-m", "512m", "--shm-size", "600m", box, "sh", "-c", script) == "filled\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cpus", "1000"], "cpus '1000' is more than a pod can have here"),
        (["--cpuset-cpus", "1000"], "cpuset_cpus '1000' names vCPU 1000, but the pod has 1 of them"),
        (["--memory", "90000g"], "sandbox.max_memory_mib"),
    ],
)
def test_what_can_only_be_had_in_part_is_refused(cli: Cli, box: str, words: list[str], said: str) -> None:
    refused = cli("run", "--rm", *words, box, "true")
    assert (refused.code, said in refused.stderr) == (125, True), refused


@pytest.mark.cloned  # where there is KVM, it has no template
def test_kvm_works_where_it_is_asked_for_or_the_reason_is_said(cli: Cli, box: str) -> None:
    result = cli("run", "--rm", "--accel", "kvm", box, "true")
    line = result.stderr.partition("\n")[0]
    works = json.loads(cli("check", "--format", "json").stdout)["accel"]["accel"] == "kvm"
    assert result.code == 0 if works else (result.code, line[:32]) == (125, "vmsandbox: KVM was asked for, but"[:32]), (
        result
    )


def test_more_memory_than_the_limit_is_killed_and_said(cli: Cli, box: str) -> None:
    script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=60"
    result = cli("run", "--name", "greedy", "-m", "24m", "--shm-size", "100m", box, "sh", "-c", script)
    assert result.code == 137, result
    assert cli.inspect("greedy")["exit"]["oom_killed"] is True


def test_nothing_in_a_container_is_protected_from_the_oom_killer(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    assert cli.ok("exec", container, "cat", "/proc/1/oom_score_adj", "/proc/self/oom_score_adj").split() == ["0", "0"]


def test_a_dry_run_prints_what_would_be_run_and_does_nothing(cli: Cli, box: str) -> None:
    plan = json.loads(cli.ok("run", "--dry-run", box, "echo", "hi"))
    assert plan["spec"]["process"]["args"] == ["echo", "hi"]
    assert any("q35" in word for word in plan["qemu"])
    assert cli.leftovers() == []


def test_a_dry_run_of_what_cannot_be_run_ends_as_the_run_would(cli: Cli, box: str) -> None:
    for words in (["nothing"], ["--memory", "12q", box]):
        result = cli("run", "--dry-run", *words)
        assert (result.code, result.stdout) == (125, ""), result


def test_a_zero_takes_a_limit_off_from_the_start_and_later(cli: Cli, box: str) -> None:
    limits = "cd /sys/fs/cgroup; cat pids.max cpu.max cpu.weight"
    zeros = ("--pids-limit", "0", "--cpus", "0", "--cpu-shares", "0")
    name = cli.ok("run", "-d", *zeros, box, "sleep", "1000").strip()
    free = ["max", "max", "100000", "100"]
    assert cli.ok("exec", name, "sh", "-c", limits).split() == free
    cli.ok("update", "--pids-limit", "9", "--cpus", "0.5", "--cpu-shares", "4", name)
    assert cli.ok("exec", name, "sh", "-c", limits).split()[:2] == ["9", "50000"]
    cli.ok("update", *zeros, name)
    assert cli.ok("exec", name, "sh", "-c", limits).split() == free
    refused = cli("update", "--cpuset-cpus", "", name)
    assert (refused.code, "names no vCPU" in refused.stderr) == (1, True), refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-e", "=x"], "=x"),
        (["-v", "/tmp:/x:ro,rw"], "both 'ro' and 'rw'"),
        (["--tmpfs", "relative"], "relative"),
        (["--memory", "12q"], "12q"),
        (["--memory", "900t"], "memory"),
        (["--cap-add", "NO_SUCH"], "NO_SUCH"),
        (["--ulimit", "nonsense"], "nonsense"),
        (["--name", "a/b"], "a/b"),
        (["--scratch-size", "lots"], "lots"),
        (["--stop-signal", "NOSIG"], "NOSIG"),
    ],
)
def test_a_bad_option_is_one_clear_line_and_leaves_nothing(cli: Cli, box: str, words: list[str], said: str) -> None:
    result = cli("run", "--rm", *words, box, "true")
    assert result.code == 125, result
    assert said in result.stderr
    assert result.stderr.startswith("vmsandbox: ")
    assert cli.leftovers() == []


def test_what_a_container_has_no_place_or_limit_for_is_said_without_the_guests_words(
    cli: Cli, box: str, tmp_path: Path, pod_template: None
) -> None:
    """In one machine, since starting one is what costs."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    table = (
        (["-v", f"{tmp_path}/directory:/etc/passwd"], "cannot mount a directory at '/etc/passwd': that is not a dir"),
        (["-v", f"{tmp_path}/directory:/etc/passwd/x"], "at '/etc/passwd/x': a part of it is not a directory"),
        (["-v", f"{tmp_path}/file:/tmp"], "cannot mount a file at '/tmp': that is not a file"),
        (["--tmpfs", "/etc/passwd"], "cannot mount tmpfs at '/etc/passwd': that is not a directory"),
        (["-w", "/etc/passwd"], "cannot enter working directory '/etc/passwd' ('--workdir', 'process.cwd'): not a"),
        (["--ulimit", "nofile=-1"], "limit 'nofile' ('--ulimit', 'process.rlimits') can be at most 1048576"),
        (["--ulimit", "nofile=2000000"], "limit 'nofile' ('--ulimit', 'process.rlimits') can be at most 1048576"),
    )
    cli.ok("pod", "create", "--name", "p")
    for words, said in table:
        result = cli("run", "--rm", "--pod", "p", *words, box, "true")
        message = result.stderr.splitlines()[0]
        assert (result.code, said in message) == (125, True), result
        assert "/run/vmsandbox" not in message
        assert "`" not in message, "crun quotes so"
    assert cli.ps() == []
    cli.ok("run", "-d", "--pod", "p", "--name", "c", box, "sleep", "1000")
    for directory, code in (("/nosuch", 127), ("/etc/passwd", 126)):
        result = cli("exec", "-w", directory, "c", "true")
        assert (result.code, f"cannot enter working directory '{directory}'" in result.stderr) == (code, True), result
