"""What is malformed gives one clear error and changes nothing; no virtual machine is started for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.harness.bundles import Runtime

HUGE = 100_000_000


def changed(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps({**json.loads(text), **changes}).encode()


def limited(**cpu: Any) -> Callable[[bytes], bytes]:
    def change(text: bytes) -> bytes:
        document = json.loads(text)
        document["linux"]["resources"] = {"cpu": cpu}
        return json.dumps(document).encode()

    return change


#: what is wrong with config.json -> how it comes, what the message must name
CONFIGS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "not valid JSON"),
    "truncated": (lambda text: text[: len(text) // 2], "not valid JSON"),
    "not UTF-8": (
        lambda text: text.replace(b'"sh"', b'"\xc3\x28"').replace(b'"true"', b'"\xc3\x28"'),
        "not valid JSON",
    ),
    "a number": (lambda _: b"17", "not a JSON object"),
    "nested deeply": (lambda _: b"[" * 200_000, "not valid JSON"),
    "process is a list": (changed(process=[]), "'process'"),
    "args are a text": (changed(process={"args": "true", "cwd": "/"}), "'process.args'"),
    "root is missing": (changed(root=None), "root"),
    "root is a number": (changed(root={"path": 7}), "root"),
    "namespaces are a text": (changed(linux={"namespaces": "pid"}), "'linux.namespaces'"),
    "hooks are a number": (changed(hooks=3), "'hooks'"),
    "a hook has a text for a time": (changed(hooks={"prestart": [{"path": "/bin/true", "timeout": "x"}]}), "timeout"),
    "a hook's arguments are a number": (changed(hooks={"createRuntime": [{"path": "/bin/true", "args": 1}]}), "args"),
    "the cgroup is a number": (changed(linux={"cgroupsPath": 5, "namespaces": [{"type": "network"}]}), "cgroupsPath"),
    "a processor that is not there": (limited(cpus="0,8191"), "'linux.resources.cpu.cpus' is '0,8191'"),
    "a memory node that is not there": (limited(mems="0,1023"), "'linux.resources.cpu.mems' is '0,1023'"),
    "annotations are numbers": (changed(annotations={"a": 1}), "annotations"),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_malformed_bundle_is_refused(runtime: Runtime, box_rootfs: Path, name: str) -> None:
    change, word = CONFIGS[name]
    bundle = runtime.bundle("bad", box_rootfs, "true")
    config = bundle / "config.json"
    config.write_bytes(change(config.read_bytes()))
    before = config.read_bytes()
    message = runtime.refused("create", "--bundle", str(bundle), "--pid-file", str(bundle / "pid"), "bad")
    assert word in message
    assert "internal error" not in message
    assert config.read_bytes() == before
    assert [*bundle.iterdir()] == [config]
    assert runtime.leftovers() == []


def test_documents_that_are_too_large_are_not_read(runtime: Runtime, box_rootfs: Path) -> None:
    bundle = runtime.bundle("large", box_rootfs, "true")
    with (bundle / "config.json").open("r+b") as file:
        file.truncate(HUGE)
    assert "larger than" in runtime.refused("create", "--bundle", str(bundle), "large")
    assert runtime.leftovers() == []


@pytest.mark.parametrize("name", ["a/b", "../up", "..", ".", "-", "a\nb", "\xe9", "x" * 200])
@pytest.mark.parametrize("verb", ["create", "state", "delete", "exec"])
def test_ids_that_lead_elsewhere_are_refused(runtime: Runtime, verb: str, name: str) -> None:
    runtime.refused(verb, "--", name, "true") if verb == "exec" else runtime.refused(verb, "--", name)
    assert not runtime.root.exists()
