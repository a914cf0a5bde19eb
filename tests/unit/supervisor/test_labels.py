"""Labels of security modules, on hosts that have the module and on others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmsandbox.errors import UnsupportedError
from vmsandbox.oci.spec import Process
from vmsandbox.supervisor import labels

if TYPE_CHECKING:
    from pathlib import Path

NAMED = Process.model_validate({"cwd": "/", "apparmorProfile": "docker-default"})
LABELLED = Process.model_validate({"cwd": "/", "selinuxLabel": "system_u:system_r:container_t:s0"})


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One without any of the modules."""
    monkeypatch.setattr(labels, "APPARMOR", tmp_path / "apparmor")
    monkeypatch.setattr(labels, "SELINUX", tmp_path / "selinux")
    return tmp_path


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


def test_where_the_module_is_there_and_where_nothing_is_named_all_is_well(host: Path) -> None:
    labels.require_known(None)
    labels.require_known(Process.model_validate({"cwd": "/", "apparmorProfile": "unconfined"}))
    (host / "apparmor").write_text("Y\n")
    (host / "selinux").write_text("0")
    labels.require_known(NAMED)
    labels.require_known(LABELLED, "label")
