"""Pods as forks of a machine that stands still: each its own machine, and what fails is never worse than a clone."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import resource
import signal
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.harness import hosts, identities, parents
from tests.harness.cli import Cli, awaited, kill, title, wait_until_gone
from tests.harness.nurseries import end_nursery
from tests.harness.spares import end_all as end_spares
from tests.harness.spares import offers as spares
from vmsandbox_hypervisor.kernel import constant_pieces

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cloned

FORKS = 8
SETTINGS = "[sandbox]\nforks = true\n"


@contextmanager
def using(cli: Cli, settings: str = SETTINGS) -> Iterator[Cli]:
    """A command whose pods may be forked; afterwards nothing of it may be left."""
    cli.config = cli.run_root / "config.toml"
    cli.config.write_text(settings)
    yield cli
    cli.remove_all()
    cli("gc", "-q")
    assert cli.leftovers() == []


@pytest.fixture
def forking(data_root: Path, box: str, pod_template: None) -> Iterator[Cli]:
    """The command with a run root of its own, whose parents do not end while a slow machine does something else."""
    with (
        tempfile.TemporaryDirectory(prefix="vs-") as scratch,
        using(Cli(Path(scratch), data_root)) as cli,
        parents.kept(cli.run_root),
    ):
        yield cli


@pytest.fixture(scope="module")
def shared(data_root: Path, box: str, pod_template: None) -> Iterator[Cli]:
    """The command where a parent of private pods stands, for tests that do not harm it."""
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch, using(Cli(Path(scratch), data_root)) as cli:
        parent_of(cli, box)
        with parents.kept(cli.run_root):
            yield cli


@pytest.fixture
def apart(data_root: Path, box: str) -> Iterator[Cli]:
    """A command whose templates are a copy of the session's, to be removed."""
    with tempfile.TemporaryDirectory(prefix="vs-") as run, tempfile.TemporaryDirectory(prefix="vsd-") as data:
        for name in ("guest", "images"):
            Path(data, name).symlink_to(data_root / name)
        key = Cli(Path(run), data_root)("template", "build").stderr.split()[1]
        parents.copy_templates(data_root, Path(data), key)
        with using(Cli(Path(run), Path(data))) as cli:
            yield cli


@pytest.fixture
def outside(data_root: Path, box: str, pod_template: None, tls: str) -> Iterator[Cli]:
    """A command on a host with a network, whose pods have that."""
    with (
        tempfile.TemporaryDirectory(prefix="vs-") as run,
        tempfile.TemporaryDirectory(prefix="vsd-") as data,
        tempfile.TemporaryDirectory(prefix="vss-") as scratch,
        hosts.host(Path(scratch), name=f"vf{os.getpid()}") as host,
    ):
        for name in ("guest", "images", "templates"):
            Path(data, name).symlink_to(data_root / name)
        cli = Cli(Path(run), Path(data))
        cli.owns_data, cli.prefix, cli.network = True, host.prefix, ""
        with using(cli):
            yield cli


def parent_of(cli: Cli, box: str, kind: str = "private") -> psutil.Process:
    """Have the first parent of a run root made; its machine."""
    parents.make(cli, box, kind, cli.run_root)
    (offer,) = parents.await_offers(cli.run_root)
    return psutil.Process(offer["machine"]["pid"])


def keeper_of(cli: Cli) -> psutil.Process:
    (keeper,) = parents.keepers(cli.run_root)
    return keeper


def boot_of(cli: Cli, name: str) -> str:
    return str(cli.inspect(name)["pod"]["boot"])


def up(cli: Cli, box: str, name: str, *options: str, **more: Any) -> str:
    """Have a container come up and work; how its pod did."""
    cli.ok("run", "-d", "--name", name, *options, box, "sleep", "1000", **more)
    assert cli.ok("exec", name, "sh", "-c", f"echo {name} > /kept; cat /kept") == f"{name}\n"
    return boot_of(cli, name)


def goes_on(cli: Cli, name: str) -> bool:
    return cli.ok("exec", name, "cat", "/kept") == f"{name}\n"


def no_parent(cli: Cli) -> bool:
    return not parents.directories(cli.run_root) and not parents.keepers(cli.run_root)


# ---------------------------------------------------------------- they come about


