"""Docker over our runtime, with runc as the control that tells whose fault a failure is."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.harness.daemons import CNI_DIRECTORY
from tests.harness.engines import LIMITS
from tests.harness.terminals import typed
from vmsandbox import __version__

if TYPE_CHECKING:
    from tests.harness.engines import Engines

BOX = "box:1"
MIB = 1 << 20
SERVING = (
    'trap "exit 9" TERM; mkdir /www; echo page > /www/index.html; httpd -h /www -p 80; echo up; '
    "while :; do sleep 0.1; done"
)
runtimes = pytest.mark.parametrize("name", ["runc", "vmsandbox"])


@runtimes
def test_docker_runs_a_container_to_its_end(docker: Engines, name: str) -> None:
    options = ("--network", "none", "--read-only", "--tmpfs", "/tmp", "-v", f"{CNI_DIRECTORY}:/config:ro")
    script = "cat; touch /x 2>&1; touch /tmp/x && ls /config; touch /config/x 2>&1; exit 4"
    done = docker("docker", "run", "--rm", "-i", "--runtime", name, *options, BOX, "sh", "-c", script, stdin=b"given\n")
    refused = "touch: /{}: Read-only file system\n"
    said = "given\n" + refused.format("x") + "10-pods.conflist\n" + refused.format("config/x")
    assert (done.code, done.stdout) == (4, said), (done, docker.logs())


def test_docker_knows_what_was_installed(docker: Engines) -> None:
    """The runtime can be the default one, and docker shows its commit then; installing it is undone and done again."""
    file = docker.inside("/etc/docker/daemon.json")
    asked = ("docker", "info", "-f", "{{json .Runtimes}} {{.RuncCommit.ID}}")
    before, shown = file.read_text(), docker.ok(*asked)
    assert '"vmsandbox"' in shown
    file.write_text(json.dumps({**json.loads(before), "default-runtime": "vmsandbox"}))
    docker.reload("dockerd", until=asked, shows=f"v{__version__}")
    assert docker.ok("docker", "run", "--rm", "--network", "none", BOX, "expr", "5", "+", "6") == "11\n"
    file.write_text(before)
    docker.reload("dockerd", until=asked, shows=shown.rpartition(" ")[2])
    docker.ok(str(docker.runtime), "uninstall", "docker")
    assert "vmsandbox" not in file.read_text()
    docker.ok(str(docker.runtime), "install", "docker")
    assert file.read_text() == before


@runtimes
def test_docker_tells_why_a_program_cannot_run(docker: Engines, name: str) -> None:
    for program, code in (("nosuch", 127), ("/nosuch", 127), ("/etc/passwd", 126), ("/etc", 126)):
        done = docker("docker", "run", "--rm", "--network", "none", "--runtime", name, BOX, program)
        assert done.code == code, (program, done)


@runtimes
def test_docker_has_a_terminal(docker: Engines, name: str) -> None:
    options = ("--rm", "-it", "--network", "none", "--runtime", name)
    argv = docker.argv("docker", "run", *options, BOX, "sh", "-c", "tty; read x; echo got $x; exit 3")
    done = typed(argv, docker.environment)
    assert done.code == 3
    assert "/dev/pts/0" in done.stdout or "/dev/console" in done.stdout
    assert "got word" in done.stdout


@runtimes
def test_docker_keeps_a_container_on_its_bridge(docker: Engines, name: str) -> None:
    """The hook of docker's network, and every verb that needs a container which runs."""
    options = ("--name", "kept", "--runtime", name, "-m", "100m", "-p", "8080:80", "-v", "kept:/data")
    docker.ok("docker", "run", "-d", *options, BOX, "sh", "-c", SERVING)
    done = docker("docker", "exec", "-i", "-e", "A=b", "kept", "sh", "-c", "cat; echo $A; exit 6", stdin=b"inside\n")
    assert (done.code, done.stdout) == (6, "inside\nb\n")
    assert docker.ok("docker", "exec", "-t", "kept", "tty").startswith("/dev/pts/")
    for program, code in (("nosuch", 126), ("/etc/passwd", 126)):  # docker's own codes, as with runc
        assert docker("docker", "exec", "kept", program).code == code
    address = docker.ok("docker", "inspect", "-f", "{{.NetworkSettings.IPAddress}}", "kept").strip()
    assert f"{address}/" in docker.ok("docker", "exec", "kept", "ip", "-o", "addr", "show", "eth0")
    for url in ("http://127.0.0.1:8080/", f"http://{address}/"):
        assert docker.ok("busybox", "wget", "-qO-", url) == "page\n"
    usage = docker.ok("docker", "stats", "--no-stream", "--format", "{{.MemUsage}} {{.PIDs}}", "kept")
    assert not usage.startswith("0B"), usage
    assert len(docker.ok("docker", "top", "kept", "-eo", "pid,args").splitlines()) > 1
    assert docker.ok("docker", "exec", "kept", "sh", "-c", LIMITS).split()[0] == str(100 * MIB)
    limits = ("-m", "200m", "--memory-swap", "200m", "--pids-limit", "66", "--cpus", "1.5")
    docker.ok("docker", "update", *limits, "kept")
    assert docker.ok("docker", "exec", "kept", "sh", "-c", LIMITS).split() == [str(200 * MIB), "150000", "66"]
    docker.ok("docker", "pause", "kept")
    assert docker.ok("docker", "inspect", "-f", "{{.State.Status}}", "kept") == "paused\n"
    docker.ok("docker", "unpause", "kept")
    docker.ok("docker", "exec", "kept", "sh", "-c", "echo kept > /data/file")
    docker.ok("docker", "cp", "/etc/hostname", "kept:/var/copy")
    assert docker.ok("docker", "exec", "kept", "cat", "/var/copy") == docker.ok("cat", "/etc/hostname")

    docker.ok("docker", "stop", "-t", "20", "kept")
    assert docker.ok("docker", "inspect", "-f", "{{.State.ExitCode}}", "kept") == "9\n"
    assert docker.ok("docker", "logs", "kept") == "up\n"
    docker.ok("docker", "start", "kept")
    assert docker.ok("docker", "exec", "kept", "cat", "/data/file", "/var/copy").startswith("kept\n")
    waiters = [
        subprocess.Popen(docker.argv("docker", "wait", "kept"), stdout=subprocess.PIPE, env=docker.environment)
        for _ in range(3)
    ]
    docker.ok("docker", "kill", "kept")
    assert [waiter.communicate()[0] for waiter in waiters] == [b"137\n"] * 3
    docker.ok("docker", "start", "kept")
    docker.ok("docker", "rm", "-f", "kept")
    docker.ok("docker", "volume", "rm", "kept")


