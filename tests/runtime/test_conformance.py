"""Random config.json files, valid and broken, given to crun on this machine and to ours: same acceptance, same effect.

What differs is listed here and justified in docs/conformance.md.  Examples that only ask for acceptance need no
machine; those that ask what a program sees are members of one pod, since starting a machine is what costs.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.harness import conforming
from tests.harness.bundles import Runtime
from tests.harness.members import Members
from vmsandbox.cli.runtime.static import default_spec
from vmsandbox.errors import InvalidBundleError, UnsupportedError
from vmsandbox.oci import bundle, translate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: what is refused although crun takes it, by what is said of it
STRICTER = (
    # crun reads what it can of a member with another type, and leaves the rest out.
    r"' should be (a valid (string|integer|boolean|array)|an object|greater than or equal to|less than or equal to)",
    r"' (string )?(should match pattern|should have at (least|most)|should be '|has to be an absolute path|is missing)",
    # Control groups of version 1 make something else of it; a number that is nobody's id means "as it is".
    r"'linux\.resources\.cpu'",
    # Documents that say too little: crun makes something up.
    r"'process.args' is empty",
    r"has no major or minor number",
    r"'mounts\[\d+\]\.type' is '.*', which cannot be mounted",
    # Of a namespace that crun is not told of; runc refuses these too.
    r"'linux\.(uid|gid)Mappings' is set but 'linux.namespaces' has no user namespace",
    r"'linux.timeOffsets' is set but 'linux.namespaces' has no time namespace",
    # Namespaces of the host that a virtual machine cannot share.
    r"'linux.namespaces' has no (mount|network|pid|ipc) namespace",
)
#: what crun refuses as well, but only the guest's crun finds, so that the command says it later
LATER = (
    r"write to /proc/sys/",
    r"open executable|executable file",
    r"^mount `.*` to `.*`: (No such device|Invalid argument)",
    r"^invalid target `.*`: it must be mounted at the root",
    r"error executing hook",
)
#: what crun alone refuses: the specification lets a document do without it
LENIENT = (r"no 'mounts' block specified",)
LABELS = {
    "RLIMIT_NOFILE": "Max open files",
    "RLIMIT_CORE": "Max core file size",
    "RLIMIT_FSIZE": "Max file size",
    "RLIMIT_CPU": "Max cpu time",
    "RLIMIT_STACK": "Max stack size",
    "RLIMIT_MEMLOCK": "Max locked memory",
    "RLIMIT_NPROC": "Max processes",
    "RLIMIT_SIGPENDING": "Max pending signals",
    "RLIMIT_LOCKS": "Max file locks",
}
CGROUPS = "/sys/fs/cgroup"
RELAXED = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


class Place:
    """A root with the probe, what mounts are of, and crun."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.rootfs = conforming.prepare_rootfs(scratch / "root")
        self.shared = conforming.prepare_shared(scratch / "shared")
        self.control = conforming.Control(scratch)
        self._numbers = itertools.count()
        self._content = conforming.content(self.rootfs)

    def bundle(self, spec: dict[str, Any] | bytes) -> tuple[str, Path]:
        """A new id, and a bundle that is always at the same place, with a root in which nothing was made yet."""
        conforming.clear(self.rootfs, but=self._content)
        return f"x{next(self._numbers)}", conforming.written(self.scratch / "bundle", spec, self.rootfs)

    def called(self) -> list[str]:
        """What hooks of the host have written down since this was asked before."""
        log = self.shared / conforming.HOOKS_LOG
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as scratch:
        made = Place(Path(scratch))
        yield made
        made.control.close()


# ---------------------------------------------------------------- acceptance


def complaint(directory: Path) -> str | None:
    """What is said of a bundle before anything is done with it."""
    try:
        translate.translated(bundle.load(directory), kind="single", cache=None)
    except (InvalidBundleError, UnsupportedError) as error:
        return str(error)
    return None


def timeless(spec: dict[str, Any] | bytes) -> dict[str, Any] | bytes:
    """What crun is given, which cannot make a time namespace; what is no document stays."""
    try:
        return conforming.without_clocks(json.loads(spec) if isinstance(spec, bytes) else spec)
    except ValueError:
        return spec


def check_acceptance(place: Place, spec: dict[str, Any] | bytes, what: str) -> None:
    container_id, directory = place.bundle(spec)
    ours = complaint(directory)
    container_id, directory = place.bundle(timeless(spec))
    theirs, said = place.control.accepts(directory, container_id)
    if ours is None:
        assert theirs or any(re.search(each, said) for each in (*LATER, *LENIENT)), (what, said)
    elif theirs:
        assert any(re.search(each, ours) for each in STRICTER), (what, ours)


def _accepting(examples: int) -> Any:
    @seed(12)
    @settings(max_examples=examples, **RELAXED)
    @given(data=st.data())
    def run(place: Place, data: st.DataObject) -> None:
        spec, what = data.draw(conforming.damaged(shared=place.shared))
        check_acceptance(place, spec, what)

    return run


