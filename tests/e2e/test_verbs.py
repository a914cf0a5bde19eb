"""The verbs on a running container."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.harness.cli import awaited, wait_until_gone
from tests.harness.netns import namespace
from tests.harness.terminals import typed
from vmsandbox import remains

if TYPE_CHECKING:
    from tests.harness.cli import Cli

CAP_SYS_ADMIN = 21


def test_a13_exec_has_its_own_output_code_input_and_environment(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    result = cli(
        "exec",
        "-i",
        "-e",
        "X=1",
        "-w",
        "/tmp",
        "-u",
        "alice",
        container,
        "sh",
        "-c",
        "cat; echo $X $(pwd) $(id -u); exit 5",
        stdin=b"in\n",
    )
    assert (result.code, result.stdout) == (5, "in\n1 /tmp 1000\n"), result


def test_exec_of_what_is_not_there_is_127_and_not_executable_126(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    assert cli("exec", container, "/no/such").code == 127
    assert cli("exec", container, "/etc/not-executable").code == 126


def test_many_execs_at_once_keep_their_own_output_and_code(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    clients = [
        cli.popen("exec", container, "sh", "-c", f"echo {number}; exit {number}", stdout=subprocess.PIPE)
        for number in range(10)
    ]
    ends = [(client.communicate(timeout=120)[0], client.returncode) for client in clients]
    assert ends == [(f"{number}\n".encode(), number) for number in range(10)]


def test_a_detached_container_is_listed_by_name_and_prefix(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    row = cli.ps()[0]
    assert (row["id"], row["name"], row["status"], row["image"]) == (container, "shared", "running", "box")
    assert cli.ok("ps", "-q").strip() == container[:12]
    assert "shared" in cli.ok("ps")
    assert cli.inspect(container[:6])["id"] == container
    described = cli.inspect("shared")
    assert described["pod"]["accel_used"]["accel"] in ("kvm", "tcg")
    assert described["args"] == ["sleep", "100000"]


def print_on_the_console(cli: Cli, container: str, text: str) -> None:
    script = f"[ -e /dev/kmsg ] || mknod /dev/kmsg c 1 11; echo '<1>{text}' > /dev/kmsg"
    cli.ok("exec", "--privileged", container, "sh", "-c", script)
    awaited(lambda: text in cli.ok("console", container))


@pytest.mark.all_ways
def test_the_console_shows_what_the_guest_printed(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--privileged", "--name", "web", box, "sleep", "1000")
    if cli.inspect("web")["pod"]["boot"] != "cold":
        silent = cli("console", "web")
        assert (silent.code, silent.stdout) == (0, "")
        assert "is a clone and has printed nothing since it was restored" in silent.stderr
    else:
        awaited(lambda: "serving" in cli.ok("console", "web"))
    print_on_the_console(cli, "web", "written by hand")
    cli.ok("stop", "-t", "0", "web")
    assert "its console is gone" in cli("console", "web").stderr


def test_the_console_of_a_pod_is_found_by_its_name_and_id(cli: Cli, pod_template: None, box: str) -> None:
    pod = cli.ok("pod", "create", "--name", "shop").strip()
    container = cli.ok("run", "-d", "--pod", "shop", "--privileged", box, "sleep", "1000").strip()
    print_on_the_console(cli, container, "written by hand")
    for name in ("shop", pod, pod[:9]):
        assert "written by hand" in cli.ok("console", name)


def test_a11_stop_ends_in_order_and_kill_ends_at_once(cli: Cli, box: str) -> None:
    script = "trap 'echo bye; exit 4' TERM; echo up; while :; do sleep 0.1; done"
    cli.ok("run", "-d", "--name", "a", box, "sh", "-c", script)
    cli.await_line("a", "up")
    assert cli.ok("stop", "a") == "a\n"
    assert cli.inspect("a")["exit"]["code"] == 4
    assert cli.ok("logs", "a").endswith("bye\n")
    cli.ok("run", "-d", "--name", "b", box, "sleep", "1000")
    supervisor = cli.inspect("b")["pod"]["supervisor"]["pid"]
    cli.ok("kill", "-s", "KILL", "b")
    assert cli.ok("wait", "b") == "137\n"
    assert cli.ok("stop", "b") == "b\n"
    wait_until_gone(supervisor)
    assert cli.processes() == []


def test_a11_a_container_that_ignores_the_stop_signal_is_killed(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "deaf", box, "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    cli.ok("stop", "-t", "0.5", "deaf")
    assert cli.inspect("deaf")["exit"]["code"] == 137


def test_a11_a_container_may_have_all_the_time_there_is(cli: Cli, box: str) -> None:
    script = "trap 'until [ -e /go ]; do sleep 0.1; done; exit 4' TERM; echo up; while :; do sleep 0.1; done"
    cli.ok("run", "-d", "--name", "slow", box, "sh", "-c", script)
    cli.await_line("slow", "up")
    with cli.popen("stop", "-t", "-1", "slow") as client:
        cli.ok("exec", "slow", "touch", "/go")
        assert client.wait(60) == 0
    assert cli.inspect("slow")["exit"]["code"] == 4


def test_removing_a_running_container_needs_force(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sleep", "1000")
    refused = cli("rm", "web")
    assert refused.code == 1
    assert "--force" in refused.stderr
    cli.ok("rm", "-f", "web")
    assert cli.leftovers() == []


def test_verbs_on_what_does_not_exist_say_so(cli: Cli) -> None:
    for verb in ("stop", "kill", "rm", "inspect", "logs", "wait", "console"):
        result = cli(verb, "nothing")
        assert result.code == 1, verb
        assert "no such container: 'nothing'" in result.stderr, verb
    assert cli("exec", "nothing", "true").code == 125


def test_a12_a13_a_stopped_container_cannot_be_killed_or_execed(cli: Cli, box: str) -> None:
    cli.ok("run", "--name", "done", box, "true")
    assert "it is stopped" in cli("kill", "done").stderr
    assert "it is stopped" in cli("exec", "done", "true").stderr


def test_a12_what_is_no_signal_is_refused_and_nothing_is_killed(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    for text in ("NOSUCH", "0", "65"):
        refused = cli("kill", "-s", text, container)
        assert (refused.code, f"'{text}' is no signal" in refused.stderr) == (1, True), refused
    assert cli.ok("exec", container, "echo", "alive") == "alive\n"


def test_a12_a_created_and_a_paused_container_can_be_killed(cli: Cli, box: str) -> None:
    cli.ok("create", "--name", "made", box, "sleep", "1000")
    cli.ok("run", "-d", "--name", "held", box, "sleep", "1000")
    cli.ok("pause", "held")
    for name in ("made", "held"):
        cli.ok("kill", name)
        assert cli.ok("wait", name) == "137\n"
        assert cli.inspect(name)["status"] == "stopped"


def test_a13_exec_has_a_terminal_and_all_rights_where_they_are_asked_for(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    script = "tty; grep CapEff /proc/self/status; exit 6"
    plain = cli("exec", container, "sh", "-c", script)
    asked = typed(cli.argv("exec", "-it", "--privileged", container, "sh", "-c", script), dict(os.environ))
    assert (plain.code, asked.code) == (6, 6), (plain, asked)
    assert plain.stdout.startswith("not a tty\n")
    assert "/dev/pts/" in asked.stdout
    more, fewer = (int(result.stdout.partition("CapEff:")[2].split()[0], 16) for result in (asked, plain))
    assert more & fewer == fewer
    assert more & 1 << CAP_SYS_ADMIN
    assert not fewer & 1 << CAP_SYS_ADMIN


def test_b2_every_datum_of_a_pod_and_its_container_is_on_disk(pod: tuple[Cli, str]) -> None:
    cli, container_id = pod
    directory = cli.run_root / "s" / container_id[:12]
    sandbox = json.loads((directory / "sandbox.json").read_text())
    container = json.loads((directory / "containers" / f"{container_id}.json").read_text())
    assert sandbox["version"] == container["version"] == 1
    assert (sandbox["status"], sandbox["network"]["kind"], sandbox["hostname"]) == ("ready", "none", container_id[:12])
    assert psutil.Process(sandbox["vm"]["pid"]).name().startswith("qemu")
    assert sandbox["vm"]["config"]["ports"]
    assert psutil.Process(sandbox["supervisor"]["pid"]).is_running()
    assert (container["name"], container["sandbox"], container["status"]) == ("shared", container_id, "running")
    assert container["process"]["args"] == ["sleep", "100000"]
    assert psutil.Process(container["standin"]["pid"]).is_running()
    assert container["image"]["name"] == "box"
    assert " / overlay " in cli.ok("exec", container_id, "cat", "/proc/mounts")
    assert (directory / "lock").exists()


def test_b2_what_a_pod_is_given_shares_and_is_connected_to_is_on_disk(cli: Cli, box: str, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "tree").mkdir()
    given = ("-v", f"{tmp_path}/tree:/data:ro", "--device", f"{tmp_path}/disk:/dev/data:r")
    with namespace(f"vb2-{os.getpid()}") as space:
        space.run("ip link add eth0 type veth peer name peer0; ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up")
        kind = f"ns:{space.path}"
        made = cli.ok("run", "-d", "--network", kind, *given, box, "sleep", "100000").strip()
        directory = cli.run_root / "s" / made[:12]
        sandbox = json.loads((directory / "sandbox.json").read_text())
        container = json.loads((directory / "containers" / f"{made}.json").read_text())
        network = json.loads((cli.run_root / "net" / f"{made[:12]}.json").read_text())
        # The machine, as whoever takes it over has to know it: hypervisor and agent.
        vm = sandbox["vm"]
        assert psutil.Process(vm["pid"]).name().startswith("qemu")
        assert vm["start_time"] == int(Path(f"/proc/{vm['pid']}/stat").read_text().rpartition(")")[2].split()[19])
        assert Path(vm["config"]["directory"], "qmp.sock").is_socket()
        assert [port["name"] for port in vm["config"]["ports"]] == ["vmsandbox.agent", "vmsandbox.bulk"]
        # Mounts, and how they are shared.
        assert container["shares"]["fs"] == "virtio-fs"
        (name,) = container["shares"]["names"]
        assert str(directory / "shared" / name) in remains.mounts_below(str(directory))
        assert container["options"]["volumes"] == [f"{tmp_path}/tree:/data:ro"]
        # Devices.
        assert container["disks"]["device-0"][0] == f"dev-{made[:12]}-0"
        assert container["options"]["disks"] == [f"{tmp_path}/disk:/dev/data:r"]
        # The network.
        assert (sandbox["network"]["kind"], network["netns"]) == ("namespace", space.path)
        cli.ok("rm", "-f", made)
        assert not list((cli.run_root / "net").glob("*"))


def test_b3_what_is_on_disk_is_closed_to_others_and_an_unknown_id_is_an_error_of_its_own(pod: tuple[Cli, str]) -> None:
    cli, container_id = pod
    directory = cli.run_root / "s" / container_id[:12]
    data = cli.data_root / "containers" / container_id
    assert not data.stat().st_mode & 0o077
    for path in [directory, *directory.rglob("*")]:
        mode = path.lstat().st_mode
        # QEMU passes through to its sockets, but nobody looks in.
        allowed = 0o711 if stat.S_ISDIR(mode) else 0o600
        assert stat.S_ISLNK(mode) or not mode & 0o777 & ~allowed, (path, oct(mode))
    assert cli("inspect", "f" * 64).stderr.startswith("vmsandbox: no such container: ")


def test_an_image_in_use_is_not_removed(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    result = cli("image", "rm", "box")
    assert result.code == 1
    assert container[:12] in result.stderr
    assert json.loads(cli.ok("image", "ls", "--format", "json"))
