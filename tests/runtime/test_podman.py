"""Podman over our runtime, with crun as the control that tells whose fault a failure is."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.harness import machine
from tests.harness.cli import kill, title, wait_until_gone
from tests.harness.engines import BOX, LIMITS
from tests.harness.nurseries import await_nursery, origin
from tests.harness.terminals import typed

if TYPE_CHECKING:
    import psutil

    from tests.harness.engines import Engines

OBEDIENT = 'trap "exit 9" TERM; echo up; while :; do sleep 0.1; done'
MIB = 1 << 20

runtimes = pytest.mark.parametrize("name", ["crun", "vmsandbox"])


@runtimes
def test_podman_runs_a_container_to_its_end(engines: Engines, name: str) -> None:
    done = engines.podman("run", "--rm", "-i", "--runtime", name, BOX, "sh", "-c", "cat; exit 4", stdin=b"given\n")
    assert (done.code, done.stdout) == (4, "given\n"), (done, engines.logs())


@runtimes
def test_podman_tells_why_a_program_cannot_run(engines: Engines, name: str) -> None:
    done = [engines.podman("run", "--rm", "--runtime", name, BOX, program) for program in ("nosuch", "/etc/passwd")]
    assert [each.code for each in done] == [127, 126], done


@runtimes
def test_podman_has_a_terminal(engines: Engines, name: str) -> None:
    argv = engines.argv("podman", "run", "--rm", "-it", "--runtime", name, BOX, "sh", "-c", "tty; read x; echo got $x")
    done = typed(argv, engines.environment)
    assert done.code == 0
    assert "/dev/pts/0" in done.stdout
    assert "got word" in done.stdout


@runtimes
def test_podman_keeps_a_container_with_its_own_network(engines: Engines, name: str) -> None:
    files = ("--read-only", "-v", "kept:/data", "--tmpfs", "/scratch")
    health = ("--health-cmd", "test -e /tmp/well", "--health-interval", "disable")
    options = ("--name", "kept", "--runtime", name, "-m", "100m", "--pids-limit", "77", *files, *health)
    engines.ok("podman", "run", "-d", *options, BOX, "sh", "-c", OBEDIENT)
    done = engines.podman("exec", "kept", "sh", "-c", "echo inside; exit 6")
    assert (done.code, done.stdout) == (6, "inside\n")
    assert engines.ok("podman", "exec", "-t", "kept", "tty").startswith("/dev/pts/")
    assert engines.podman("exec", "kept", "nosuch").code == 127
    address = engines.inspect("kept")["NetworkSettings"]["Networks"]["podman"]["IPAddress"]
    assert f"{address}/" in engines.ok("podman", "exec", "kept", "ip", "-o", "addr", "show", "eth0")

    # its files, and its health
    assert "Read-only file system" in engines.podman("exec", "kept", "touch", "/file").stderr
    engines.ok("podman", "exec", "kept", "sh", "-c", "echo kept > /data/file; touch /scratch/file")
    assert engines.podman("healthcheck", "run", "kept").code == 1
    engines.ok("podman", "exec", "kept", "touch", "/tmp/well")
    assert engines.podman("healthcheck", "run", "kept").code == 0
    assert engines.inspect("kept")["State"]["Health"]["Status"] == "healthy"

    # what it does, and may use
    title, *processes = engines.ok("podman", "top", "kept", "pid", "args").splitlines()
    assert title.split() == ["PID", "COMMAND"]
    assert processes[0].split()[0] == "1"
    assert OBEDIENT in processes[0]
    assert OBEDIENT in engines.ok("podman", "top", "kept", "-o", "pid,args")
    usage = engines.ok("podman", "stats", "--no-stream", "--format", "{{.MemUsage}}", "kept")
    assert not usage.startswith("0B"), usage
    assert engines.ok("podman", "exec", "kept", "sh", "-c", LIMITS).split()[0] == str(100 * MIB)
    limits = ("--memory", "200m", "--memory-swap", "200m", "--cpus", "1", "--cpuset-cpus", "0")
    engines.ok("podman", "update", *limits, "kept")
    assert engines.ok("podman", "exec", "kept", "sh", "-c", LIMITS).split() == [str(200 * MIB), "100000", "77"]
    engines.ok("podman", "pause", "kept")
    assert engines.inspect("kept")["State"]["Status"] == "paused"
    engines.ok("podman", "unpause", "kept")

    engines.ok("podman", "stop", "-t", "20", "kept")
    assert engines.inspect("kept")["State"]["ExitCode"] == 9
    assert engines.ok("podman", "logs", "kept") == "up\n"
    engines.ok("podman", "start", "kept")
    assert engines.ok("podman", "exec", "kept", "cat", "/data/file") == "kept\n"
    engines.ok("podman", "kill", "kept")
    assert engines.ok("podman", "wait", "kept") == "137\n"
    engines.ok("podman", "rm", "-v", "kept")


@runtimes
def test_a_copy_never_reaches_the_host(engines: Engines, name: str) -> None:
    engines.ok("podman", "run", "-d", "--name", "copied", "--runtime", name, BOX, "sleep", "1000")
    engines.ok("podman", "cp", "/etc/hostname", "copied:/var/copy")
    assert engines("test", "-e", "/var/copy").code == 1
    assert engines.ok("podman", "exec", "copied", "cat", "/var/copy") == engines.ok("cat", "/etc/hostname")


@runtimes
def test_podman_has_pods(engines: Engines, name: str) -> None:
    podman = ("podman", "--runtime", name)
    infra = ("--infra-image", BOX, "--infra-command", "/bin/sleep 100000")
    engines.ok(*podman, "pod", "create", "--name", "group", "--hostname", "podname", *infra)
    engines.ok(*podman, "run", "-d", "--pod", "group", BOX, "sh", "-c", "echo shared > /dev/shm/x; exec sleep 1000")
    script = "until cat /dev/shm/x 2>/dev/null; do sleep 0.1; done; hostname"
    assert engines.ok(*podman, "run", "--rm", "--pod", "group", BOX, "sh", "-c", script) == "shared\npodname\n"
    if name == "vmsandbox":
        assert len(engines.ok("ls", "/run/vmsandbox/s").split()) == 1
    engines.ok(*podman, "pod", "rm", "-f", "-t", "0", "group")


def test_what_no_virtual_machine_can_do_is_said(engines: Engines) -> None:
    for option, word in (("--network=host", "network"), ("--pid=host", "pid"), ("--ipc=host", "ipc")):
        done = engines.podman("run", "--rm", "--runtime", "vmsandbox", option, BOX, "true")
        assert done.code == 126
        assert f"'linux.namespaces' has no {word} namespace" in done.stderr


@runtimes
def test_a_privileged_container_gets_the_machines_devices_and_no_disk_of_the_host(engines: Engines, name: str) -> None:
    script = "ls /dev; grep CapEff /proc/self/status"
    done = engines.podman("run", "--rm", "--privileged", "--runtime", name, BOX, "sh", "-c", script)
    assert done.code == 0, (done, engines.logs())
    words = done.stdout.split()
    assert {"null", "tty", "zero"} <= set(words)
    if name == "vmsandbox":
        assert not [word for word in words if word.startswith(("vd", "sd", "loop0", "nvme", "dm-"))]
    assert int(words[-1], 16) & (1 << 21)  # CAP_SYS_ADMIN


@runtimes
def test_a_root_of_a_driver_without_layers_is_shared_as_any_directory(engines: Engines, name: str) -> None:
    driver = ("--root", "/run/engines/vfs", "--runroot", "/run/engines/vfs-run", "--storage-driver", "vfs")
    tar = subprocess.run(["tar", "-C", engines.rootfs, "-c", "."], capture_output=True, check=True).stdout
    engines.ok("podman", *driver, "import", "-q", "-", BOX, stdin=tar)
    words = ("run", "--rm", "--network", "none", BOX, "sh", "-c", "echo x > /made; cat /made; grep ' / ' /proc/mounts")
    done = engines.podman(*driver, "--runtime", name, *words)
    assert done.code == 0, (done, engines.logs())
    assert done.stdout.startswith("x\n")
    assert (" virtiofs " in done.stdout) is (name == "vmsandbox")


def nurseries(engines: Engines) -> list[psutil.Process]:
    return [each for each in machine.inside(engines.init) if title(each) == "vmsandbox nursery /run/vmsandbox"]


def test_supervisors_under_podman_come_out_of_one_that_conmon_need_not_wait_for(engines: Engines) -> None:
    run = ("podman", "--runtime", "vmsandbox", "run", "--network", "none")
    for nursery in nurseries(engines):  # of a test before, which may have been elsewhere
        kill(nursery.pid)
        wait_until_gone(nursery.pid)
    engines.ok(*run, "--rm", BOX, "true")
    await_nursery(engines.inside("/run/vmsandbox"))
    engines.ok(*run, "-d", "--name", "nursed", BOX, "sleep", "1000")
    processes = [*machine.inside(engines.init)]
    (pid,) = (nursery.pid for nursery in nurseries(engines))
    (conmon,) = (process for process in processes if process.name() == "conmon")
    (supervisor,) = (process.pid for process in processes if title(process).startswith("vmsandbox supervisor"))
    assert origin(supervisor) == origin(pid)
    assert pid not in [child.pid for child in conmon.children(recursive=True)]


@runtimes
def test_members_of_a_pod_reach_each_other_and_have_its_ports(engines: Engines, name: str) -> None:
    podman = ("podman", "--runtime", name)
    infra = ("--infra-image", BOX, "--infra-command", "/bin/sleep 100000")
    engines.ok(*podman, "pod", "create", "--name", "group", "-p", "8095:80", *infra)
    serve = "mkdir /www; echo page > /www/index.html; httpd -h /www -p 127.0.0.1:81; exec httpd -f -h /www -p 80"
    engines.ok(*podman, "run", "-d", "--name", "server", "--pod", "group", BOX, "sh", "-c", serve)
    fetch = "until wget -qO- http://127.0.0.1:{}/ 2>/dev/null; do sleep 0.1; done"
    for port in (80, 81):
        assert engines.ok(*podman, "run", "--rm", "--pod", "group", BOX, "sh", "-c", fetch.format(port)) == "page\n"
    assert engines.ok("busybox", "wget", "-qO-", "http://127.0.0.1:8095/") == "page\n"
    engines.ok(*podman, "pod", "rm", "-f", "-t", "0", "group")


@runtimes
def test_names_are_those_that_podman_writes(engines: Engines, name: str) -> None:
    options = ("--hostname", "mine", "--dns", "10.1.2.3", "--dns-search", "tests", "--add-host", "other:10.9.9.9")
    engines.ok("podman", "run", "-d", "--name", "named", "--runtime", name, *options, BOX, "sleep", "1000")
    written = engines.inspect("named")
    for key, path in (("HostnamePath", "hostname"), ("HostsPath", "hosts"), ("ResolvConfPath", "resolv.conf")):
        seen = engines.ok("podman", "exec", "named", "cat", f"/etc/{path}")
        assert seen == engines.ok("cat", written[key])
    assert engines.ok("podman", "exec", "named", "hostname") == "mine\n"
    said = engines.ok("podman", "exec", "named", "cat", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf")
    assert said.startswith("mine")
    assert "10.9.9.9\tother\n" in said
    assert f"{written['NetworkSettings']['Networks']['podman']['IPAddress']}\tmine named\n" in said
    assert {"nameserver 10.1.2.3", "search tests"} <= {*said.splitlines()}


@runtimes
def test_the_network_of_another_container_can_be_had_in_a_pod_only(engines: Engines, name: str) -> None:
    engines.ok("podman", "run", "-d", "--name", "first", "--runtime", name, BOX, "sleep", "1000")
    run = (
        "podman",
        "run",
        "--rm",
        "--runtime",
        name,
        "--network",
        "container:first",
        BOX,
        "ip",
        "addr",
        "show",
        "eth0",
    )
    done = engines(*run)
    if name == "vmsandbox":
        assert done.code == 126
        assert "a namespace can be given to one virtual machine only" in done.stderr
    else:
        assert done.code == 0
    address = engines.inspect("first")["NetworkSettings"]["Networks"]["podman"]["IPAddress"]
    assert f" {address}/" in engines.ok("podman", "exec", "first", "ip", "addr", "show", "eth0")
