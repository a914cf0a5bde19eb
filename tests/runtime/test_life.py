"""A container's life by the runtime's own verbs: what an engine sees of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.harness.cli import TIMEOUT, title
from tests.harness.terminals import typed
from vmsandbox import wire
from vmsandbox.cli.runtime.static import default_spec
from vmsandbox.supervisor.bundled import MEMORY_NODES
from vmsandbox.supervisor.ending import KILL_TIMEOUT
from vmsandbox.supervisor.execution import EXEC_TIMEOUT

if TYPE_CHECKING:
    from tests.harness.bundles import Runtime

CGROUPS = Path("/sys/fs/cgroup")
OBEDIENT = 'trap "echo ended; exit 7" TERM; echo up; sleep 100000 & wait'


def vcpu_affinities(runtime: Runtime) -> list[set[int]]:
    """Where the host lets each vCPU of the only pod run."""
    document = json.loads(next(runtime.root.glob("s/*/sandbox.json")).read_text())
    tasks = Path(f"/proc/{document['vm']['pid']}/task").iterdir()
    return [os.sched_getaffinity(int(task.name)) for task in tasks if (task / "comm").read_text().startswith("CPU ")]


def kinds_of(events: Path) -> list[str]:
    """What was told, line by line; one that is not finished is left out."""
    return [json.loads(line)["type"] for line in events.read_text().rpartition("\n")[0].splitlines()]


def test_a_container_lives_as_the_specification_says(runtime: Runtime, box_rootfs: Path) -> None:
    parent = f"/vs-{os.getpid()}"
    mems = MEMORY_NODES.read_text().strip() if MEMORY_NODES.exists() else "0"
    linux = {
        **default_spec()["linux"],
        "cgroupsPath": f"{parent}/one",
        "resources": {"cpu": {"cpus": "0", "mems": mems}},
    }
    bundle = runtime.bundle("one", box_rootfs, "sh", "-c", OBEDIENT, annotations={"a": "b"}, linux=linux)
    output = runtime.scratch / "out"
    with output.open("wb") as stdout:
        pid = runtime.create("one", bundle, stdout=stdout)

    # created: the program does not run, and everything is told as runc tells it
    state = runtime.state("one")
    assert list(state) == ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner"]
    assert (state["pid"], state["status"], state["bundle"]) == (pid, "created", str(bundle))
    assert output.read_bytes() == b""
    assert psutil.Process(pid).cmdline()[0].startswith("vmsandbox stand-in one")
    assert runtime.refused("create", "--bundle", str(bundle), "one") == "container with given ID already exists"

    # all that the host has of it is in the cgroup it was given, without its limits, and its processors are bound
    for place in CGROUPS.glob(f"*{parent}/one"):
        names = {psutil.Process(int(number)).name() for number in (place / "cgroup.procs").read_text().split()}
        assert names >= {"vmsandbox-super", "qemu-system-x86_64", "virtiofsd", "vmsandbox-stand"}, (place, names)
    assert vcpu_affinities(runtime) == [{0}]

    # later edits of config.json change nothing
    (bundle / "config.json").write_text("{}")
    runtime.ok("start", "one")
    assert runtime.state("one")["status"] == "running"
    assert runtime.refused("start", "one") == "cannot start an already running container"
    assert runtime.refused("delete", "one") == "cannot delete container one that is not stopped: running"
    assert runtime.ok("list", "-q").split() == ["one"]
    assert json.loads(runtime.ok("ps", "--format", "json", "one")) == [pid]

    # other processes of it
    process = json.dumps({"args": ["sh", "-c", "cat; id -u; exit 5"], "cwd": "/", "user": {"uid": 1000, "gid": 1000}})
    (bundle / "process.json").write_text(process)
    done = runtime("exec", "--process", str(bundle / "process.json"), "one", stdin=b"fed ")
    assert (done.code, done.stdout) == (5, "fed 1000\n")
    done = runtime("exec", "-e", "A=b c", "--cwd", "/tmp", "one", "sh", "-c", "echo $A; pwd")
    assert (done.code, done.stdout) == (0, "b c\n/tmp\n")
    for words in (("one", "nosuch"), ("-e", "PATH=/nowhere", "one", "true"), ("-e", "PATH=", "one", "true")):
        assert "executable file not found in $PATH" in runtime.refused("exec", *words)
    assert "no such file or directory" in runtime.refused("exec", "one", "/nosuch")
    assert "permission denied" in runtime.refused("exec", "one", "/etc/not-executable")

    # limits
    runtime.ok("update", "--resources", "-", "one", stdin=b'{"memory": {"limit": 104857600}, "cpu": {"shares": 0}}')
    assert runtime.ok("exec", "one", "cat", "/sys/fs/cgroup/memory.max") == "104857600\n"
    runtime.ok("update", "--cpuset-cpus", "0-1", "one")
    assert vcpu_affinities(runtime) == [{0, 1}]
    assert "no processor 8191" in runtime.refused("update", "--cpuset-cpus", "0,8191", "one")
    runtime.ok("update", f"--cpuset-mems={mems}", "one")
    assert "no memory node 1023" in runtime.refused("update", "--cpuset-mems", "1023", "one")
    stats = json.loads(runtime.ok("events", "--stats", "one"))
    assert stats["data"]["memory"]["usage"]["limit"] == 104857600
    runtime.ok("pause", "one")
    assert runtime.state("one")["status"] == "paused"
    assert "paused" in runtime.refused("exec", "one", "true")
    assert runtime.refused("pause", "one") == "container not running"
    runtime.ok("resume", "one")

    # the end
    assert "unknown signal" in runtime.refused("kill", "one", "NOSUCH")
    runtime.ok("kill", "one", "SIGTERM")
    runtime.await_status("one", "stopped")
    assert output.read_bytes() == b"up\nended\n"
    assert runtime.state("one")["pid"] == 0
    assert runtime.refused("kill", "one", "TERM") == "container not running"
    runtime.ok("kill", "--all", "one", "9")
    assert runtime.refused("exec", "one", "true") == "cannot exec in a stopped container"
    runtime.ok("delete", "one")
    assert [*CGROUPS.glob(f"*{parent}")] == []
    assert runtime.refused("delete", "one") == "container does not exist"
    assert runtime.refused("state", "one") == "container does not exist"
    runtime.ok("delete", "--force", "one")


def test_an_update_changes_all_of_its_limits_or_none(runtime: Runtime, box_rootfs: Path) -> None:
    bundle = runtime.bundle("one", box_rootfs, "sleep", "100000")
    runtime.create("one", bundle)
    runtime.ok("start", "one")

    def limits() -> list[str]:
        names = ("memory.max", "pids.max", "cpu.max", "cpu.max.burst", "cpu.idle", "cpu.weight")
        return runtime.ok("exec", "one", "cat", *(f"/sys/fs/cgroup/{name}" for name in names)).split("\n")[:-1]

    before = limits()
    wanted = {
        "memory": {"limit": 100 << 20},
        "pids": {"limit": 77},
        "cpu": {"quota": 50000, "period": 100000, "shares": 512},
        "unified": {"memory.high": "nonsense"},
    }
    assert "memory.high" in runtime.refused("update", "-r", "-", "one", stdin=json.dumps(wanted).encode())
    assert limits() == before
    del wanted["unified"]
    runtime.ok("update", "-r", "-", "one", stdin=json.dumps(wanted).encode())
    runtime.ok("update", "--cpu-burst", "20000", "one")
    assert limits()[:4] == ["104857600", "77", "50000 100000", "20000"]
    runtime.ok("update", "--cpu-idle", "1", "one")
    assert limits()[4] == "1"
    runtime.ok("update", "--cpu-idle", "0", "--cpu-burst", "0", "one")
    assert limits()[3:5] == ["0", "0"]


def test_what_is_not_given_is_warned_of(runtime: Runtime, box_rootfs: Path) -> None:
    bundle = runtime.bundle("one", box_rootfs, "sleep", "100000")
    document = json.loads((bundle / "config.json").read_text())
    document["process"]["capabilities"]["bounding"].append("CAP_NOSUCH")
    (bundle / "config.json").write_text(json.dumps(document))
    runtime.create("one", bundle)
    runtime.ok("start", "one")
    runtime.ok("exec", "--cap", "CAP_NEITHER", "one", "true")
    warnings = [json.loads(line) for line in runtime.log.read_text().splitlines()]
    assert [(each["level"], each["msg"].split("'")[3]) for each in warnings] == [
        ("warning", "CAP_NOSUCH"),
        ("warning", "CAP_NOSUCH"),
        ("warning", "CAP_NEITHER"),
    ]


def test_run_waits_and_ends_as_the_program_does(runtime: Runtime, box_rootfs: Path) -> None:
    shared = runtime.scratch / "shared"
    shared.mkdir()
    (shared / "there").write_text("of the host\n")
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/s", "type": "bind", "source": str(shared), "options": ["rbind", "ro"]},
        {"destination": "/w", "type": "bind", "source": str(shared), "options": ["rbind", "rw"]},
    ]
    script = "cat; cat /s/there; touch /s/x 2>/dev/null || echo refused; touch /w/made; hostname; exit 3"
    bundle = runtime.bundle("two", box_rootfs, "sh", "-c", script, mounts=mounts, hostname="named")
    done = runtime("run", "--bundle", str(bundle), "two", stdin=b"input\n")
    assert (done.code, done.stdout) == (3, "input\nof the host\nrefused\nnamed\n"), (done, runtime.said())
    assert (shared / "made").exists()


def test_hooks_see_the_container_and_its_network(runtime: Runtime, box_rootfs: Path) -> None:
    """A hook gives the namespace an interface, as docker's does; the guest then has it."""
    told = runtime.scratch / "told"
    script = (
        f"cat > {told}; pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/' {told}); "
        "in='nsenter -t '$pid' -n ip'; $in link add eth0 type veth peer name other && "
        "$in addr add 10.9.8.7/24 dev eth0 && $in link set eth0 up"
    )
    after = runtime.scratch / "after"
    hooks = {
        "prestart": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}],
        "poststop": [{"path": "/bin/sh", "args": ["sh", "-c", f"cat > {after}"]}],
    }
    bundle = runtime.bundle("three", box_rootfs, "ip", "-o", "-4", "addr", "show", "eth0", hooks=hooks)
    done = runtime("run", "--bundle", str(bundle), "three")
    assert "10.9.8.7/24" in done.stdout, (done, runtime.said())
    assert json.loads(told.read_text())["bundle"] == str(bundle)
    assert json.loads(after.read_text())["status"] == "stopped"


