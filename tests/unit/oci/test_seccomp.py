"""From a profile to the seccomp section of a spec."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox.errors import InvalidArgumentError, SandboxError
from vmsandbox.oci.capabilities import DEFAULT as DEFAULT_CAPS
from vmsandbox.oci.capabilities import KNOWN, adjusted
from vmsandbox.oci.seccomp import default_file, resolved, section

if TYPE_CHECKING:
    from pathlib import Path


def allowed(found: dict[str, Any]) -> set[str]:
    return {
        name
        for rule in found["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule
        for name in rule["names"]
    }


def refused(found: dict[str, Any]) -> dict[str, int]:
    return {
        name: rule["errnoRet"]
        for rule in found["syscalls"]
        if rule["action"] == "SCMP_ACT_ERRNO" and "args" not in rule
        for name in rule["names"]
    }


def test_the_default_profile_allows_ordinary_programs_and_refuses_the_rest() -> None:
    found = section("default", adjusted())
    assert {"read", "execve", "futex", "openat2", "ptrace", "chroot", "arch_prctl"} <= allowed(found)
    assert not {"mount", "bpf", "kexec_load", "init_module", "io_uring_setup", "keyctl"} & allowed(found)
    assert refused(found)["mount"] == 1, "what exists is forbidden"
    assert "clone3" not in allowed(found) | set(refused(found)), "so that programs fall back to clone"
    assert found["defaultErrnoRet"] == 38, "what does not exist is missing"


def test_rules_that_say_what_the_default_says_are_left_out() -> None:
    rules = [
        {"names": ["a"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["b"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
        {"names": ["c"], "action": "SCMP_ACT_ERRNO", "errnoRet": 2},
    ]
    found = resolved({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}, [])
    assert refused(found) == {"c": 2}


def test_no_system_call_is_both_allowed_and_refused() -> None:
    for caps in (adjusted(), KNOWN, (), adjusted(["SYS_ADMIN"]), adjusted(["SYSLOG", "BPF"])):
        found = section("default", caps)
        assert not allowed(found) & set(refused(found))


def test_capabilities_open_their_system_calls() -> None:
    assert {"mount", "unshare", "clone", "clone3", "bpf", "syslog"} <= allowed(section("default", ["CAP_SYS_ADMIN"]))
    assert "chroot" not in allowed(section("default", ["CAP_SYS_ADMIN"]))
    assert "syslog" in allowed(section("default", ["CAP_SYSLOG"]))
    assert {"reboot", "settimeofday", "init_module", "iopl"} <= allowed(section("default", KNOWN))


def test_namespaces_need_a_capability() -> None:
    rules = [rule for rule in section("default", adjusted())["syscalls"] if rule["names"] == ["clone"]]
    allowing = [rule for rule in rules if rule["action"] == "SCMP_ACT_ALLOW"]
    refusing = [rule["args"][0] for rule in rules if rule["action"] == "SCMP_ACT_ERRNO"]
    (mask,) = [rule["args"][0]["value"] for rule in allowing]
    assert mask == sum(1 << bit for bit in (17, 25, 26, 27, 28, 29, 30)), "the CLONE_NEW flags"
    assert sum(argument["value"] for argument in refusing) == mask
    assert all(argument["value"] == argument["valueTwo"] for argument in refusing)


def test_sockets_to_the_host_are_refused() -> None:
    rules = [rule for rule in section("default", KNOWN)["syscalls"] if rule["names"] == ["socket"]]
    assert {(rule["action"], rule["args"][0]["op"], rule["args"][0]["value"]) for rule in rules} == {
        ("SCMP_ACT_ALLOW", "SCMP_CMP_NE", 40),
        ("SCMP_ACT_ERRNO", "SCMP_CMP_EQ", 40),
    }


def test_every_name_in_the_default_profile_is_there_once_per_condition() -> None:
    profile = json.loads(default_file().read_text())
    for caps in ((), sorted(DEFAULT_CAPS), KNOWN):
        found = resolved(profile, caps)
        plain = [name for rule in found["syscalls"] if "args" not in rule for name in rule["names"]]
        assert len(plain) == len(set(plain))


def test_a_profile_in_dockers_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile = {
        "defaultAction": "SCMP_ACT_KILL",
        "architectures": ["SCMP_ARCH_ARM"],
        "syscalls": [
            {"name": "read", "action": "SCMP_ACT_ALLOW"},
            {"names": ["write"], "action": "SCMP_ACT_ALLOW", "args": None, "includes": {}, "excludes": {}},
            {"names": ["a"], "action": "SCMP_ACT_LOG", "includes": {"arches": ["s390x"]}},
            {"names": ["b"], "action": "SCMP_ACT_LOG", "includes": {"arches": ["amd64"]}},
            {"names": ["c"], "action": "SCMP_ACT_LOG", "excludes": {"arches": ["amd64"]}},
            {"names": ["d"], "action": "SCMP_ACT_LOG", "includes": {"minKernel": "4.8"}},
            {"names": ["e"], "action": "SCMP_ACT_LOG", "includes": {"minKernel": "9.9"}},
            {"names": ["f"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5, "excludes": {"caps": ["CAP_KILL"]}},
        ],
    }
    path.write_text(json.dumps(profile))
    assert section(str(path), ["CAP_CHOWN"]) == {
        "defaultAction": "SCMP_ACT_KILL",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["b", "d"], "action": "SCMP_ACT_LOG"},
            {"names": ["f"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5},
        ],
    }


def test_an_edited_profile_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    assert section(str(path), [])["defaultAction"] == "SCMP_ACT_ALLOW"
    path.write_text('{"defaultAction": "SCMP_ACT_LOG"}')
    os.utime(path, ns=(1, 1))
    assert section(str(path), [])["defaultAction"] == "SCMP_ACT_LOG"


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ([], "is not an object"),
        ({}, "'defaultAction' is 'None', which is no known action"),
        ({"defaultAction": "ALLOW"}, "'defaultAction' is 'ALLOW', which is no known action"),
        ({"syscalls": 3}, "'syscalls' is not a list"),
        ({"syscalls": [3]}, "'syscalls[0]' is not an object"),
        ({"syscalls": [{"names": "read"}]}, "'syscalls[0].names' is not a list of system calls"),
        ({"syscalls": [{"names": ["read"], "action": "x"}]}, "'syscalls[0].action' is 'x', which is no known action"),
        ({"syscalls": [{"errnoRet": "EPERM"}]}, "'syscalls[0].errnoRet' is 'EPERM', which is no error number"),
        ({"syscalls": [{"args": [{"op": "EQ"}]}]}, "'syscalls[0].args[0]' has no known operator"),
        (
            {"syscalls": [{"args": [{"op": "SCMP_CMP_EQ", "index": 6}]}]},
            "'syscalls[0].args[0].index' is '6', out of range",
        ),
        ({"syscalls": [{"includes": 3}]}, "'syscalls[0].includes' is not an object"),
        ({"syscalls": [{"includes": {"caps": "x"}}]}, "'syscalls[0].includes.caps' is not understood"),
        ({"syscalls": [{"includes": {"minKernel": "new"}}]}, "minKernel 'new' of 'syscalls[0]' is not understood"),
    ],
)
def test_what_is_no_profile_is_named(profile: Any, message: str) -> None:
    if isinstance(profile, dict) and "syscalls" in profile:
        rules = profile["syscalls"]
        if isinstance(rules, list):
            rules = [{"action": "SCMP_ACT_LOG", **rule} if isinstance(rule, dict) else rule for rule in rules]
        profile = {"defaultAction": "SCMP_ACT_LOG", "syscalls": rules}
    with pytest.raises(InvalidArgumentError) as caught:
        resolved(profile, [], name="mine")
    assert str(caught.value).startswith("seccomp profile 'mine'")
    assert message in str(caught.value)


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("{")
    with pytest.raises(InvalidArgumentError, match=r"cannot read seccomp profile '.*': expecting property name"):
        section(str(path), [])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
RULES = st.dictionaries(
    st.sampled_from(["names", "name", "action", "args", "includes", "excludes", "errnoRet"]), ANYTHING
)
PROFILES = st.fixed_dictionaries(
    {"defaultAction": st.just("SCMP_ACT_LOG"), "syscalls": st.lists(RULES, max_size=3) | ANYTHING}
)


@given(PROFILES | ANYTHING)
def test_no_profile_raises_anything_but_our_errors(profile: Any) -> None:
    try:
        resolved(profile, ["CAP_CHOWN"])
    except SandboxError:
        return