@pytest.mark.parametrize("kind", parents.KINDS)
def test_a_parent_is_made_once_a_pod_has_wished_for_it_and_later_pods_are_forks(
    forking: Cli, box: str, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").write_text("the host's\n")
    volume = ("-v", f"{tmp_path}:/data") if kind == "shareable" else ()
    machine = parent_of(forking, box, kind)
    for name in ("a", "b"):
        options = volume
        if kind == "explicit":
            forking.ok("pod", "create", "--name", f"pod-{name}")
            options = ("--pod", f"pod-{name}")
        assert up(forking, box, name, *options) == "fork"
        if volume:
            forking.ok("exec", name, "sh", "-c", f"cat /data/file > /data/{name}")
            assert (tmp_path / name).read_text() == "the host's\n"
    # Of another kind nobody has wished for one.
    assert len(parents.offers(forking.run_root)) == 1
    assert machine.is_running()
    # It is of no use to them any more.
    keeper = keeper_of(forking)
    keeper.terminate()
    wait_until_gone(keeper.pid)
    wait_until_gone(machine.pid)
    assert no_parent(forking)
    assert goes_on(forking, "a")
    assert goes_on(forking, "b")


@pytest.mark.parametrize("shareable", [False, True], ids=["private", "shareable"])
def test_eight_forks_at_once_are_eight_machines(outside: Cli, tls: str, tmp_path: Path, shareable: bool) -> None:
    parent_of(outside, "box", "shareable" if shareable else "private")
    names = [f"f{number}" for number in range(FORKS)]
    volume = ("-v", f"{tmp_path}:/data") if shareable else ()
    with ThreadPoolExecutor(FORKS) as pool:
        list(pool.map(lambda name: outside.ok("run", "-d", "--name", name, *volume, tls, "sleep", "1000"), names))
    assert {boot_of(outside, name) for name in names} == {"fork"}
    identities.assert_all_differ(outside, names, facts=9)


def test_output_and_exit_code_of_a_fork_survive_its_supervisor_and_its_parent(forking: Cli, box: str) -> None:
    machine = parent_of(forking, box)
    script = "i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); sleep 0.1; done; exit 11"
    forking.ok("run", "-d", "--name", "count", box, "sh", "-c", script)
    pod = forking.inspect("count")["pod"]
    machine.kill()
    kill(pod["supervisor"]["pid"])
    assert forking.ok("exec", "count", "echo", "adopted") == "adopted\n"
    later = forking.inspect("count")["pod"]
    assert later["supervisor"]["pid"] != pod["supervisor"]["pid"]
    assert (later["vm"]["pid"], later["boot"]) == (pod["vm"]["pid"], "fork")
    assert forking.ok("wait", "count") == "11\n"
    assert forking.ok("logs", "count") == "".join(f"line {number}\n" for number in range(40))


def test_a_stopped_container_has_another_life_in_a_fork(shared: Cli, box: str) -> None:
    assert up(shared, box, "again") == "fork"
    shared.ok("stop", "-t", "0", "again")
    shared.ok("start", "again")
    assert goes_on(shared, "again")
    assert boot_of(shared, "again") == "fork"
    shared.ok("rm", "-f", "again")


# ---------------------------------------------------------------- they harm nobody


def content_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("kind", ["private", "shareable"])
def test_what_a_fork_writes_and_frees_is_its_own(forking: Cli, box: str, tmp_path: Path, kind: str) -> None:
    parent_of(forking, box, kind)
    (offer,) = parents.offers(forking.run_root)
    kept = [Path(offer["machine"]["memory"]), *(Path(disk["path"]) for disk in offer["machine"]["disks"][:1])]
    layer = Path(offer["machine"]["disks"][-1]["path"])
    templates = sorted(path for path in forking.data_root.glob("templates/*/*") if path.is_file())
    before = [content_of(path) for path in (*kept, layer, *templates)]
    volume = ("-v", f"{tmp_path}:/data") if kind == "shareable" else ()
    fill = "dd if=/dev/urandom of=/dev/shm/f bs=1M count=$1 2>/dev/null; sha256sum < /dev/shm/f"
    memory = ("--shm-size", "200m", "--memory", "400m")
    for name in ("one", "other"):
        assert up(forking, box, name, *volume, *memory) == "fork"
    told = forking.ok("exec", "other", "sh", "-c", fill, "sh", "20")
    # All there is, and more than a fork begins with; then it is the guest's to give back.
    forking.ok("exec", "one", "sh", "-c", f"({fill}) && dd if=/dev/urandom of=/f bs=1M count=20", "sh", "100")
    machine = psutil.Process(forking.inspect("one")["pod"]["vm"]["pid"])
    full = machine.memory_info().rss
    forking.ok("exec", "one", "sh", "-c", "rm /dev/shm/f /f; sync; echo 3 > /proc/sys/vm/drop_caches || true")
    if kind == "shareable":
        awaited(lambda: machine.memory_info().rss < full - (60 << 20))
    assert forking.ok("exec", "other", "sh", "-c", "sha256sum < /dev/shm/f") == told
    assert [content_of(path) for path in (*kept, layer, *templates)] == before
    assert goes_on(forking, "one")
    assert up(forking, box, "third", *volume) == "fork"


def test_a_parent_is_made_although_clients_keep_coming(forking: Cli, box: str) -> None:
    def another() -> bool:
        forking.ok("run", "--rm", box, "true")
        return bool(parents.keepers(forking.run_root))

    awaited(another)


def test_parents_of_two_run_roots_do_not_know_each_other(forking: Cli, box: str) -> None:
    machine = parent_of(forking, box)
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch, using(Cli(Path(scratch), forking.data_root)) as other:
        beside = parent_of(other, box)
        assert machine.is_running()
        assert up(other, box, "there") == "fork"
        for directory in parents.directories(forking.run_root):
            os.utime(directory, (1, 1))
        assert forking.ok("gc") == ""
        assert beside.is_running()
    assert up(forking, box, "here") == "fork"


def test_forks_that_share_directories_have_their_kernel_in_common(forking: Cli, box: str, tmp_path: Path) -> None:
    parent_of(forking, box, "shareable")
    volume = ("-v", f"{tmp_path}:/data")
    assert up(forking, box, "one", *volume) == "fork"
    (tmp_path / "told").write_text("the host's\n")
    assert forking.ok("exec", "one", "cat", "/data/told") == "the host's\n"
    machine = forking.inspect("one")["pod"]["vm"]["pid"]
    kernel = Path(forking.inspect("one")["pod"]["vm"]["config"]["kernel"]["path"])
    (begin, _), *_ = pieces = constant_pieces(kernel)
    maps = [line.split() for line in Path(f"/proc/{machine}/maps").read_text().splitlines() if "guest memory" in line]
    private = [each for each in maps if each[1] == "rw-p"]
    assert [int(each[2], 16) for each in private] == [start for start, _ in pieces]
    (file,) = {each[4] for each in maps if each[1] == "rw-s"}
    assert file not in {each[4] for each in private}
    holder = next(fd for fd in Path(f"/proc/{machine}/fd").iterdir() if fd.stat().st_ino == int(file))
    with holder.open("rb") as memory:
        assert memory.seek(begin) == begin
        assert os.lseek(memory.fileno(), begin, os.SEEK_DATA) >= pieces[0][1]


def test_a_fork_is_nobody_whom_its_parent_has_rehearsed(forking: Cli, box: str) -> None:
    parent_of(forking, box)
    assert up(forking, box, "anew") == "fork"
    script = "cat /etc/hosts /etc/resolv.conf /etc/hostname; hostname; ip addr; ip route; ip -6 route"
    said = forking.ok("exec", "anew", "sh", "-c", script)
    name = forking.inspect("anew")["id"][:12]
    assert [line for line in said.splitlines() if line == name] == [name, name]
    assert not any(trace in said for trace in ("192.0.2.", "2001:db8", "eth0", "vmsandbox-"))


# ---------------------------------------------------------------- they are not to be had


def test_a_parent_that_is_killed_is_not_missed(forking: Cli, box: str) -> None:
    machine = parent_of(forking, box)
    assert up(forking, box, "before") == "fork"
    keeper = keeper_of(forking)
    machine.kill()
    assert up(forking, box, "after") == "template"
    wait_until_gone(keeper.pid)
    assert no_parent(forking)
    assert goes_on(forking, "before")


def test_a_parent_goes_with_its_keeper_and_gc_removes_what_is_left(forking: Cli, box: str) -> None:
    machine = parent_of(forking, box)
    assert up(forking, box, "before") == "fork"
    keeper_of(forking).kill()
    wait_until_gone(machine.pid)
    assert up(forking, box, "after") == "template"
    (directory,) = parents.directories(forking.run_root)
    os.utime(directory, (1, 1))
    assert f"removed machine '{directory.name}', which pods were forked from" in forking.ok("gc")
    assert no_parent(forking)
    assert goes_on(forking, "before")


def coming(cli: Cli) -> psutil.Process:
    """The machine that becomes a parent."""

    def found() -> list[psutil.Process]:
        names = [f"guest=vmsandbox-{path.name}," for path in parents.directories(cli.run_root)]
        machines = [each for each in cli.processes() if each.name().startswith("qemu")]
        return [each for each in machines if any(name in title(each) for name in names)]

    (machine,) = awaited(found)
    return machine


def makers(cli: Cli) -> list[psutil.Process]:
    return [each for each in cli.processes() if title(each).startswith("vmsandbox rehearsal ")]


def test_a_keeper_that_is_killed_early_leaves_no_machine(forking: Cli, box: str) -> None:
    forking.ok("run", "--rm", box, "true")
    machine = coming(forking)
    keeper_of(forking).kill()
    wait_until_gone(machine.pid)
    awaited(lambda: not makers(forking))
    (directory,) = parents.directories(forking.run_root)
    os.utime(directory, (1, 1))
    forking.ok("gc")
    assert no_parent(forking)


def test_who_makes_a_parent_and_is_killed_leaves_nothing(forking: Cli, box: str) -> None:
    forking.ok("run", "--rm", box, "true")
    machine, keeper = coming(forking), keeper_of(forking)
    (maker,) = makers(forking)
    maker.kill()
    wait_until_gone(machine.pid)
    wait_until_gone(keeper.pid)
    assert no_parent(forking)
    assert up(forking, box, "after") == "template"


def test_a_keeper_keeps_nothing_of_what_making_a_parent_takes(forking: Cli, box: str) -> None:
    machine, keeper = parent_of(forking, box), keeper_of(forking)
    assert makers(forking) == []
    assert machine.ppid() == keeper.pid
    assert keeper.num_threads() == 1


def test_a_keeper_clears_what_a_killed_one_has_left(forking: Cli, box: str) -> None:
    parent_of(forking, box)
    keeper_of(forking).kill()
    end_nursery(forking.run_root)
    (directory,) = parents.directories(forking.run_root)
    (offer,) = parents.offers(forking.run_root)
    (directory / "vm" / "stray").touch()
    parents.make(forking, box, "private", forking.run_root)
    awaited(lambda: parents.offers(forking.run_root) not in ([], [offer]))
    assert not (directory / "vm" / "stray").exists()
    assert up(forking, box, "fresh") == "fork"


def test_a_parent_goes_with_its_template(apart: Cli, box: str) -> None:
    machine = parent_of(apart, box)
    assert up(apart, box, "before") == "fork"
    (row,) = json.loads(apart.ok("template", "ls", "--format", "json"))
    apart.ok("template", "rm", row["key"])
    wait_until_gone(machine.pid)
    awaited(lambda: no_parent(apart))
    assert up(apart, box, "after") == "cold"
    assert goes_on(apart, "before")


def test_a_parent_of_a_template_that_was_made_again_goes(apart: Cli, box: str) -> None:
    machine = parent_of(apart, box)
    assert up(apart, box, "before") == "fork"
    apart.ok("template", "build", "--force")
    wait_until_gone(machine.pid)
    awaited(lambda: no_parent(apart))
    assert up(apart, box, "after") == "template"
    assert goes_on(apart, "before")


def test_a_parent_goes_with_the_run_root(data_root: Path, box: str, pod_template: None) -> None:
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        cli = Cli(Path(scratch), data_root)
        cli.config = cli.run_root / "config.toml"
        cli.config.write_text(SETTINGS)
        machine, keeper = parent_of(cli, box), keeper_of(cli)
    wait_until_gone(keeper.pid)
    wait_until_gone(machine.pid)
    assert not Path(scratch).exists()


def test_a_parent_that_somebody_has_stopped_can_be_forked(shared: Cli, box: str) -> None:
    (offer,) = parents.offers(shared.run_root)
    os.kill(offer["machine"]["pid"], signal.SIGSTOP)
    try:
        assert up(shared, box, "meanwhile") in ("fork", "template")
    finally:
        os.kill(offer["machine"]["pid"], signal.SIGCONT)
    assert up(shared, box, "later") == "fork"
    shared.ok("rm", "-f", "meanwhile", "later")


def lock_of(cli: Cli) -> int:
    """What whoever forks the parent of a run root locks."""
    (directory,) = parents.directories(cli.run_root)
    return os.open(directory / "vm", os.O_RDONLY | os.O_DIRECTORY)


def test_a_parent_that_others_fork_for_too_long_is_not_waited_for(shared: Cli, box: str) -> None:
    lock = lock_of(shared)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert up(shared, box, "without") == "template"
    finally:
        os.close(lock)
    assert up(shared, box, "with") == "fork"
    shared.ok("rm", "-f", "without", "with")


def waiting_for(cli: Cli) -> list[int]:
    """Supervisors that would fork the parent, were it not locked."""
    (directory,) = parents.directories(cli.run_root)
    found = []
    for process in psutil.process_iter():
        if title(process).startswith("vmsandbox supervisor "):
            with suppress(FileNotFoundError):
                if any(os.readlink(link) == f"{directory}/vm" for link in Path(f"/proc/{process.pid}/fd").iterdir()):
                    found.append(process.pid)
    return found


def test_a_supervisor_that_is_killed_before_its_fork_leaves_nothing(shared: Cli, box: str) -> None:
    lock = lock_of(shared)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = shared.popen("run", "-d", "--name", "never", box, "sleep", "1000")
        (supervisor,) = awaited(lambda: waiting_for(shared))
        kill(supervisor)
    finally:
        os.close(lock)
    client.wait()
    shared("rm", "-f", "never")
    awaited(lambda: not list((shared.run_root / "s").iterdir()) or "removed" in shared.ok("gc"))
    assert up(shared, box, "later") == "fork"
    shared.ok("rm", "-f", "later")


def test_without_the_setting_there_is_no_parent_and_none_is_used(forking: Cli, box: str, tmp_path: Path) -> None:
    without = Cli(forking.run_root, forking.data_root)
    parents.make(without, box, "shareable", tmp_path)
    # What the first had wished for would be made together with this.
    parent_of(forking, box)
    assert up(without, box, "web") == "template"
    without.ok("rm", "-f", "web")


@pytest.mark.parametrize(
    "options",
    [("--template", "off"), ("--shared-fs", "9p", "-v", "/usr/share:/data"), ("--template", "auto")],
    ids=["no-template", "9p", "settings"],
)
def test_what_needs_another_machine_is_no_fork(shared: Cli, box: str, options: tuple[str, ...]) -> None:
    other = Cli(shared.run_root, shared.data_root)
    other.config = shared.run_root / "other.toml"
    other.config.write_text(SETTINGS + ("base_memory_mib = 300\n" if options[-1] == "auto" else ""))
    assert up(other, box, "web", *options) == "cold"
    other.ok("rm", "-f", "web")
    assert len(parents.directories(shared.run_root)) == 1
    shared.ok("gc", "-q")  # which ends a template's maker


def test_where_limits_are_others_there_is_no_fork(shared: Cli, box: str) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1] and 4096))

    assert up(shared, box, "web", preexec_fn=limited) == "template"
    assert up(shared, box, "here") == "fork"
    shared.ok("rm", "-f", "web", "here")