@pytest.mark.parametrize("name", ["prestart", "createRuntime", "createContainer"])
def test_a_failed_hook_leaves_nothing_and_is_undone_by_poststop(runtime: Runtime, box_rootfs: Path, name: str) -> None:
    after = runtime.scratch / "after"
    hooks = {
        name: [{"path": "/bin/sh", "args": ["sh", "-c", "echo because; exit 4"]}],
        "poststop": [{"path": "/bin/sh", "args": ["sh", "-c", f"cat > {after}"]}],
    }
    bundle = runtime.bundle("four", box_rootfs, "true", hooks=hooks)
    message = runtime.refused("create", "--bundle", str(bundle), "four")
    assert "failed with status 4: because" in message
    assert runtime.leftovers() == []
    told = json.loads(after.read_text())
    assert (told["id"], told["status"], told["pid"]) == ("four", "stopped", 0)


def test_hooks_run_in_order_and_those_that_change_nothing_any_more_only_warn(
    runtime: Runtime, box_rootfs: Path
) -> None:
    order, inside = runtime.scratch / "order", runtime.scratch / "inside"

    #: crun has started a container before the hook in it has run
    there = f"until [ -s {inside} ]; do sleep 0.1; done"

    def noting(name: str, ending: str = "true") -> dict[str, Any]:
        return {"path": "/bin/sh", "args": ["sh", "-c", f"echo {name} >> {order}; {ending}"]}

    hooks: dict[str, Any] = {name: [noting(name)] for name in ("prestart", "createRuntime", "createContainer")}
    hooks["startContainer"] = [{"path": "/bin/sh", "args": ["sh", "-c", "echo startContainer >> /shared/inside"]}]
    hooks["poststart"] = [noting("poststart", f"{there}; head -n 1 {inside} >> {order}; exit 6"), noting("poststart2")]
    hooks["poststop"] = [{**noting("poststop", "exec sleep 1000"), "timeout": 1}, noting("poststop2")]
    share = {"destination": "/shared", "type": "bind", "source": str(runtime.scratch), "options": ["rbind", "rw"]}
    script = "echo program >> /shared/inside; read _"
    bundle = runtime.bundle("five", box_rootfs, "sh", "-c", script, hooks=hooks, mounts=[share])
    reading, writing = os.pipe()
    runtime.create("five", bundle, stdin=reading)
    os.close(reading)
    runtime.ok("start", "five")
    assert "poststart hook #0 '/bin/sh' failed with status 6" in runtime.log.read_text()
    os.close(writing)
    runtime.await_status("five", "stopped")
    runtime.ok("delete", "five")
    assert "poststop hook #0 '/bin/sh' did not end within 1 s" in runtime.log.read_text()
    before = ["prestart", "createRuntime", "createContainer"]
    after = ["poststart", "startContainer", "poststart2", "poststop", "poststop2"]
    assert order.read_text().split() == [*before, *after]
    assert inside.read_text().split() == ["startContainer", "program"]