@runtimes
def test_containers_of_a_network_of_dockers_know_each_other_by_name(docker: Engines, name: str) -> None:
    """docker answers such names at a loopback address of the container's namespace."""
    docker.ok("docker", "network", "create", "--subnet", "10.77.0.0/24", "town")
    try:
        options = ("--runtime", name, "--network", "town")
        docker.ok("docker", "run", "-d", "--name", "db", *options, BOX, "sleep", "100000")
        address = docker.ok("docker", "inspect", "-f", "{{.NetworkSettings.Networks.town.IPAddress}}", "db").strip()
        docker.ok("docker", "run", "-d", "--name", "web", *options, BOX, "sleep", "100000")
        assert f"Address: {address}" in docker.ok("docker", "exec", "web", "nslookup", "db")
        assert docker("docker", "exec", "web", "nslookup", "nobody").code != 0
        if name == "vmsandbox":
            for supervisor in docker.supervisors():
                supervisor.kill()
            assert f"Address: {address}" in docker.ok("docker", "exec", "web", "nslookup", "db")
    finally:
        docker("docker", "rm", "-f", "db", "web")
        docker("docker", "network", "rm", "town")


@runtimes
def test_names_are_those_that_docker_writes(docker: Engines, name: str) -> None:
    options = ("--hostname", "mine", "--dns", "10.1.2.3", "--dns-search", "tests", "--add-host", "other:10.9.9.9")
    docker.ok("docker", "run", "-d", "--name", "named", "--runtime", name, *options, BOX, "sleep", "1000")
    (written,) = json.loads(docker.ok("docker", "inspect", "named"))
    for key, path in (("HostnamePath", "hostname"), ("HostsPath", "hosts"), ("ResolvConfPath", "resolv.conf")):
        seen = docker.ok("docker", "exec", "named", "cat", f"/etc/{path}")
        assert seen == docker.ok("cat", written[key])
    assert docker.ok("docker", "exec", "named", "hostname") == "mine\n"
    said = docker.ok("docker", "exec", "named", "cat", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf")
    assert said.startswith("mine\n")
    assert "10.9.9.9\tother\n" in said
    assert f"{written['NetworkSettings']['IPAddress']}\tmine\n" in said
    assert {"nameserver 10.1.2.3", "search tests"} <= {*said.splitlines()}