# ---------------------------------------------------------------- they are not permitted

_NR_PTRACE, _EPERM = 101, 1
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38


def without_ptrace() -> None:
    """Have this process and its children be refused ptrace(2), as sandboxes do."""
    program = struct.pack("HBBI", 0x20, 0, 0, 0)  # the call's number
    program += struct.pack("HBBI", 0x15, 0, 1, _NR_PTRACE)
    program += struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | _EPERM)
    program += struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
    buffer = ctypes.create_string_buffer(program)
    filters = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filters, 0, 0) == 0


def test_where_nobody_may_trace_no_parent_comes_about(forking: Cli, box: str) -> None:
    forking.ok("run", "--rm", box, "true", preexec_fn=without_ptrace)
    log = forking.run_root / "o" / "keeper.log"
    awaited(lambda: log.exists() and "no machine is kept to be forked" in log.read_text())
    awaited(lambda: no_parent(forking))
    assert up(forking, box, "web", preexec_fn=without_ptrace) == "template"


def test_a_supervisor_that_may_not_trace_makes_do_with_a_clone(forking: Cli, box: str) -> None:
    parent_of(forking, box)
    end_nursery(forking.run_root)
    assert up(forking, box, "web", preexec_fn=without_ptrace) == "template"
    end_nursery(forking.run_root)
    assert up(forking, box, "later") == "fork"


# ---------------------------------------------------------------- beside others


def test_machines_that_are_kept_ready_and_parents_go_together(data_root: Path, box: str, pod_template: None) -> None:
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        cli = Cli(Path(scratch), data_root)
        cli.network = ""
        with using(cli, '[network]\ndefault = "none"\n[sandbox]\nspares = 1\n'):
            parent_of(cli, box)
            (offer,) = awaited(lambda: spares(cli))
            taken = cli.ok("run", "-d", "--name", "taken", box, "sleep", "1000").strip()
            assert (taken, boot_of(cli, "taken")) == (offer, "template")
            assert up(cli, box, "beside") in ("fork", "template")
            end_spares(cli)


def test_tests_that_are_to_run_on_forks_do(standing: parents.Standing, box: str) -> None:
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        cli = Cli(Path(scratch), standing.data_root, boot="fork")
        refused = cli("run", "--rm", box, "true")
        assert (refused.code, "the template's clone failed" in refused.stderr) == (125, True)
        cli.remove_all()
        assert cli.leftovers() == []