def test_a_hook_that_does_not_end_in_time_refuses_the_container(runtime: Runtime, box_rootfs: Path) -> None:
    hooks = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}]}
    bundle = runtime.bundle("four", box_rootfs, "true", hooks=hooks)
    message = runtime.refused("create", "--bundle", str(bundle), "four")
    assert message == "createRuntime hook #0 '/bin/sleep' did not end within 1 s"
    assert runtime.leftovers() == []


def test_a_failed_hook_in_the_container_lets_its_program_not_run(runtime: Runtime, box_rootfs: Path) -> None:
    after = runtime.scratch / "after"
    hooks = {
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "exit 4"]}],
        "poststop": [{"path": "/bin/sh", "args": ["sh", "-c", f"cat > {after}"]}],
    }
    bundle = runtime.bundle("four", box_rootfs, "sh", "-c", "echo ran", hooks=hooks)
    output = runtime.scratch / "out"
    with output.open("wb") as stdout:
        runtime.create("four", bundle, stdout=stdout)
    runtime("start", "four")
    runtime.await_status("four", "stopped")
    assert not after.exists()
    runtime.ok("delete", "four")
    assert output.read_bytes() == b""
    assert json.loads(after.read_text())["status"] == "stopped"


def test_a_container_whose_pid_nobody_can_be_told_is_not_left(runtime: Runtime, box_rootfs: Path) -> None:
    bundle = runtime.bundle("four", box_rootfs, "sleep", "1000")
    words = ("create", "--bundle", str(bundle), "--pid-file", "/nosuch/pid", "four")
    said = runtime.refused(*words, timeout=KILL_TIMEOUT)
    assert said == "cannot write pid file '/nosuch/pid': No such file or directory"
    assert runtime.leftovers() == []


