"""Labels of security modules, on hosts that have the module and on others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmsandbox.errors import InvalidBundleError, UnavailableError, UnsupportedError
from vmsandbox.oci.spec import Process
from vmsandbox.supervisor import labels
from vmsandbox.supervisor.sandbox import SandboxSpec
from vmsandbox_hypervisor.api import SecurityLabels

if TYPE_CHECKING:
    from pathlib import Path

NAMED = Process.model_validate({"cwd": "/", "apparmorProfile": "docker-default"})
LABELLED = Process.model_validate({"cwd": "/", "selinuxLabel": "system_u:system_r:container_t:s0"})


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One without any of the modules."""
    monkeypatch.setattr(labels, "APPARMOR", tmp_path / "apparmor")
    monkeypatch.setattr(labels, "PROFILES", tmp_path / "profiles")
    monkeypatch.setattr(labels, "SELINUX", tmp_path / "selinux")
    monkeypatch.setattr(labels, "CONTEXT", tmp_path / "context")
    return tmp_path


@pytest.fixture
def modules(host: Path) -> Path:
    """The host, with both modules in force."""
    (host / "apparmor").write_text("Y\n")
    (host / "profiles").write_text("docker-default (enforce)\na (odd) name (complain)\n")
    (host / "selinux").write_text("0")
    (host / "context").touch()
    return host


@pytest.mark.parametrize(
    ("process", "mount_label", "message"),
    [
        (NAMED, "", "'process.apparmorProfile' is 'docker-default': AppArmor is not enabled on the host"),
        (
            LABELLED,
            "",
            "'process.selinuxLabel' is 'system_u:system_r:container_t:s0': SELinux is not enabled on the host",
        ),
        (None, "label", "'linux.mountLabel' is 'label': SELinux is not enabled on the host"),
    ],
)
@pytest.mark.parametrize("switched_off", [True, False])
def test_a_label_of_a_module_that_is_not_in_force_is_refused_by_name(
    host: Path, process: Process | None, mount_label: str, message: str, switched_off: bool
) -> None:
    if switched_off:
        (host / "apparmor").write_text("N\n")
    with pytest.raises(UnsupportedError) as raised:
        labels.require_known(process, mount_label)
    assert str(raised.value) == message


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("profile", ["docker-default", "a (odd) name", "one//&another", ":space:one", "unconfined"])
def test_a_label_that_the_host_knows_is_taken(profile: str) -> None:
    labels.require_known(Process.model_validate({"cwd": "/", "apparmorProfile": profile}))
    labels.require_known(LABELLED, "label")


def test_where_nothing_is_named_nothing_is_needed() -> None:
    labels.require_known(None)
    labels.require_known(Process.model_validate({"cwd": "/", "apparmorProfile": "unconfined"}))


def test_a_profile_that_is_not_loaded_is_refused_by_name(modules: Path) -> None:
    (modules / "profiles").write_text("docker-default-not (enforce)\n")
    with pytest.raises(
        InvalidBundleError, match=r"^'apparmorProfile' is 'docker-default': no such profile is loaded: "
    ):
        labels.require_known(NAMED, name="")
    (modules / "profiles").unlink()
    with pytest.raises(UnsupportedError, match=r"^'process\.apparmorProfile' .*No such file.*: mount securityfs$"):
        labels.require_known(NAMED)


def test_a_context_that_the_policy_does_not_know_is_refused_by_name(modules: Path) -> None:
    (modules / "context").unlink()
    (modules / "context").symlink_to("/dev/full")
    with pytest.raises(InvalidBundleError, match=r"^'process\.selinuxLabel' is 'system_u:.*policy does not know it: "):
        labels.require_known(LABELLED)
    with pytest.raises(InvalidBundleError, match=r"^'linux\.mountLabel' is 'label': "):
        labels.require_known(None, "label")


def test_labels_other_than_those_of_the_pod_are_complained_of() -> None:
    spec = SandboxSpec(id="a", apparmor="docker-default", selinux="u:r:t:s0")
    same = {"apparmorProfile": "docker-default", "selinuxLabel": "u:r:t:s0"}
    for process in (None, {}, same, {"apparmorProfile": "unconfined"}):
        assert labels.complaints(process, spec) == []
    assert labels.complaints({**same, "selinuxLabel": "u:r:t:s1"}, spec) == [
        "'process.selinuxLabel' is 'u:r:t:s1', which is not applied: the pod's virtual machine runs under 'u:r:t:s0'"
    ]
    assert labels.complaints({"apparmorProfile": "other"}, SandboxSpec(id="a")) == [
        "'process.apparmorProfile' is 'other', which is not applied: the pod's virtual machine runs under none"
    ]


def test_a_machine_that_does_not_come_up_names_the_label_it_was_to_have() -> None:
    with (
        pytest.raises(
            UnavailableError, match=r"^gone: QEMU was to run under 'process\.apparmorProfile' 'x': "
        ) as raised,
        labels.blamed(SecurityLabels(apparmor="x")),
    ):
        raise UnavailableError("gone", detail="evidence")
    assert raised.value.detail == "evidence"
    with pytest.raises(UnavailableError, match=r"^gone$"), labels.blamed(SecurityLabels()):
        raise UnavailableError("gone")
