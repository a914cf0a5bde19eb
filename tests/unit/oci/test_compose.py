"""From image config and options to a runtime spec: behaviours D1 to D9."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox.errors import InvalidArgumentError, NotFoundError, SandboxError
from vmsandbox.oci.capabilities import KNOWN
from vmsandbox.oci.compose import Composed, Defaults, compose, compose_exec
from vmsandbox.oci.options import Device, ExecOptions, RunOptions, exec_options, run_options

IMAGE: dict[str, object] = {"Entrypoint": ["/entry"], "Cmd": ["serve", "--all"]}
CONTAINER = "0123456789abcdef0123"


def composed(
    image: dict[str, Any] | None = None, /, *, more: dict[str, Any] | None = None, **document: Any
) -> Composed:
    return compose(
        IMAGE if image is None else image,
        run_options(document),
        rootfs="/run/vmsandbox/rootfs",
        container_id=CONTAINER,
        **(more or {}),
    )


def mounts(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {mount["destination"]: mount for mount in spec["mounts"]}


@pytest.mark.parametrize(
    ("asked", "args"),
    [
        ({}, ["/entry", "serve", "--all"]),
        ({"args": ["x"]}, ["/entry", "x"]),
        ({"entrypoint": ["sh"]}, ["sh"]),
        ({"entrypoint": ["sh"], "args": ["-c", "y"]}, ["sh", "-c", "y"]),
        ({"entrypoint": [""], "args": ["y"]}, ["y"]),
        ({"entrypoint": [], "args": ["y"]}, ["y"]),
    ],
)
def test_d1_command_and_entrypoint(asked: dict[str, Any], args: list[str]) -> None:
    assert composed(**asked).spec["process"]["args"] == args


@pytest.mark.parametrize(("image", "asked"), [({}, {}), ({"Cmd": []}, {}), (IMAGE, {"entrypoint": [""]})])
def test_d1_no_command_at_all_is_an_error(image: dict[str, Any], asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="no command specified"):
        composed(image, **asked)


def test_d2_working_directory() -> None:
    assert composed().spec["process"]["cwd"] == "/"
    assert composed({**IMAGE, "WorkingDir": "/srv/"}).spec["process"]["cwd"] == "/srv"
    assert composed({**IMAGE, "WorkingDir": "app"}).spec["process"]["cwd"] == "/app"
    assert composed({**IMAGE, "WorkingDir": "/srv"}, workdir="/tmp//x").spec["process"]["cwd"] == "/tmp/x"
    assert composed().make_cwd


def test_d3_environment() -> None:
    image = {**IMAGE, "Env": ["PATH=/image", "A=1"]}
    spec = composed(image, env=["A=a=b", "B", "C"], client_env={"B": "client"}, tty=True).spec
    assert spec["process"]["env"] == ["PATH=/image", "HOSTNAME=0123456789ab", "TERM=xterm", "A=a=b", "B=client"]


def test_d3_home_is_left_to_the_guest_unless_it_is_set() -> None:
    assert composed().default_home
    assert not composed(env=["HOME=/x"]).default_home
    assert not composed({**IMAGE, "Env": ["HOME=/x"]}).default_home


def test_without_a_terminal_there_is_no_term() -> None:
    process = composed().spec["process"]
    assert not process["terminal"]
    assert not any(entry.startswith("TERM=") for entry in process["env"])


def test_d4_files_of_the_pod_are_mounted() -> None:
    found = mounts(composed().spec)
    for name in ("hosts", "hostname", "resolv.conf"):
        assert found[f"/etc/{name}"] == {
            "destination": f"/etc/{name}",
            "type": "bind",
            "source": f"/run/vmsandbox/etc/{name}",
            "options": ["rbind", "rprivate", "rw"],
        }
    assert "size=67108864" in found["/dev/shm"]["options"]


def test_d4_files_follow_a_read_only_root() -> None:
    spec = composed(read_only=True).spec
    assert spec["root"] == {"path": "/run/vmsandbox/rootfs", "readonly": True}
    assert mounts(spec)["/etc/hosts"]["options"] == ["rbind", "rprivate", "ro"]


def test_d4_mounts_asked_for_replace_those_provided() -> None:
    spec = composed(
        volumes=["/h:/etc/hosts:ro"], tmpfs=["/dev/shm:size=1m"], more={"volume_sources": {"/etc/hosts": "/guest/h"}}
    ).spec
    found = mounts(spec)
    assert len(found) == len(spec["mounts"]), "every destination once"
    assert found["/etc/hosts"]["source"] == "/guest/h"
    assert found["/dev/shm"]["options"] == ["noexec", "nosuid", "nodev", "size=1m"]


def test_mounts_are_made_from_the_root_down() -> None:
    spec = composed(
        volumes=["/a:/etc", "/b:/x/y/z"],
        tmpfs=["/x/y"],
        more={"volume_sources": {"/etc": "/g/a", "/x/y/z": "/g/b"}},
    ).spec
    order = [mount["destination"] for mount in spec["mounts"]]
    assert order.index("/proc") < order.index("/etc") < order.index("/etc/hosts")
    assert order.index("/x/y") < order.index("/x/y/z")
    assert order.index("/dev") < order.index("/dev/pts")


def test_one_place_cannot_be_claimed_twice() -> None:
    with pytest.raises(InvalidArgumentError, match="mount point '/x' is given twice"):
        composed(tmpfs=["/x", "/x/"])


def test_a_volume_that_was_not_shared_is_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="volume '/src' at '/x' has not been shared"):
        composed(volumes=["/src:/x"])


def test_tmpfs_flags_can_be_undone() -> None:
    assert mounts(composed(tmpfs=["/x:exec,suid"]).spec)["/x"]["options"] == ["nodev", "exec", "suid"]


def test_d6_devices_are_denied_but_for_the_usual_ones() -> None:
    rules = composed().spec["linux"]["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    assert {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"} in rules
    assert not any(rule["allow"] and "w" in rule["access"] and rule.get("type") == "b" for rule in rules)


def test_d6_a_device_is_made_and_allowed() -> None:
    device = Device(path="/dev/data", type="b", major=254, minor=16, mode=0o600, uid=1, gid=2, access="r")
    linux = composed(more={"devices": [device]}).spec["linux"]
    assert linux["devices"] == [
        {"path": "/dev/data", "type": "b", "major": 254, "minor": 16, "fileMode": 0o600, "uid": 1, "gid": 2}
    ]
    assert {"allow": True, "type": "b", "major": 254, "minor": 16, "access": "r"} in linux["resources"]["devices"]


def test_d6_privileged() -> None:
    spec = composed(privileged=True).spec
    assert spec["process"]["capabilities"]["effective"] == list(KNOWN)
    assert spec["linux"]["maskedPaths"] == spec["linux"]["readonlyPaths"] == []
    assert "seccomp" not in spec["linux"]
    assert spec["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert "ro" not in mounts(spec)["/sys"]["options"] + mounts(spec)["/sys/fs/cgroup"]["options"]


def test_without_privileges_the_kernels_files_are_protected() -> None:
    spec = composed().spec
    assert "/proc/kcore" in spec["linux"]["maskedPaths"]
    assert "/proc/sys" in spec["linux"]["readonlyPaths"]
    assert "ro" in mounts(spec)["/sys"]["options"]
    assert "ro" in mounts(spec)["/sys/fs/cgroup"]["options"]


def test_d7_resources() -> None:
    spec = composed(memory="64m", cpus=1.5, cpu_shares=512, cpuset_cpus="0", pids_limit=7, oom_score_adj=100).spec
    resources = spec["linux"]["resources"]
    assert resources["memory"] == {"limit": 64 * 2**20}
    assert resources["cpu"] == {"quota": 150_000, "period": 100_000, "shares": 512, "cpus": "0"}
    assert resources["pids"] == {"limit": 7}
    assert spec["process"]["oomScoreAdj"] == 100


def test_d7_what_is_not_asked_is_not_limited_but_for_processes() -> None:
    resources = composed().spec["linux"]["resources"]
    assert set(resources) == {"devices", "pids"}
    assert resources["pids"] == {"limit": 2048}
    assert set(composed(pids_limit=0, cpus=0, cpu_shares=0).spec["linux"]["resources"]) == {"devices"}


def test_a_container_never_inherits_the_agents_protection_from_the_oom_killer() -> None:
    assert composed().spec["process"]["oomScoreAdj"] == 0


def test_d8_user_of_the_request_else_of_the_image() -> None:
    assert composed().user == "0", "so that the agent adds the groups root has in the image"
    assert composed({**IMAGE, "User": "app"}).user == "app"
    assert composed({**IMAGE, "User": "app"}, user="1000:5", groups=[7]).user == "1000:5"
    assert composed(groups=[7]).spec["process"]["user"]["additionalGids"] == [7]


def test_d8_capabilities_reach_every_set_but_the_inheritable_one() -> None:
    found = composed(cap_drop=["ALL"], cap_add=["chown"]).spec["process"]["capabilities"]
    assert found == {kind: ["CAP_CHOWN"] for kind in ("bounding", "effective", "permitted")}


def test_d9_namespaces() -> None:
    kinds = [entry["type"] for entry in composed().spec["linux"]["namespaces"]]
    assert kinds == ["pid", "ipc", "uts", "mount", "cgroup"], "no network: that is the machine's"
    shared = {"ipc": "", "uts": "", "pid": "/proc/7/ns/pid"}
    spec = composed(more={"shared_namespaces": shared, "pod_hostname": "pod"}).spec
    assert spec["linux"]["namespaces"] == [
        {"type": "pid", "path": "/proc/7/ns/pid"},
        {"type": "mount"},
        {"type": "cgroup"},
    ]
    assert "hostname" not in spec
    assert "HOSTNAME=pod" in spec["process"]["env"]
    assert mounts(spec)["/dev/shm"]["source"] == "/dev/shm"


def test_the_hostname_of_a_pod_cannot_be_set_by_its_member() -> None:
    with pytest.raises(InvalidArgumentError, match="hostname 'mine' cannot be set: it is the pod's"):
        composed(hostname="mine", more={"shared_namespaces": {"uts": ""}})


def test_other_namespaces_cannot_be_shared() -> None:
    with pytest.raises(InvalidArgumentError, match="namespace 'mount' cannot be shared"):
        composed(more={"shared_namespaces": {"mount": ""}})


def test_hostname_is_the_short_id_unless_given() -> None:
    assert composed().spec["hostname"] == "0123456789ab"
    spec = composed(hostname="web", domainname="example.org").spec
    assert (spec["hostname"], spec["domainname"]) == ("web", "example.org")
    assert "HOSTNAME=web" in spec["process"]["env"]


def test_limits_of_files_and_processes_do_not_depend_on_the_guests_memory() -> None:
    limits = {each["type"]: (each["soft"], each["hard"]) for each in composed().spec["process"]["rlimits"]}
    assert limits == {"RLIMIT_NOFILE": (1024, 1_048_576), "RLIMIT_NPROC": (2**64 - 1, 2**64 - 1)}
    changed = composed(ulimits=["nofile=5:6", "core=0"]).spec["process"]["rlimits"]
    assert {"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6} in changed
    assert {"type": "RLIMIT_CORE", "soft": 0, "hard": 0} in changed


def test_sysctls_of_own_namespaces_only() -> None:
    assert composed(sysctls=["kernel/msgmax=9"]).spec["linux"]["sysctl"] == {"kernel.msgmax": "9"}
    with pytest.raises(InvalidArgumentError, match=r"sysctl 'net.core.somaxconn' is not the container's own"):
        composed(sysctls=["net.core.somaxconn=9"])
    with pytest.raises(InvalidArgumentError, match=r"sysctl 'kernel.msgmax' is not the container's own"):
        composed(sysctls=["kernel.msgmax=9"], more={"shared_namespaces": {"ipc": ""}})


def test_labels_and_stop_signal_come_from_the_image_unless_given() -> None:
    image = {**IMAGE, "Labels": {"a": "1", "b": "2"}, "StopSignal": "SIGQUIT"}
    plain = composed(image)
    assert (plain.labels, plain.stop_signal) == ({"a": "1", "b": "2"}, 3)
    changed = composed(image, labels=["b=3"], stop_signal="9")
    assert (changed.labels, changed.stop_signal) == ({"a": "1", "b": "3"}, 9)
    assert composed().stop_signal == 15


def test_no_new_privileges_and_seccomp_follow_the_configuration_unless_given() -> None:
    strict = {"defaults": Defaults(no_new_privileges=True, seccomp="unconfined")}
    spec = composed(more=strict).spec
    assert spec["process"]["noNewPrivileges"]
    assert "seccomp" not in spec["linux"]
    loose = composed(no_new_privileges=False, seccomp="default", more=strict).spec
    assert not loose["process"]["noNewPrivileges"]
    assert loose["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert "seccomp" in composed().spec["linux"]
    assert "seccomp" in composed(privileged=True, seccomp="default").spec["linux"]


def test_the_filter_goes_along_compiled() -> None:
    assert set(composed().spec["annotations"]) == {"run.oci.seccomp_bpf_data"}
    assert "annotations" not in composed(seccomp="unconfined").spec


def test_a_profile_that_does_not_exist_is_named() -> None:
    with pytest.raises(NotFoundError, match="seccomp profile '/none' does not exist"):
        composed(seccomp="/none")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"Cmd": "ls"}, "the image's config is malformed: 'Cmd' is not a list of texts"),
        ({"Entrypoint": [1]}, "the image's config is malformed: 'Entrypoint' is not a list of texts"),
        ({"WorkingDir": []}, "the image's config is malformed: 'WorkingDir' is not a text"),
        ({"Labels": []}, "the image's config is malformed: 'Labels' does not map texts to texts"),
        ({"Cmd": ["x"], "User": "a:b:c"}, "user 'a:b:c' is not understood"),
        ({"Cmd": ["x"], "Env": ["=x"]}, "environment variable '=x' of the image is not of the form KEY=VALUE"),
        ({"Cmd": ["x"], "StopSignal": "SIGX"}, "'SIGX' is no signal"),
        ({"Cmd": ["x\0"]}, "the image's config is malformed: 'Cmd' is not a list of texts"),
    ],
)
def test_a_malformed_image_is_named(image: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        composed(image)
    assert message in str(caught.value)


def test_specs_of_two_containers_share_nothing_mutable() -> None:
    first, second = composed().spec, composed().spec
    first["linux"]["seccomp"]["syscalls"].clear()
    first["linux"]["maskedPaths"].clear()
    assert second["linux"]["seccomp"]["syscalls"]
    assert composed().spec == second


def test_a_spec_is_json() -> None:
    spec = composed().spec
    assert json.loads(json.dumps(spec)) == spec


def test_an_exec_says_only_what_differs() -> None:
    spec = composed({**IMAGE, "Env": ["A=1"]}).spec
    plain = compose_exec(exec_options({"args": ["ls"]}), spec)
    assert plain.process == {"args": ["ls"], "terminal": False, "env": spec["process"]["env"]}
    assert (plain.user, plain.default_home) == ("", True)


def test_an_exec_changes_what_is_asked() -> None:
    spec = composed({**IMAGE, "Env": ["A=1", "B=2"]}).spec
    options = ExecOptions(
        args=("sh",), env=("A=x=y", "HOME=/h"), workdir="/w/", user="7", tty=True, privileged=True, client_env={}
    )
    made = compose_exec(options, spec)
    assert made.process["env"] == [
        *(entry for entry in spec["process"]["env"] if not entry.startswith(("A=", "B="))),
        "A=x=y",
        "B=2",
        "TERM=xterm",
        "HOME=/h",
    ]
    assert (made.process["cwd"], made.process["terminal"]) == ("/w", True)
    assert made.process["capabilities"]["effective"] == list(KNOWN)
    assert (made.user, made.default_home) == ("7", False)


def test_a_terminal_of_an_exec_keeps_the_containers_term() -> None:
    spec = composed(env=["TERM=dumb"]).spec
    made = compose_exec(ExecOptions(args=("sh",), tty=True), spec)
    assert [entry for entry in made.process["env"] if entry.startswith("TERM=")] == ["TERM=dumb"]


def test_composing_imports_nothing_heavy() -> None:
    program = (
        "import sys; from vmsandbox.oci.compose import compose; from vmsandbox.oci.options import run_options\n"
        "compose({'Cmd': ['x']}, run_options({}), rootfs='/r', container_id='a')\n"
        "print([name for name in ('pydantic', 'asyncio', 'difflib', 'subprocess') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


TEXTS = st.text(max_size=8)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from(["Entrypoint", "Cmd", "Env", "WorkingDir", "User", "StopSignal", "Labels"])
OPTIONS = st.builds(
    RunOptions,
    args=st.lists(TEXTS, max_size=2).map(tuple),
    env=st.lists(TEXTS, max_size=3).map(tuple),
    workdir=TEXTS,
    cap_add=st.lists(st.sampled_from(["ALL", "CHOWN", "x"]), max_size=2).map(tuple),
    cap_drop=st.lists(st.sampled_from(["ALL", "chown"]), max_size=2).map(tuple),
    privileged=st.booleans(),
    tty=st.booleans(),
    read_only=st.booleans(),
)


@given(st.dictionaries(KEYS, ANYTHING, max_size=4) | st.dictionaries(KEYS, st.lists(TEXTS, max_size=2)), OPTIONS)
def test_no_image_or_options_raise_anything_but_our_errors(image: dict[str, Any], options: RunOptions) -> None:
    try:
        made = compose(image, options, rootfs="/r", container_id="abc")
    except SandboxError:
        return
    assert made.spec["process"]["args"]
    assert made.spec["process"]["cwd"].startswith("/")
    json.dumps(made.spec)