def test_who_kills_the_stand_in_kills_the_container(runtime: Runtime, box_rootfs: Path) -> None:
    bundle = runtime.bundle("five", box_rootfs, "sleep", "1000")
    pid = runtime.create("five", bundle)
    runtime.ok("start", "five")
    assert os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
    # Whoever joins its view of files sees the container's root and nothing of the host, processes included.
    assert sorted(os.listdir(f"/proc/{pid}/root")) == sorted(os.listdir(box_rootfs))
    assert [name for name in os.listdir(f"/proc/{pid}/root/proc") if name.isdigit()] == ["1"]
    assert os.stat(f"/proc/{pid}/ns/pid").st_ino != os.stat("/proc/self/ns/pid").st_ino
    assert psutil.Process(pid).cmdline()[0].startswith("vmsandbox stand-in five: sleep 1000")
    psutil.Process(pid).kill()
    runtime.await_status("five", "stopped")
    runtime.ok("delete", "five")


def test_a_pod_outlives_its_supervisor_and_who_could_start_another(runtime: Runtime, box_rootfs: Path) -> None:
    """A stand-in is in namespaces where no supervisor may be: what is outside for it starts one, or the next verb."""
    script = "echo one; read x; echo $x; read x; echo $x; exit 5"
    bundle = runtime.bundle("eight", box_rootfs, "sh", "-c", script)
    reading, writing = os.pipe()
    output = runtime.scratch / "out"
    with output.open("wb") as stdout:
        pid = runtime.create("eight", bundle, stdin=reading, stdout=stdout)
    os.close(reading)
    runtime.ok("start", "eight")
    home = os.stat("/proc/self/ns/pid").st_ino
    first = runtime.supervisor()
    first.kill()
    first.wait()
    os.write(writing, b"two\n")
    second = runtime.supervisor(other_than=first.pid)
    assert os.stat(f"/proc/{second.pid}/ns/pid").st_ino == home
    assert os.stat(f"/proc/{second.pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino

    for each in psutil.process_iter():
        if title(each).startswith("vmsandbox starter eight"):
            each.kill()
    second.kill()
    assert runtime.state("eight")["pid"] == pid
    assert runtime.ok("exec", "eight", "echo", "there") == "there\n"
    os.write(writing, b"three\n")
    os.close(writing)
    runtime.await_status("eight", "stopped")
    assert output.read_bytes() == b"one\ntwo\nthree\n"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    runtime.ok("delete", "eight")


def test_many_processes_at_once_and_too_large_ones(runtime: Runtime, box_rootfs: Path) -> None:
    """Each of 100 execs has its own output and status; what needs too much memory is killed, and told of."""
    linux = {**default_spec()["linux"], "resources": {"memory": {"limit": 48 << 20}}}
    script = 'trap "exec tail /dev/zero" TERM; sleep 100000 & wait'
    bundle = runtime.bundle("nine", box_rootfs, "sh", "-c", script, linux=linux)
    pid = runtime.create("nine", bundle)
    runtime.ok("start", "nine")
    events = runtime.scratch / "events"
    with events.open("wb") as stdout:
        following = subprocess.Popen(runtime.argv("events", "--interval", "300ms", "nine"), stdout=stdout, env={})

    argv = [runtime.argv("exec", "nine", "sh", "-c", f"echo {n}; exit {n}") for n in range(100)]
    crowd = [
        subprocess.Popen(each, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={})
        for each in argv
    ]
    said = [process.communicate(timeout=3 * TIMEOUT) for process in crowd]
    assert said == [(f"{n}\n".encode(), b"") for n in range(100)], runtime.said()
    assert [process.returncode for process in crowd] == [*range(100)]

    done = typed(runtime.argv("exec", "-t", "nine", "sh", "-c", "stty size; read x; echo got $x; exit 4"))
    assert (done.code, "31 97" in done.stdout, "got word\r\n" in done.stdout) == (4, True, True), done
    lines = runtime.ok("ps", "nine", "-o", "pid,args").splitlines()
    assert (lines[0].split(), lines[1].split()[:2]) == (["PID", "COMMAND"], ["1", "sh"])
    assert "'-p' of ps(1) is not supported" in runtime.refused("ps", "nine", "-p", "1")

    assert runtime("exec", "nine", "tail", "/dev/zero").code == 137
    while (kinds := kinds_of(events))[-1:] != ["stats"] or "oom" not in kinds:
        assert runtime.state("nine")["status"] == "running"
    runtime.ok("kill", "nine", "TERM")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 137
    assert following.wait(TIMEOUT) == 0
    kinds = kinds_of(events)
    assert kinds.count("oom") >= 2, kinds
    assert kinds[-1] == "oom"
    assert kinds.count("stats") > 2
    runtime.ok("delete", "nine")


def test_a_container_may_have_the_callers_terminal(runtime: Runtime, box_rootfs: Path) -> None:
    bundle = runtime.bundle("ten", box_rootfs, "sh", "-c", "tty; stty size; read x; echo got $x; exit 4")
    document = json.loads((bundle / "config.json").read_text())
    document["process"]["terminal"] = True
    (bundle / "config.json").write_text(json.dumps(document))
    done = typed(runtime.argv("run", "--bundle", str(bundle), "ten"))
    assert (done.code, "31 97" in done.stdout, "got word\r\n" in done.stdout) == (4, True, True), done


def test_containers_of_a_pod_share_one_machine(runtime: Runtime, box_rootfs: Path) -> None:
    ids = {"io.kubernetes.cri.sandbox-id": "pause"}
    sandbox = runtime.bundle(
        "pause",
        box_rootfs,
        "sleep",
        "1000",
        annotations={"io.kubernetes.cri.container-type": "sandbox", **ids},
        hostname="podname",
    )
    pid = runtime.create("pause", sandbox)
    runtime.ok("start", "pause")
    said = []
    for name in ("first", "second"):
        script = "hostname; cat /proc/sys/kernel/random/boot_id"
        bundle = runtime.member(name, box_rootfs, "sh", "-c", script, pod="pause", pid=pid)
        said.append(runtime.ok("run", "--bundle", str(bundle), name))
    assert said[0] == said[1]
    assert said[0].startswith("podname\n")
    assert runtime.ok("list", "-q").split() == ["pause"]
    assert len([*runtime.root.glob("s/*")]) == 1
    # A stand-in whose container never comes to be, because its creation was refused, holds up no end.
    with socket.socket(socket.AF_UNIX) as standin:
        standin.settimeout(TIMEOUT)
        standin.connect(str(next(runtime.root.glob("s/*/control.sock"))))
        standin.sendall(wire.encode_message({"verb": "attach", "container": "nosuch"}))
        runtime.ok("delete", "--force", "pause", timeout=EXEC_TIMEOUT / 2)
        frame = wire.receive(standin)
    assert frame is not None
    assert frame.message() == {"unknown": True}


def test_a_console_socket_gets_the_terminal(runtime: Runtime, box_rootfs: Path) -> None:
    import array

    bundle = runtime.bundle("six", box_rootfs, "sh", "-c", "tty; stty size; read line; echo got $line; exit 9")
    document = json.loads((bundle / "config.json").read_text())
    document["process"].update(terminal=True, consoleSize={"width": 91, "height": 17})
    (bundle / "config.json").write_text(json.dumps(document))
    assert "console socket" in runtime.refused("create", "--bundle", str(bundle), "six")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(bundle / "console"))
        listener.listen()
        runtime.create("six", bundle, "--console-socket", str(bundle / "console"))
        connection, _ = listener.accept()
    with connection:
        _, ancillary, _, _ = connection.recvmsg(64, socket.CMSG_SPACE(4))
    master = array.array("i", ancillary[0][2])[0]
    runtime.ok("start", "six")
    os.write(master, b"word\n")
    said = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:
            break
        said += piece
    os.close(master)
    lines = said.decode().split("\r\n")
    assert "17 91" in lines
    assert "got word" in lines
    runtime.await_status("six", "stopped")


def test_stdio_may_be_closed_and_descriptors_leaked(runtime: Runtime, box_rootfs: Path) -> None:
    bundle = runtime.bundle("seven", box_rootfs, "true")
    argv = runtime.argv("run", "--bundle", str(bundle), "seven")
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&- 5</dev/null', "sh", *argv], timeout=TIMEOUT, check=False)
    assert done.returncode == 0