def test_what_crun_accepts_is_accepted(place: Place) -> None:
    """Whole documents: none of them may be complained of."""

    @seed(11)
    @settings(max_examples=40, **RELAXED)
    @given(spec=conforming.documents(shared=place.shared, args=("true",)))
    def run(spec: dict[str, Any]) -> None:
        container_id, directory = place.bundle(spec)
        assert complaint(directory) is None
        container_id, directory = place.bundle(conforming.for_control(spec))
        assert place.control.accepts(directory, container_id) == (True, "")

    run()


def test_what_is_broken_is_refused_by_both_or_for_a_reason(place: Place) -> None:
    _accepting(60)(place)


@pytest.mark.long
def test_what_is_broken_is_refused_by_both_or_for_a_reason_at_length(place: Place) -> None:
    _accepting(3000)(place)


# ---------------------------------------------------------------- effect


def plain() -> dict[str, Any]:
    """A document that both accept."""
    spec = default_spec()
    spec["ociVersion"] = "1.0.2"
    spec["process"].update(terminal=False, args=["true"])
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["type"] != "cgroup"]
    # What there is to be masked is not the same everywhere.
    spec["linux"].update(resources={}, maskedPaths=[], readonlyPaths=[])
    return spec


class Pod:
    """A pod whose members are the examples."""

    def __init__(self, runtime: Runtime, place: Place) -> None:
        self.runtime = runtime
        self.place = place
        self.members = Members(runtime, place.rootfs, linux={**default_spec()["linux"], "sysctl": conforming.NETWORK})

    def member(self, spec: dict[str, Any]) -> dict[str, Any]:
        """A spec as an engine writes it for a member of the pod; its control groups can be seen."""
        spec = json.loads(json.dumps(spec))
        for namespace in spec["linux"]["namespaces"]:
            if namespace["type"] == "network":
                namespace["path"] = f"/proc/{self.members.pid}/ns/net"
        spec["annotations"] = {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "pause",
        }
        spec["mounts"].append({"destination": CGROUPS, "type": "cgroup", "source": "cgroup", "options": ["ro"]})
        return spec

    def run(self, spec: dict[str, Any]) -> str:
        """Run a spec's program as a member; what it prints."""
        container_id, directory = self.place.bundle(self.member(spec))
        done = self.runtime("run", "--bundle", str(directory), container_id)
        assert (done.code, done.stderr) == (0, ""), (done, self.runtime.said())
        return done.stdout


@pytest.fixture(scope="module")
def pod(place: Place, data_root: Path) -> Iterator[Pod]:
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        runtime = Runtime(Path(scratch), data_root)
        try:
            yield Pod(runtime, place)
        finally:
            runtime.remove_all()
        assert runtime.leftovers() == []


def comparable(found: dict[str, list[str]], spec: dict[str, Any]) -> dict[str, list[str]]:
    """What has to be the same: all but what a runtime inherits from the machine it is on."""
    limits = {LABELS[limit["type"]] for limit in spec["process"]["rlimits"]}
    own = {mount["destination"] for mount in spec["mounts"]}
    sized = {mount["destination"] for mount in spec["mounts"] if mount["type"] == "tmpfs"}
    made = {}
    for name, values in found.items():
        kind, _, rest = name.partition(" ")
        if kind == "limit" and rest.strip() not in limits:
            continue
        if kind == "net" and not {f"net/{rest}", f"net/{rest}".replace("/", ".")} & {*spec["linux"]["sysctl"]}:
            continue
        if name == "oom_score_adj" and "oomScoreAdj" not in spec["process"]:
            continue
        if name == "Seccomp" and "seccomp" not in spec["linux"]:
            continue  # this machine's own filter may be on crun's side
        if (
            kind in ("cgroup", "type", "uptime")
            or rest == CGROUPS
            or (kind == "peer" and rest not in own)
            or (kind == "size" and rest not in sized)
        ):
            continue  # checked apart; the host's file systems are shared by another one; the machine's own
        # crun gives standard streams to the user, and only its own stdin is the container's /dev/null.
        made[name] = [re.sub(r" \d+ \d+ (1, 3 null)$", r" \1", value) for value in values]
    return made


