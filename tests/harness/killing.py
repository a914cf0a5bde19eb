"""Rounds in which processes of ours are killed at moments that a seeded generator picks.

A round prepares something, starts one operation, kills one or two processes a random while later and then asks: did
output and exit code survive where they had to, is every container that lost its machine stopped with a reason, is
what was there before still there, and is nothing left once all is removed?  The same seed means the same round.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import psutil

from tests.harness import hosts, parents, remainders
from tests.harness.cli import Cli, awaited, title
from tests.harness.netns import namespace
from tests.harness.nurseries import is_nursery
from tests.harness.rounds import OPERATIONS, Round
from tests.harness.spares import keeping_ready, offers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.harness.hosts import Host
    from tests.harness.netns import Netns

#: lines that a counting container prints, and the code it ends with
LINES, CODE = 60, 7
COUNT = f"i=0; while [ $i -lt {LINES} ]; do echo $i; i=$((i+1)); sleep 0.02; done; exit {CODE}"
EXPECTED = "".join(f"{number}\n" for number in range(LINES))
#: keeps a note on its layer from its first life on
SLEEP = "[ -e /note ] || { echo kept > /note; sync; }; exec sleep 100000"
#: seconds a client may take to find out that something died
PATIENCE = 180.0
#: seconds until what `gc` has ended is gone, and until a guest that was told to panic has
GC_PATIENCE, PANIC_PATIENCE = 10.0, 30.0
#: every process title by what a round calls it
TITLES = {
    "supervisor": "vmsandbox supervisor",
    "stand-in": "vmsandbox stand-in",
    "machine": "qemu-system",
    "virtiofsd": "virtiofsd",
    "keeper": "vmsandbox parent",
    "maker": "vmsandbox rehearsal",
    "parent": "qemu-system",
}
#: what 125 stands for: the operation did not come about
FAILED = 125
#: whose death takes the machine along: the agent is process 1 in it, and files that are shared are gone
LOST = frozenset({"machine", "agent", "virtiofsd"})
#: whose death nobody is to notice
UNNOTICED = frozenset({"supervisor", "template", "nursery", "keeper", "maker", "parent"})
#: waits for a line, and then has the guest's kernel do what it does when process 1 dies
CRASH = "echo ready; read line; echo c > /proc/sysrq-trigger"
#: how a container ends that no machine's end took away, by the operation that ends it
ORDERLY = {
    "run": CODE,
    "run with a network": CODE,
    "run in a namespace": CODE,
    "run without its template": CODE,
    "run in what is ready": CODE,
    "run as a fork": CODE,
    "run while a parent is made": CODE,
    "stop": 137,
    "rm": 137,
    "restart": 137,
    "restart as a fork": 137,
    "pod stop": 137,
}


@dataclass
class Ground:
    """Where rounds are played: a command with a container `other` that must notice nothing, and a host of its own."""

    cli: Cli
    host: Host
    #: a network as an engine makes one
    space: Netns
    box: str
    source: Path
    #: the host's network and that one as they were before the first round
    links: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)

    @property
    def other(self) -> str:
        """What names the pod of the container `other`."""
        return str(self.cli.inspect("other")["sandbox"][:12])

    def play(self, seed: int) -> Round:
        """Play a round; an AssertionError says what was lost or left."""
        plan = Round.of(seed)
        try:
            _Play(self, plan).play()
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{plan}: a command hangs: {error.cmd}") from error
        except AssertionError as error:
            raise AssertionError(f"{plan}: {error}") from error
        return plan


@contextmanager
def ground(data_root: Path, box: str) -> Iterator[Ground]:
    """Guest and images are those of `data_root`; templates are a copy, because some rounds remove them."""
    with (
        tempfile.TemporaryDirectory(prefix="vs-") as run,
        tempfile.TemporaryDirectory(prefix="vsd-") as data,
        tempfile.TemporaryDirectory(prefix="vss-") as source,
        namespace(f"vk{os.getpid()}-pod") as space,
        hosts.host(Path(source), name=f"vk{os.getpid()}") as host,
    ):
        space.run("ip link add eth0 type veth peer name peer0; ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up")
        for name in ("guest", "images"):
            Path(data, name).symlink_to(data_root / name)
        subprocess.run(["cp", "-a", "--sparse=always", data_root / "templates", data], check=True)
        cli = Cli(Path(run), Path(data))
        cli.owns_data = True
        cli.prefix = host.prefix
        # Else one is made in the background, beside the first rounds.
        cli.ok("template", "build", timeout=PATIENCE)
        cli.ok("run", "-d", "--name", "other", box, "sleep", "100000")
        Path(source, "file").write_text("the host's\n")
        made = Ground(cli, host, space, box, Path(source), host.state(), space.state())
        try:
            yield made
            assert cli.ok("exec", "other", "echo", "still here") == "still here\n"
        finally:
            cli.remove_all()
            cli("gc", "-q")
        assert cli.leftovers() == []


class _Play:
    def __init__(self, ground: Ground, plan: Round) -> None:
        self.ground = ground
        self.cli = ground.cli
        self.plan = plan
        self.about = OPERATIONS[plan.operation]
        self.random = Random(~plan.seed)
        self.name = f"k{plan.seed}"
        self.pod = f"p{plan.seed}"
        self.killed: set[str] = set()
        #: containers and pods that the round has made, by their ids
        self.ids: set[str] = set()
        #: a process in the guest that ends it when it is told to
        self.crash: subprocess.Popen[bytes] | None = None
        self.code = 0
        self.printed = ""
        self.said = ""

    def play(self) -> None:
        others = {process.pid for process in self._processes()}
        left = self._left()
        # Only until all was looked at: what removes something may have a machine made ready as well.
        with self._kept():
            self._operate(others)
        self._remove(others)
        if self.crash is not None:
            self.crash.communicate(timeout=PATIENCE)
        rows, pods = self.cli.ps(), self.cli.pods()
        assert [row["name"] for row in rows] == ["other"], f"a container is left: {rows}"
        assert pods == [], f"a pod is left: {pods}"
        now = self._left()
        assert now == left, f"something is left, or gone: {sorted(set(now) ^ set(left))}"
        self._assert_host_is_as_it_was()

    def _kept(self) -> AbstractContextManager[None]:
        """Have machines kept for the block that no pod has asked for, where the round is about these."""
        if self.about.prepared == "spare":
            return keeping_ready(self.cli, self.ground.source)
        if self.about.parent:
            return parents.keeping(self.cli, self.ground.source)
        return nullcontext()

    def _operate(self, others: set[int]) -> None:
        """Do what the round is about, kill, and look at what came of it."""
        self._prepare()
        client = self.cli.popen(*self._words(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        printed: list[tuple[bytes, bytes]] = []
        reader = threading.Thread(target=lambda: printed.append(client.communicate()))
        reader.start()
        reader.join(self.plan.delay)
        for victim in self.plan.victims:
            if self._kill(victim, client, others):
                self.killed.add(victim)
        reader.join(PATIENCE)
        if reader.is_alive():
            client.kill()
            raise AssertionError("the client hangs")
        self.code, self.printed, self.said = client.returncode, *(part.decode() for part in printed[0])
        self._check()

    def _processes(self) -> list[psutil.Process]:
        """All that run on the host, whosever they are, but for the nursery, which ends by itself."""
        found = []
        for pid in self.ground.host.processes():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if not is_nursery(process):
                    found.append(process)
        return found

    def _left(self) -> list[str]:
        """All that may be left behind, but for processes."""
        left = [line for line in self.cli.leftovers() if not line.startswith("process")]
        return left + remainders.of(self.cli, {*self.ids, self.ground.other}, gone=self.ids)

    def _assert_host_is_as_it_was(self) -> None:
        assert (self.ground.source / "file").read_text() == "the host's\n"
        if "network" in self.plan.operation:
            assert self.ground.host.state() == self.ground.links
            assert self.ground.host.rules() == []
        if "namespace" in self.plan.operation:
            now, given = self.ground.space.state(), self.ground.given
            assert now == given, f"{now} is left, where {given} was"

    # ------------------------------------------------------------ the operation

    def _prepare(self) -> None:
        cli = self.cli
        self._prepare_parent()
        match self.about.prepared:
            case "container":
                self._run_sleeper(self.name)
                assert not self.about.parent or cli.inspect(self.name)["pod"]["boot"] == "fork"
            case "stopped":
                self._run_sleeper(self.name)
                cli.ok("stop", "-t", "0", self.name)
            case "pod":
                cli.ok("pod", "create", "--name", self.pod)
                self._run_sleeper(f"{self.pod}a", "--pod", self.pod)
                if self.plan.operation == "start in a pod":
                    self._run_sleeper(self.name, "--pod", self.pod)
                    cli.ok("stop", "-t", "0", self.name)
            case "spare":
                cli.ok("run", "--rm", self.ground.box, "true")
                awaited(lambda: offers(cli))
        if "agent" in self.plan.victims:
            within = self.name if self.about.prepared == "container" else f"{self.pod}a"
            words = ("exec", "-i", "--privileged", within, "sh", "-c", CRASH)
            self.crash = cli.popen(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert self.crash.stdout is not None
            assert self.crash.stdout.readline() == b"ready\n"

    def _prepare_parent(self) -> None:
        if not self.about.parent:
            return
        if self.about.parent == "explicit":
            # Rounds before may have removed it.
            self.cli.ok("template", "build", "--pod", timeout=PATIENCE)
        kind = "explicit" if self.about.parent == "explicit" else "shareable" if self.plan.shared else "private"
        parents.make(self.cli, self.ground.box, kind, self.ground.source)
        if self.about.parent != "coming":
            parents.await_offers(self.cli.run_root)

    def _run_sleeper(self, name: str, *options: str) -> None:
        """Start a container that stays, and has written its note."""
        words = (*options, *self._volume(), "--privileged", self.ground.box, "sh", "-c", SLEEP)
        self.cli.ok("run", "-d", "--name", name, *words)
        self.cli.ok("exec", name, "sh", "-c", "until [ -s /note ]; do sleep 0.05; done; sync")

    def _volume(self) -> tuple[str, ...]:
        return ("-v", f"{self.ground.source}:/data") if self.plan.shared else ()

    def _words(self) -> tuple[str, ...]:
        name, pod = self.name, self.pod
        count = (*self._volume(), self.ground.box, "sh", "-c", COUNT)
        return {
            "run": ("run", "--name", name, *count),
            "create": ("create", "--name", name, *count),
            "exec": ("exec", name, "sh", "-c", COUNT),
            "stop": ("stop", "-t", "1", name),
            "rm": ("rm", "-f", name),
            "start": ("start", name),
            "restart": ("restart", "-t", "1", name),
            "run with a network": ("run", "--name", name, "--network", "default", "-p", "8080:80", *count),
            "run in a namespace": ("run", "--name", name, "--network", f"ns:{self.ground.space.path}", *count),
            "pod create": ("pod", "create", "--name", pod),
            "run in a pod": ("run", "--pod", pod, "--name", name, *count),
            "create in a pod": ("create", "--pod", pod, "--name", name, *count),
            "start in a pod": ("start", name),
            "pod stop": ("pod", "stop", pod),
            "pod rm": ("pod", "rm", "-f", pod),
            "template build": ("template", "build", "--force"),
            "run without its template": ("run", "--name", name, *count),
            "run in what is ready": ("run", "--name", name, *count),
            "run as a fork": ("run", "--name", name, *count),
            "create as a fork": ("create", "--name", name, *count),
            "restart as a fork": ("restart", "-t", "1", name),
            "pod create as a fork": ("pod", "create", "--name", pod),
            "run while a parent is made": ("run", "--name", name, *count),
        }[self.plan.operation]

    def _kill(self, victim: str, client: subprocess.Popen[bytes], others: set[int]) -> bool:
        """Kill a process of this round; False if there is none at this moment."""
        if victim == "client":
            if client.poll() is not None:
                return False
            client.kill()
            return True
        if victim == "agent":
            return self._crash(others)
        if victim == "template":
            for row in json.loads(self.cli.ok("template", "ls", "--format", "json")):
                self.cli.ok("template", "rm", row["key"])
            return True
        found = [process for process in self.cli.processes() if process.pid not in others]
        if victim == "nursery":
            found = list(psutil.process_iter())
        self.random.shuffle(found)
        for process in found:
            try:
                if self._is(victim, process):
                    os.kill(process.pid, signal.SIGKILL)
                    return True
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        return False

    def _is(self, victim: str, process: psutil.Process) -> bool:
        """Whether a process is what a round calls so."""
        line = title(process)
        if victim in ("machine", "parent"):
            names = [path.name for path in parents.directories(self.cli.run_root)]
            kept = any(f"guest=vmsandbox-{name}," in line for name in names)
            return TITLES[victim] in line and kept == (victim == "parent")
        return TITLES.get(victim, f"vmsandbox nursery {self.cli.run_root}") in line

    def _crash(self, others: set[int]) -> bool:
        """Have the guest's kernel panic, as it does when process 1 dies; False if there is nothing left to do that."""
        assert self.crash is not None
        assert self.crash.stdin is not None
        machines = [each for each in self.cli.processes() if each.pid not in others and self._is("machine", each)]
        try:
            self.crash.stdin.write(b"\n")
            self.crash.stdin.flush()
        except BrokenPipeError:
            return False
        return bool(psutil.wait_procs(machines, timeout=PANIC_PATIENCE)[0])

    # ------------------------------------------------------------ what must hold

    def _check(self) -> None:
        """Before anything is tidied up."""
        CHECKS.get(self.plan.operation, _Play._check_run)(self)

    def _status(self) -> str | None:
        rows = {row["name"]: row["status"] for row in self.cli.ps()}
        assert "other" in rows
        found: str | None = rows.get(self.name)
        return found

    def _check_run(self) -> None:
        status = self._status()
        if status is None:
            return
        came_about = self.code != FAILED
        if self.killed <= UNNOTICED and came_about:
            # It was running, so nothing may show that its supervisor died.
            assert (self.code, self.printed) == (CODE, EXPECTED), self.said
            assert self.cli.ok("logs", self.name) == EXPECTED
        if self.killed == {"client"} and self.about.prepared != "pod" and status != "created":
            assert self.cli.ok("wait", self.name) == f"{CODE}\n"
            assert self.cli.ok("logs", self.name) == EXPECTED
        if not self.killed:
            assert (self.code, self.printed) == (CODE, EXPECTED), self.said
        self._check_lost_machine()

    def _check_lost_machine(self) -> None:
        status = self._status()
        if not self.killed & LOST or self.about.prepared == "pod" or status is None:
            return
        if self.plan.operation.startswith("create") and self._is_created_all_the_same():
            return
        # One that never came about is forgotten, and what a killed client wanted removed may be so at any moment.
        may_go = status == "creating" or (self.plan.operation == "rm" and "client" in self.killed)
        try:
            assert self.cli.ok("wait", self.name, timeout=PATIENCE)
            self._assert_ended_with_a_reason(self.name)
        except AssertionError:
            if not may_go or self._status() is not None:
                raise

    def _assert_ended_with_a_reason(self, name: str) -> None:
        """The container has ended with its machine and says so, unless it had ended before, as it should."""
        found = self.cli.inspect(name)
        assert found["status"] == "stopped", found
        orderly = {ORDERLY.get(self.plan.operation)}
        if "stand-in" in self.killed:
            orderly.add(137)  # in another machine, where it was the first clone that died
        told = found["exit"].get("reason") or found["exit"]["code"] in orderly
        assert told, f"the client ended with {self.code} and said '{self.said}': {found}"

    def _is_created_all_the_same(self) -> bool:
        """A clone that is killed is no loss: the pod boots without its template instead."""
        deadline = time.monotonic() + PATIENCE
        while (status := self._status()) == "creating":
            assert time.monotonic() < deadline, "a container is created for ever"
        if status != "created":
            return status is None
        vm = self.cli.inspect(self.name)["pod"].get("vm") or {}
        return psutil.pid_exists(vm.get("pid") or -1)

    def _check_create(self) -> None:
        if not self.killed:
            assert (self.code, self._status()) == (0, "created"), self.said
        self._check_lost_machine()

    def _check_exec(self) -> None:
        if self.killed <= {"supervisor"} and self.code not in (FAILED, 255):
            assert (self.code, self.printed) == (CODE, EXPECTED), self.said
        if self.killed <= {"supervisor", "client"}:
            self._assert_kept(self.name)
        self._check_lost_machine()

    def _check_stop(self) -> None:
        assert self._status() is not None
        if self.killed <= {"supervisor", "client"}:
            self._assert_kept(self.name)
        self._check_lost_machine()

    def _check_start(self) -> None:
        assert self._status() is not None, "a container that was there is not listed"
        if not self.killed:
            assert (self.code, self._status()) == (0, "running"), self.said
        if self.killed & LOST and self._status() != "stopped":
            self.cli.ok("stop", "-t", "0", self.name)
        self._assert_kept(self.name)

    def _assert_kept(self, name: str) -> None:
        """What was on the layer of a container is there, in a later life if this one is over."""
        for _ in range(100):
            if self._status_of(name) == "stopped":
                started = self.cli("start", name)
                # Its killed client may have had it started just now.
                assert started.code == 0 or "being started" in started.stderr or "is running" in started.stderr, started
                continue
            # Of one life: what the killed client had asked for may end it at any moment.
            shown = self.cli("exec", name, "cat", "/note", *(["/data/file"] if self.plan.shared else []))
            if shown.code == 0:
                assert shown.stdout == ("kept\nthe host's\n" if self.plan.shared else "kept\n")
                return
            # Or its machine was killed just now.
            assert self.killed & {"client", *LOST}, shown
            awaited(lambda: self._status_of(name) == "stopped")
        raise AssertionError(f"'{name}' does not stay running")

    def _status_of(self, name: str) -> str:
        statuses: dict[str, str] = {row["name"]: row["status"] for row in self.cli.ps()}
        return statuses[name]

    def _check_pod(self) -> None:
        names = [pod["name"] for pod in self.cli.pods()]
        match self.plan.operation:
            case "pod create" | "pod create as a fork":
                assert self.killed or (self.code, names) == (0, [self.pod]), self.said
                return
            case "pod rm":
                assert self.killed or names == [], self.said
                return
            case "pod stop":
                assert self.killed or self.cli.pods()[0]["status"] == "stopped", self.said
            case "start in a pod":
                self._check_start()
            case "create in a pod":
                self._check_create()
            case _:
                self._check_run()
        assert names == [self.pod], "a pod that was there is not listed"
        first = f"{self.pod}a"
        if self.killed & LOST and self._status_of(first) == "stopped":
            self._assert_ended_with_a_reason(first)
        self._assert_kept(first)

    def _check_template(self) -> None:
        """Whatever there is now is whole; one that was killed while it was made changes nothing."""
        assert self.killed or self.code == 0, self.said
        self.cli.ok("run", "--rm", self.ground.box, "true")

    # ------------------------------------------------------------ the end

    def _remove(self, others: set[int]) -> None:
        """Remove what there is; one `gc` takes what nobody owns any more."""
        deadline = time.monotonic() + PATIENCE
        while True:
            listed, busy = self._remove_listed(), self._busy(others)
            if not listed and not busy:
                break
            # What a killed client had asked for may come about only now, and is to be removed then.
            assert time.monotonic() < deadline, f"does not end: {busy}"
            psutil.wait_procs(busy, timeout=1)
        self._age()
        self.cli.ok("gc", "-q")
        psutil.wait_procs([each for each in self._processes() if each.pid not in others], timeout=GC_PATIENCE)
        left = [each for each in self._processes() if each.pid not in others]
        assert {process.pid for process in self._processes()} == others, left
        if "template" in (*self.killed, *self.plan.operation.split()):
            self.cli.ok("template", "build", timeout=PATIENCE)
            self.cli.ok("run", "--rm", "--template", "require", self.ground.box, "true")

    def _remove_listed(self) -> bool:
        """Remove all containers and pods but `other`; says whether there were any."""
        found = False
        for pods, rows in (((), self.cli.ps()), (("pod",), self.cli.pods())):
            for row in rows:
                if row["name"] != "other":
                    found = True
                    self.ids.add(row["id"][:12])
                    result = self.cli(*pods, "rm", "-f", row["id"])
                    assert result.code == 0 or "no such" in result.stderr, result
        return found

    def _busy(self, others: set[int]) -> list[psutil.Process]:
        """Processes of the round that end by themselves once there is nothing left for them to do."""
        working = ("vmsandbox supervisor ", "vmsandbox stand-in ")
        return [each for each in self._processes() if each.pid not in others and title(each).startswith(working)]

    def _age(self) -> None:
        """What is new might be in use, for a while: let it be old."""
        run, data = self.cli.run_root, self.cli.data_root
        for path in [*run.glob("[scnpruo]/*"), *data.glob("containers/*"), *data.glob("spares/*")]:
            with suppress(FileNotFoundError):
                os.utime(path, (1, 1), follow_symlinks=False)


CHECKS: dict[str, Callable[[_Play], None]] = {
    "create": _Play._check_create,
    "exec": _Play._check_exec,
    "stop": _Play._check_stop,
    "rm": _Play._check_lost_machine,
    "start": _Play._check_start,
    "restart": _Play._check_start,
    "restart as a fork": _Play._check_start,
    "create as a fork": _Play._check_create,
    "pod create as a fork": _Play._check_pod,
    "pod create": _Play._check_pod,
    "run in a pod": _Play._check_pod,
    "create in a pod": _Play._check_pod,
    "start in a pod": _Play._check_pod,
    "pod stop": _Play._check_pod,
    "pod rm": _Play._check_pod,
    "template build": _Play._check_template,
}
