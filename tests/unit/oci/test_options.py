"""Options as clients send them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox.errors import InvalidArgumentError, SandboxError
from vmsandbox.oci import options
from vmsandbox.oci.options import ExecOptions, RunOptions, exec_options, run_options
from vmsandbox.oci.texts import Disk, Tmpfs, Ulimit, Volume


def test_nothing_asked_is_the_default() -> None:
    assert run_options({}) == RunOptions()


def test_every_field_can_be_sent() -> None:
    document = {
        "args": ["a", "b"],
        "entrypoint": ["e"],
        "env": ["A=b", "C"],
        "client_env": {"C": "d"},
        "workdir": "/w",
        "user": "u:g",
        "groups": [5],
        "tty": True,
        "hostname": "host",
        "domainname": "example.org",
        "read_only": True,
        "tmpfs": ["/t:size=1m"],
        "volumes": ["./v:/v"],
        "disks": ["./disk.img:/dev/data:r"],
        "memory_bytes": 10**7,
        "cpus": "1.5",
        "cpu_shares": "512",
        "cpuset_cpus": "0-1,3",
        "pids_limit": 9,
        "shm_bytes": "1m",
        "oom_score_adj": -5,
        "ulimits": ["nofile=1:2"],
        "sysctls": ["kernel.msgmax=1"],
        "cap_add": ["ALL"],
        "cap_drop": ["CHOWN"],
        "privileged": True,
        "no_new_privileges": True,
        "seccomp": "unconfined",
        "labels": ["a=b=c", "flag"],
        "stop_signal": "INT",
    }
    assert set(document) == {field.name for field in fields(RunOptions)}
    taken = run_options(document, cwd="/here")
    assert taken == RunOptions(
        args=("a", "b"),
        entrypoint=("e",),
        env=("A=b", "C"),
        client_env={"C": "d"},
        workdir="/w",
        user="u:g",
        groups=(5,),
        tty=True,
        hostname="host",
        domainname="example.org",
        read_only=True,
        tmpfs=(Tmpfs(destination="/t", options=("size=1m",)),),
        volumes=(Volume(source="/here/v", destination="/v", create=True),),
        disks=(Disk(source="/here/disk.img", path="/dev/data", access="r"),),
        memory_bytes=10**7,
        cpus=1.5,
        cpu_shares=512,
        cpuset_cpus="0-1,3",
        pids_limit=9,
        shm_bytes=2**20,
        oom_score_adj=-5,
        ulimits=(Ulimit(type="RLIMIT_NOFILE", soft=1, hard=2),),
        sysctls={"kernel.msgmax": "1"},
        cap_add=("ALL",),
        cap_drop=("CHOWN",),
        privileged=True,
        no_new_privileges=True,
        seccomp="unconfined",
        labels={"a": "b=c", "flag": ""},
        stop_signal=2,
    )


def test_sizes_and_mounts_have_the_names_of_their_command_line_options() -> None:
    taken = run_options({"memory": "512m", "shm_size": "1g", "mounts": ["type=tmpfs,dst=/a", "src=/b,dst=/c"]})
    assert (taken.memory_bytes, taken.shm_bytes) == (512 * 2**20, 2**30)
    assert (taken.tmpfs, taken.volumes) == ((Tmpfs(destination="/a"),), (Volume(source="/b", destination="/c"),))


def test_null_means_not_asked() -> None:
    assert run_options({"entrypoint": None, "memory": None}) == RunOptions()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"memroy": "1g"}, "unknown option 'memroy': did you mean 'memory'?"),
        ({"memory": "1m"}, "memory '1048576' is too little: give at least '6m'"),
        ({"memory": "lots"}, "memory 'lots' is not a size: write for example '512m' or '2g'"),
        ({"memory": -1}, "memory '-1' is too little: give at least '6m'"),
        ({"shm_size": 0}, "shm_size '0' is too little: give at least '4k'"),
        ({"cpus": "two"}, "option 'cpus' is 'two' but has to be a number"),
        ({"cpus": 0.001}, "cpus '0.001' is out of range: give 0.01 to 1024, or 0 for no limit"),
        ({"cpu_shares": 1}, "cpu_shares '1' is out of range: give 2 to 262144"),
        ({"cpuset_cpus": "0-"}, "cpuset_cpus '0-' is not understood: write for example '0-2,4'"),
        ({"pids_limit": True}, "option 'pids_limit' is 'True' but has to be a whole number"),
        ({"oom_score_adj": 1001}, "oom_score_adj '1001' is out of range: give -1000 to 1000"),
        ({"tty": "yes"}, "option 'tty' has to be true or false"),
        ({"args": "ls"}, "option 'args' has to be a list of texts"),
        ({"args": ["a\0"]}, "argument 'a\0' contains a zero byte"),
        ({"workdir": "tmp"}, "working directory 'tmp' has to be an absolute path"),
        ({"hostname": "-x"}, "hostname '-x' is not valid: use letters, digits, '.', '-' and '_', at most 64"),
        ({"labels": ["=x"]}, "option 'labels' has an entry without a name"),
        ({"labels": 3}, "option 'labels' has to map names to texts"),
        ({"sysctls": {"x": "1"}}, "sysctl 'x' is no name of one: write for example 'net.core.somaxconn'"),
        ({"stop_signal": "NOPE"}, "'NOPE' is no signal: give a name like 'TERM' or a number from 1 to 64"),
        ({"groups": [-1]}, "groups '-1' is out of range: give 0 to 2147483647"),
    ],
)
def test_what_is_refused_is_named(document: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        run_options(document)
    assert str(caught.value) == message


def test_an_exec_needs_a_command() -> None:
    assert exec_options({"args": ["ls"], "tty": True}) == ExecOptions(args=("ls",), tty=True)
    with pytest.raises(InvalidArgumentError, match="no command to execute"):
        exec_options({})


def test_every_field_has_a_reader() -> None:
    assert {field.name for cls in (RunOptions, ExecOptions) for field in fields(cls)} == set(options._READERS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
NAMES = st.sampled_from([*(field.name for field in fields(RunOptions)), "memory", "shm_size", "mounts"])


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_no_document_raises_anything_but_our_errors(document: dict[str, Any]) -> None:
    for read in (run_options, exec_options):
        try:
            read(document)
        except SandboxError:
            continue
