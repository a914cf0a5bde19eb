"""What `state`, `list`, `ps`, `events --stats`, `features` and `spec` print, beside runc's on this machine."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.runc import Runc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.harness.bundles import Runtime

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
#: of a hierarchy of cgroup v1, which a guest does not have; runc leaves them out on v2 as well
OF_V1 = {
    *("data.cpu.usage.percpu", "data.cpu.usage.percpu_kernel", "data.cpu.usage.percpu_user", "data.memory.raw"),
    *(
        "data.cpuset",
        "data.memory.kernel",
        "data.memory.kernelTCP",
        "data.memory.swap",
        "data.blkio",
        "data.cpu.throttling",
    ),
}


@pytest.fixture
def runc(tmp_path: Path) -> Iterator[Runc]:
    made = Runc(tmp_path)
    yield made
    made("delete", "--force", "same")


def shape(value: Any, where: str = "") -> dict[str, str]:
    """The type of every member, by its place; of a list the first entry stands for all."""
    found = {where: type(value).__name__} if where else {}
    if isinstance(value, dict):
        for key, item in value.items():
            found |= shape(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list) and value:
        found |= shape(value[0], f"{where}[]")
    return found


def test_looking_at_a_container_is_what_it_is_with_runc(runtime: Runtime, runc: Runc, box_rootfs: Path) -> None:
    limits = {"memory": {"limit": 100 << 20}, "pids": {"limit": 100}, "devices": [{"allow": False, "access": "rwm"}]}
    bundle = runtime.bundle("same", box_rootfs, "sleep", "1000", annotations={"a": "b"})
    document = json.loads((bundle / "config.json").read_text())
    document["linux"]["resources"] = limits
    (bundle / "config.json").write_text(json.dumps(document))
    runtime.create("same", bundle)
    # An engine's pod is a clone, too.
    (pod,) = runtime.root.glob("s/*/sandbox.json")
    assert json.loads(pod.read_text())["boot"] == "template"
    runc.create("same", document)

    def both(*words: str) -> tuple[str, str]:
        return runtime.ok(*words), runc(*words)

    def neither(*words: str) -> None:
        assert runtime.refused(*words) == runc.refused(*words)

    assert both("exec", "same", "echo", "there") == ("there\n", "there\n")
    for status in ("created", "running"):
        ours, theirs = (json.loads(text) for text in both("state", "same"))
        assert (ours["id"], ours["status"]) == ("same", status)
        assert list(shape(ours).items()) == list(shape(theirs).items())
        assert STAMP.fullmatch(ours["created"])
        ours, theirs = (json.loads(text) for text in both("list", "--format", "json"))
        assert list(shape(ours).items()) == list(shape(theirs).items())
        if status == "created":
            runtime.ok("start", "same")
            runc("start", "same")
    ours_list, theirs_list = both("list")
    assert ours_list.splitlines()[0].split() == theirs_list.splitlines()[0].split()
    for text in (ours_list, theirs_list):
        head, row = text.splitlines()
        assert [head.index(word) for word in ("PID", "STATUS", "BUNDLE")] == [
            row.index(word) for word in (row.split()[1], "running", row.split()[3])
        ]
    ours_ps, theirs_ps = both("ps", "same")
    assert ours_ps.splitlines()[0].split() == theirs_ps.splitlines()[0].split()
    assert [line.split()[0] for line in ours_ps.splitlines()] == [line.split()[0] for line in theirs_ps.splitlines()]
    assert ours_ps.splitlines()[1].endswith(" sleep 1000")
    assert [len(json.loads(text)) for text in both("ps", "--format", "json", "same")] == [1, 1]

    ours, theirs = (shape(json.loads(text)) for text in both("events", "--stats", "same"))
    for name, kind in theirs.items():
        if not any(name == each or name.startswith((f"{each}.", f"{each}[")) for each in OF_V1):
            assert ours.get(name) == kind, name
    known = {*theirs, "data.cpu.throttling.periods", "data.cpu.throttling.throttledPeriods"}
    known |= {"data.cpu.throttling.throttledTime", "data.blkio.ioServiceBytesRecursive", "data.memory.cache"}
    extra = {name for name in ours if not name.startswith(("data.memory.raw", "data.blkio.ioServiceBytesRecursive["))}
    assert extra <= known

    both("kill", "same", "0")
    neither("start", "same")
    # What pauses a container is not there for runc on every machine.
    runtime.ok("pause", "same")
    assert runtime.refused("start", "same") == "cannot start a container in the paused state"
    runtime.ok("resume", "same")

    runtime.ok("kill", "same", "KILL")
    runc("kill", "same", "KILL")
    runtime.await_status("same", "stopped")
    while json.loads(runc("state", "same"))["status"] != "stopped":
        pass
    for words in (("start", "same"), ("events", "--stats", "same"), ("kill", "same", "0")):
        neither(*words)
    assert runc.refused("exec", "same", "true") == f"exec failed: {runtime.refused('exec', 'same', 'true')}"
    assert both("ps", "--format", "json", "same") == ("null\n", "null\n")
    ours_ps, theirs_ps = both("ps", "same")
    assert [line.split() for line in ours_ps.splitlines()] == [line.split() for line in theirs_ps.splitlines()]
    ours = runtime.state("same")
    assert (ours["pid"], ours["status"]) == (0, "stopped")
    runtime.ok("delete", "same")
    assert runtime.ok("list", "--format", "json") == "null\n"
    assert runtime.ok("list") == "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n"


def test_features_are_told_as_runc_tells_them(runtime: Runtime, runc: Runc) -> None:
    ours, theirs = json.loads(runtime.ok("features")), json.loads(runc("features"))
    assert list(ours) == list(theirs)
    assert list(shape(ours["linux"])) == list(shape(theirs["linux"]))
    assert ours["hooks"] == theirs["hooks"]
    assert ours["linux"]["capabilities"] == theirs["linux"]["capabilities"]
    assert set(ours["linux"]["namespaces"]) == {*theirs["linux"]["namespaces"], "time"}
    # Those that the guest's crun does not know, and listeners that a guest cannot have.
    missing = set(theirs["mountOptions"]) - set(ours["mountOptions"])
    assert missing == {
        *("acl", "iversion", "lazytime", "loud", "noacl", "noiversion", "nolazytime", "silent"),
        *("nosymfollow", "symfollow", "rnosymfollow", "rsymfollow", "ratime"),
    }
    assert set(ours["mountOptions"]) <= set(theirs["mountOptions"])
    assert set(theirs["linux"]["seccomp"]["actions"]) - set(ours["linux"]["seccomp"]["actions"]) == {"SCMP_ACT_NOTIFY"}


def test_the_suggested_config_is_runcs(runtime: Runtime, runc: Runc, tmp_path: Path) -> None:
    documents = []
    for name, call in (("ours", runtime.ok), ("theirs", runc)):
        directory = tmp_path / name
        directory.mkdir()
        call("spec", "--bundle", str(directory))
        documents.append(json.loads((directory / "config.json").read_text()))
    ours, theirs = documents
    # The guest has cgroup v2, where containers have a namespace of their own.
    ours["linux"]["namespaces"].remove({"type": "cgroup"})
    theirs["linux"]["namespaces"] = [each for each in theirs["linux"]["namespaces"] if each["type"] != "cgroup"]
    for document in documents:
        del document["ociVersion"], document["hostname"]
    assert ours == theirs
