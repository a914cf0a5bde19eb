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
from vmsandbox.errors import InvalidBundleError, UnsupportedError
from vmsandbox.oci import bundle, translate

if TYPE_CHECKING:
    from collections.abc import Iterator

#: what is refused although crun takes it, by what is said of it
STRICTER = (
    # crun reads what it can of a member with another type, and leaves the rest out.
    r"' should be (a valid (string|integer|boolean|array)|an object|greater than or equal to|less than or equal to)",
    r"' (string )?(should match pattern|should have at (least|most)|should be '|has to be an absolute path|is missing)",
    # Documents that say too little: crun makes something up.
    r"'process.args' is empty",
    r"has no major or minor number",
    r"'mounts\[\d+\]\.type' is '.*', which cannot be mounted",
    # Namespaces of the host that a virtual machine cannot share.
    r"'linux.namespaces' has no (mount|network|pid|ipc) namespace",
)
#: what crun refuses as well, but only the guest's crun finds, so that the command says it later
LATER = (
    r"no 'mounts' block specified",
    r"write to /proc/sys/",
    r"capset: Operation not permitted",
    r"open executable|executable file",
    r"invalid mount type",
    r"^mount `.*` to `.*`: (No such device|Invalid argument)",
    r"^invalid target `.*`: it must be mounted at the root",
)
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


def check_acceptance(place: Place, spec: dict[str, Any] | bytes, what: str) -> None:
    container_id, directory = place.bundle(spec)
    ours = complaint(directory)
    theirs, said = place.control.accepts(directory, container_id)
    if ours is None:
        assert theirs or any(re.search(each, said) for each in LATER), (what, said)
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
        assert place.control.accepts(directory, container_id) == (True, "")

    run()


def test_what_is_broken_is_refused_by_both_or_for_a_reason(place: Place) -> None:
    _accepting(60)(place)


@pytest.mark.long
def test_what_is_broken_is_refused_by_both_or_for_a_reason_at_length(place: Place) -> None:
    _accepting(3000)(place)


# ---------------------------------------------------------------- effect


class Pod:
    """A pod whose members are the examples."""

    def __init__(self, runtime: Runtime, place: Place) -> None:
        self.runtime = runtime
        self.place = place
        annotations = {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "pause"}
        sandbox = runtime.bundle("pause", place.rootfs, "sleep", "1000000", annotations=annotations)
        self.pid = runtime.create("pause", sandbox)
        runtime.ok("start", "pause")

    def member(self, spec: dict[str, Any]) -> dict[str, Any]:
        """A spec as an engine writes it for a member of the pod; its control groups can be seen."""
        spec = json.loads(json.dumps(spec))
        for namespace in spec["linux"]["namespaces"]:
            if namespace["type"] == "network":
                namespace["path"] = f"/proc/{self.pid}/ns/net"
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
        if name == "oom_score_adj" and "oomScoreAdj" not in spec["process"]:
            continue
        if name == "Seccomp" and "seccomp" not in spec["linux"]:
            continue  # this machine's own filter may be on crun's side
        if (
            kind in ("cgroup", "type")
            or rest == CGROUPS
            or (kind == "peer" and rest not in own)
            or (kind == "size" and rest not in sized)
        ):
            continue  # checked apart; the host's file systems are shared by another one; the machine's own
        # crun gives standard streams to the user, and only its own stdin is the container's /dev/null.
        made[name] = [re.sub(r" \d+ \d+ (1, 3 null)$", r" \1", value) for value in values]
    return made


def check_effect(pod: Pod, spec: dict[str, Any]) -> None:
    container_id, directory = pod.place.bundle(spec)
    done = pod.place.control.run(directory, container_id)
    assert done.code == 0, done
    theirs = conforming.seen(done.stdout)
    ours = conforming.seen(pod.run(spec))
    assert comparable(ours, spec) == comparable(theirs, spec)
    for name, kinds in theirs.items():
        if name.startswith("type "):
            assert ours[name] == kinds or set(ours[name]) <= {"virtiofs", *kinds}, name
    resources = spec["linux"]["resources"]
    assert ours["cgroup memory"] == [str((resources.get("memory") or {}).get("limit", "max"))]
    assert ours["cgroup pids"] == [str((resources.get("pids") or {}).get("limit", "max"))]
    assert ours["cgroup cpu"] == [f"{(resources.get('cpu') or {}).get('quota', 'max')} 100000"]


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


def test_every_refusal_leaves_the_pod_as_it_was(pod: Pod) -> None:
    """Through the command: one line that names the member, and nothing of the container."""
    spec = json.loads((pod.runtime.scratch / "pause/config.json").read_text())
    spec["process"]["rlimits"] = [{"type": "RLIMIT_X", "soft": 2, "hard": -1}]
    container_id, directory = pod.place.bundle(pod.member(spec))
    assert "process.rlimits[0].hard" in pod.runtime.refused("create", "--bundle", str(directory), container_id)
    assert pod.runtime.ok("list", "-q").split() == ["pause"]
