"""The verbs that look at a running container, change it and copy to and from it."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.harness.cli import Cli


def inside(cli: Cli, container: str, script: str) -> list[str]:
    return cli.ok("exec", container, "sh", "-c", script).split()


def most_mib(process: Path) -> int:
    """The most memory that a process has had."""
    (line,) = (line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


def test_a15_a_paused_container_stands_still_until_unpaused(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    assert cli.ok("pause", container) == f"{container}\n"
    assert cli.inspect(container)["status"] == "paused"
    refused = cli("exec", container, "true")
    assert (refused.code, "it is paused" in refused.stderr) == (125, True), refused
    assert "it is paused" in cli("pause", container).stderr
    cli.ok("unpause", container)
    assert cli.inspect(container)["status"] == "running"
    assert "it is running" in cli("unpause", container).stderr
    assert cli("exec", container, "true").code == 0


def test_a14_top_lists_processes_by_their_pids_inside(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    rows = json.loads(cli.ok("top", "--format", "json", container))
    assert [(row["pid"], row["user"], row["command"]) for row in rows] == [(1, "root", "sleep 100000")]
    head, line = cli.ok("top", container).splitlines()
    assert head.split()[:3] == ["USER", "PID", "PPID"]
    assert line.endswith("sleep 100000")
    assert cli.ok("top", container, "-o", "pid,user,args") == "PID USER COMMAND\n  1 root sleep 100000\n"
    assert cli.ok("top", container, "-ef").split()[:3] == ["UID", "PID", "PPID"]
    assert cli.ok("top", container, "aux").split()[:3] == ["USER", "PID", "%CPU"]
    refused = cli("top", container, "-o", "pid,nonsense")
    assert (refused.code, "column 'nonsense' of ps(1) is not known" in refused.stderr) == (1, True), refused


def test_a15_stats_shows_what_is_used_once_as_table_and_json(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    row = json.loads(cli.ok("stats", "--no-stream", "--format", "json", container))[0]
    assert (row["id"], row["name"], row["pids"]) == (container, "shared", 1)
    assert 0 < row["memory_used_bytes"] <= row["memory_bytes"] < row["pod_memory_bytes"]
    assert container[:12] in cli.ok("stats", "--no-stream").splitlines()[1]


def test_stats_streams_a_reading_a_second(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    streaming = cli.popen("stats", "--format", "json", container, stdout=-1)
    assert streaming.stdout is not None
    try:
        times = [json.loads(streaming.stdout.readline())[0]["time_ns"] for _ in range(2)]
    finally:
        streaming.terminate()
        streaming.communicate()
    assert times[1] - times[0] >= 900_000_000


@pytest.mark.all_ways
def test_a15_limits_change_both_ways_while_the_container_runs(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    limits = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max; nproc; awk '/MemTotal/ { print $2 }' /proc/meminfo"
    grown = cli("update", "--cpus", "2", "--memory", "512m", "--pids-limit", "50", container)
    assert (grown.code, grown.stdout) == (0, f"{container}\n"), grown
    *seen, large = inside(cli, container, limits)
    assert seen == [str(512 << 20), "50", "200000", "100000", "2"]
    shrunk = cli("update", "--cpus", "1", "--memory", "64m", container)
    assert shrunk.code == 0, shrunk
    *seen, small = inside(cli, container, limits)
    assert seen == [str(64 << 20), "50", "100000", "100000", "1"]
    # Nor is a vCPU that cannot be taken out.
    kept = cli.inspect(container)["pod"]["accel_used"]["accel"] == "tcg"
    assert ("the virtual machine keeps 2 vCPUs, 1 of them offline" in shrunk.stderr) == kept, shrunk
    # What the guest did not give back is answered, not hidden.
    assert int(small) < int(large) - 256 * 1024 or "could not give back" in shrunk.stderr
    cli.ok("update", "--cpus", "2", container)
    assert inside(cli, container, "nproc") == ["2"]
    assert cli.inspect(container)["resources"] == {"cpus": 2.0, "memory": 64 << 20}


def test_a5_memory_that_a_guest_gives_back_is_not_taken_from_the_host_first(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "large", "-m", "300m", box, "sleep", "100000")
    machine = Path("/proc", str(cli.inspect("large")["pod"]["vm"]["pid"]))
    (machine / "clear_refs").write_text("5")  # what it has had at most is counted anew
    before = most_mib(machine)
    cli.ok("update", "-m", "100m", "large")
    assert most_mib(machine) < before + 64


def test_a5_a_machine_that_was_shrunk_answers_each_time(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "often", box, "sleep", "100000")
    for _ in range(5):
        cli.ok("update", "-m", "300m", "--cpus", "1", "often")
        cli.ok("update", "-m", "100m", "--cpus", "2", "often")
        assert cli.ok("exec", "often", "echo", "up") == "up\n"


def test_a_limit_that_would_kill_or_cannot_be_had_is_refused_and_changes_nothing(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    cli.ok("update", "--memory", "256m", container)
    cli.ok("exec", container, "sh", "-c", "dd if=/dev/zero of=/dev/shm/held bs=1M count=40 2>/dev/null")
    refused = cli("update", "--memory", "16m", container)
    assert (refused.code, "would kill it" in refused.stderr) == (1, True), refused
    refused = cli("update", "--cpus", "1000", container)
    assert (refused.code, "cpus '1000' is more than a pod can have here" in refused.stderr) == (1, True), refused
    refused = cli("update", "--cpuset-cpus", "1000", container)
    assert (refused.code, "cpuset_cpus '1000' names vCPU 1000, but the pod has" in refused.stderr) == (1, True), refused
    refused = cli("update", "--memory", "90000g", container)
    assert (refused.code, "sandbox.max_memory_mib" in refused.stderr) == (1, True), refused
    assert inside(cli, container, "rm /dev/shm/held; cat /sys/fs/cgroup/memory.max") == [str(256 << 20)]


def test_these_verbs_say_what_they_cannot_find(pod: tuple[Cli, str]) -> None:
    cli, _ = pod
    for words in (["pause"], ["unpause"], ["top"], ["stats"], ["update", "--cpus", "1"]):
        result = cli(*words, "nothing")
        assert (result.code, "no such container: 'nothing'" in result.stderr) == (1, True), result


def test_a_created_container_runs_when_started_and_its_log_is_followed_to_the_end(cli: Cli, box: str) -> None:
    script = "echo old; until [ -e /tmp/go ]; do sleep 0.1; done; echo new; echo err >&2; exit 3"
    container = cli.ok("create", "--name", "later", box, "sh", "-c", script).strip()
    assert cli.inspect("later")["status"] == "created"
    assert cli.ok("logs", "later") == ""
    following = cli.popen("logs", "-f", "later", stdout=-1, stderr=-1)
    assert following.stdout is not None
    assert cli.ok("start", "later") == "later\n"
    assert following.stdout.readline() == b"old\n"
    assert "it is running" in cli("start", "later").stderr
    cli.ok("exec", "later", "touch", "/tmp/go")
    stdout, stderr = following.communicate(timeout=60)
    assert (stdout, stderr, following.returncode) == (b"new\n", b"err\n", 0)
    assert cli.ok("wait", container) == "3\n"
    assert cli.ok("logs", "--since", "1h", "--tail", "1", "-f", "later") in ("new\n", "")
    assert cli.ok("logs", "--since", "2200-01-01", "later") == ""


def test_what_nobody_reads_is_rotated_away_and_holds_nobody_up(cli: Cli, box: str, tmp_path: Path) -> None:
    cli.config = tmp_path / "config.toml"
    cli.config.write_text("[container]\nlog_max_size_mib = 1\nlog_max_files = 2\n[sandbox]\nforks = false\n")
    # Lines of eight bytes: what is written and carried at once then ends with a line.
    first, last = 1_000_001, 1_150_000
    container = cli.ok("run", "-d", "--name", "talker", box, "sh", "-c", f"seq {first} {last}; echo err >&2").strip()
    following = cli.popen("logs", "-f", "talker", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert cli.ok("wait", "talker") == "0\n"
    out, err = following.communicate(timeout=60)
    assert (out[-8:], err) == (b"%d\n" % last, b"err\n")
    followed = [int(line) for line in out.split()]
    assert followed == sorted(set(followed)), "a line came twice, or in another order"
    kept = sorted((cli.data_root / "containers" / container).glob("log*"))
    assert [path.name for path in kept] == ["log", "log.1"]
    # What is written at once may go beyond the limit, once.
    assert all(path.stat().st_size < 2 << 20 for path in kept)
    shown = [int(line) for line in cli.ok("logs", "talker").split()]
    assert shown == list(range(shown[0], last + 1))
    assert len(shown) > 10_000
    # Of two streams it is not said which line came last.
    tail = cli("logs", "--tail", "3", "talker")
    told = [int(line) for line in tail.stdout.split()]
    assert len(told) + len(tail.stderr.split()) == 3
    assert told == list(range(last - len(told) + 1, last + 1))


def test_a_created_container_is_removed_without_force(cli: Cli, box: str) -> None:
    cli.ok("create", "--name", "never", box, "true")
    cli.ok("rm", "never")
    assert cli.leftovers() == []


def test_what_is_copied_in_comes_out_the_same(pod: tuple[Cli, str], tmp_path: Path) -> None:
    cli, container = pod
    source = tmp_path / "src"
    (source / "sub").mkdir(parents=True)
    (source / "a").write_text("hello\n")
    (source / "sub" / "large").write_bytes(bytes(range(256)) * 16384)
    (source / "link").symlink_to("a")
    cli.ok("cp", str(source), f"{container}:/tmp")
    assert cli.ok("exec", container, "cat", "/tmp/src/link") == "hello\n"
    cli.ok("cp", f"{container}:/tmp/src", str(tmp_path / "out"))
    assert (tmp_path / "out/sub/large").read_bytes() == (source / "sub/large").read_bytes()
    assert (tmp_path / "out/link").readlink().name == "a"
    cli.ok("cp", f"{source}/.", f"{container}:/root")
    assert inside(cli, container, "ls /root") == ["a", "link", "sub"]


def test_a_copy_onto_a_link_goes_where_the_link_leads(pod: tuple[Cli, str], tmp_path: Path) -> None:
    cli, container = pod
    (tmp_path / "file").write_text("copied\n")
    inside(
        cli,
        container,
        "mkdir -p /links/real/sub; cd /links; echo old > real/old; ln -s real dir; ln -s ../old real/sub/up;"
        "ln -s /links/dir/sub/up file; ln -s real/new later; ln -s round round",
    )
    for name in ("file", "dir", "later"):
        cli.ok("cp", str(tmp_path / "file"), f"{container}:/links/{name}")
    script = (
        "cd /links; cat real/old real/file real/new; for link in file dir later real/sub/up; do readlink $link; done"
    )
    assert inside(cli, container, script) == [*3 * ["copied"], "/links/dir/sub/up", "real", "real/new", "../old"]
    refused = cli("cp", str(tmp_path / "file"), f"{container}:/links/round")
    assert (refused.code, "leads to too many others" in refused.stderr) == (1, True), refused


def test_an_archive_goes_in_by_stdin_and_out_by_stdout(pod: tuple[Cli, str], tmp_path: Path) -> None:
    cli, container = pod
    (tmp_path / "one").write_text("in an archive\n")
    packed = subprocess.run(["tar", "-cz", "-C", tmp_path, "one"], capture_output=True, check=True).stdout
    inside(cli, container, "mkdir /archive")
    cli.ok("cp", "-", f"{container}:/archive", stdin=packed)
    with tarfile.open(fileobj=io.BytesIO(cli("cp", f"{container}:/archive/.", "-").raw)) as archive:
        assert archive.getnames() == ["archive", "archive/one"]
        content = archive.extractfile("archive/one")
        assert content
        assert content.read() == b"in an archive\n"
    refused = cli("cp", "-", f"{container}:/archive", stdin=b"no archive")
    assert (refused.code, "not a tar archive" in refused.stderr) == (1, True), refused


def test_a_copy_of_what_is_not_there_says_so(pod: tuple[Cli, str], tmp_path: Path) -> None:
    cli, container = pod
    result = cli("cp", f"{container}:/none", str(tmp_path))
    assert (result.code, "'/none' does not exist in the container" in result.stderr) == (1, True), result
    result = cli("cp", str(tmp_path), f"{container}:/etc/passwd")
    assert (result.code, "is a file" in result.stderr) == (1, True), result
