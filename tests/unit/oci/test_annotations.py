"""Which container of which pod."""

from __future__ import annotations

import pytest

from vmsandbox.errors import InvalidBundleError
from vmsandbox.oci.annotations import Role, role


def test_a_container_without_annotations_is_a_pod_of_its_own() -> None:
    assert role({"org.example": "x"}, container_id="c1").document() == Role(kind="single", sandbox_id="c1").document()


def test_containerds_sandbox_container() -> None:
    annotations = {
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": "s1",
        "io.kubernetes.cri.sandbox-name": "web",
        "io.kubernetes.cri.sandbox-namespace": "default",
        "io.kubernetes.cri.sandbox-uid": "u",
        "io.kubernetes.cri.sandbox-cpu-period": "100000",
        "io.kubernetes.cri.sandbox-cpu-quota": "200000",
        "io.kubernetes.cri.sandbox-cpu-shares": "2048",
        "io.kubernetes.cri.sandbox-memory": "134217728",
    }
    assert (
        role(annotations, container_id="s1").document()
        == Role(
            kind="sandbox",
            sandbox_id="s1",
            pod_name="web",
            pod_namespace="default",
            pod_uid="u",
            cpu_quota=200_000,
            cpu_period=100_000,
            cpu_shares=2048,
            memory_bytes=2**27,
        ).document()
    )


@pytest.mark.parametrize(
    ("kind", "sandbox"),
    [
        ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
        ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
    ],
)
def test_members_name_their_sandbox(kind: str, sandbox: str) -> None:
    assert (
        role({kind: "container", sandbox: "s1"}, container_id="c1").document()
        == Role(kind="container", sandbox_id="s1").document()
    )


def test_no_quota_counts_as_nothing_said() -> None:
    annotations = {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-cpu-quota": "-1"}
    assert role(annotations, container_id="s1").document() == Role(kind="sandbox", sandbox_id="s1").document()


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ({"io.kubernetes.cri.container-type": "pod"}, "is 'pod': known are 'sandbox' and 'container'"),
        ({"io.kubernetes.cri.container-type": "container"}, "is '', which is no id of a sandbox"),
        (
            {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "../x"},
            "annotation 'io.kubernetes.cri-o.SandboxID' is '../x', which is no id of a sandbox",
        ),
        (
            {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "other"},
            "is 'other', but the sandbox container's id is 'c1'",
        ),
        (
            {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-memory": "1g"},
            "annotation 'io.kubernetes.cri.sandbox-memory' is '1g' but has to be a number",
        ),
    ],
)
def test_contradictions_are_named(annotations: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidBundleError) as caught:
        role(annotations, container_id="c1")
    assert message in str(caught.value)