def check_effect(pod: Pod, spec: dict[str, Any]) -> None:
    pod.place.called()
    container_id, directory = pod.place.bundle(conforming.for_control(spec))
    done = pod.place.control.run(directory, container_id, clocks=conforming.clocks(spec))
    assert done.code == 0, done
    theirs = conforming.seen(done.stdout)
    called = pod.place.called()
    ours = conforming.seen(pod.run(spec))
    assert pod.place.called() == called
    assert comparable(ours, spec) == comparable(theirs, spec)
    ahead = ((spec["linux"].get("timeOffsets") or {}).get("boottime") or {}).get("secs", 0)
    assert all(float(found["uptime"][0].split()[0]) >= ahead for found in (ours, theirs))
    for name, kinds in theirs.items():
        if name.startswith("type "):
            assert ours[name] == kinds or set(ours[name]) <= {"virtiofs", *kinds}, name
    resources = spec["linux"]["resources"]
    pages = resources.get("hugepageLimits") or [{"limit": 0}]
    assert {name: ours[f"cgroup {name}"] for name in ("memory.max", "pids.max", "cpu.max", "memory.high")} == {
        "memory.max": [str((resources.get("memory") or {}).get("limit", "max"))],
        "pids.max": [str((resources.get("pids") or {}).get("limit", "max"))],
        "cpu.max": [f"{(resources.get('cpu') or {}).get('quota', 'max')} 100000"],
        "memory.high": [(resources.get("unified") or {}).get("memory.high", "max")],
    }
    assert ours["cgroup hugetlb.2MB.max"] == [str(pages[0]["limit"] or "max")]


def _alike(pod: Pod, examples: int, number: int) -> None:
    # Not shrunk: an example takes a second or two.
    @seed(number)
    @settings(max_examples=examples, phases=[Phase.generate], report_multiple_bugs=False, **RELAXED)
    @given(spec=conforming.documents(shared=pod.place.shared))
    def run(spec: dict[str, Any]) -> None:
        check_effect(pod, spec)

    run()


def test_programs_see_what_they_see_under_crun(pod: Pod) -> None:
    _alike(pod, 8, 21)


@pytest.mark.long
def test_programs_see_what_they_see_under_crun_at_length(pod: Pod) -> None:
    _alike(pod, 400, 22)


def test_what_is_mounted_on_demand_has_its_options_in_a_user_namespace(pod: Pod) -> None:
    """A directory that is shared is a file system of its own in the guest, which somebody has to go to first."""
    spec = plain()
    spec["process"].update(args=["awk", "-f", "/probe"], rlimits=[])
    spec["linux"]["namespaces"].append({"type": "user"})
    spec["linux"].update(uidMappings=conforming.MAPPING, gidMappings=conforming.MAPPING, sysctl={})
    source = str(pod.place.shared / "directory")
    spec["mounts"].append(
        {"destination": "/mnt", "type": "bind", "source": source, "options": ["rbind", "rro", "nosuid"]}
    )
    check_effect(pod, spec)


# ---------------------------------------------------------------- what is refused late


def mounting(**mount: Any) -> Callable[[dict[str, Any]], object]:
    return lambda spec: spec["mounts"].append({"source": "none", **mount})


#: what is asked for, of each kind in LATER at least once
LATE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a sysctl's value": lambda spec: spec["linux"].update(sysctl={"kernel.shmmni": "junk"}),
    "a program by its path": lambda spec: spec["process"].update(args=["/nosuch"]),
    "a program by its name": lambda spec: spec["process"].update(args=["nosuch"]),
    "a directory to run": lambda spec: spec["process"].update(args=["/etc"]),
    "a file to run": lambda spec: spec["process"].update(args=["/etc/passwd"]),
    "a size": mounting(destination="/tmp", type="tmpfs", options=["size=junk"]),
    "an option": mounting(destination="/tmp", type="tmpfs", options=["junk"]),
    "a file system": mounting(destination="/tmp", type="configfs"),
    "processes elsewhere": mounting(destination="/mnt/proc", type="proc"),
    "a hook": lambda spec: spec.update(hooks={"createRuntime": [{"path": "/bin/false"}]}),
}


def test_what_is_refused_late_is_refused_and_leaves_nothing(pod: Pod) -> None:
    found = set()
    for what, change in LATE.items():
        spec = plain()
        change(spec)
        container_id, directory = pod.place.bundle(spec)
        assert complaint(directory) is None, what
        accepted, said = pod.place.control.accepts(directory, container_id)
        kinds = {each for each in LATER if re.search(each, said)}
        assert (accepted, bool(kinds)) == (False, True), (what, said)
        found |= kinds
        container_id, directory = pod.place.bundle(pod.member(spec))
        assert pod.runtime.refused("create", "--bundle", str(directory), container_id), what
        assert pod.members.remains_alone(), what
    assert found == {*LATER}
    assert pod.run({**plain(), "process": {**plain()["process"], "args": ["echo", "well"]}}) == "well\n"


def test_mounts_may_be_missing(pod: Pod) -> None:
    for mounts in ({}, {"mounts": []}):
        spec = pod.member({**plain(), "process": {**plain()["process"], "args": ["ls", "/proc"]}})
        del spec["mounts"]
        container_id, directory = pod.place.bundle({**spec, **mounts})
        assert pod.runtime.ok("run", "--bundle", str(directory), container_id) == ""
