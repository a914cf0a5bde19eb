"""containerd's CRI plugin over our runtime, as a kubelet uses it; runc is the control."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.harness.cri import TIMEOUT, Cri, container_config, pod_config
from tests.harness.engines import BOX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.engines import Engines

SERVING = (
    'trap "exit 9" TERM; mkdir /www; echo page > /www/index.html; httpd -h /www -p 8080; echo out; echo err >&2; '
    "while :; do sleep 0.1; done"
)


@pytest.fixture
def cri(containerd: Engines) -> Iterator[Cri]:
    client = Cri(containerd)
    yield client
    for pod in client("ListPodSandbox")["items"]:
        client("StopPodSandbox", pod_sandbox_id=pod["id"])
        client("RemovePodSandbox", pod_sandbox_id=pod["id"])
    client.close()


@pytest.mark.parametrize("handler", ["runc", "vmsandbox"])
def test_a_kubelet_has_a_pod_of_two_containers(cri: Cri, containerd: Engines, handler: str) -> None:
    logs = containerd.scratch / f"logs-{handler}"
    logs.mkdir()
    pod = pod_config(f"pod-{handler}", logs)
    pod_id = cri("RunPodSandbox", config=pod, runtime_handler=handler)["pod_sandbox_id"]
    ip = cri("PodSandboxStatus", pod_sandbox_id=pod_id)["status"]["network"]["ip"]
    ids = []
    for name, command in (("first", SERVING), ("second", "sleep 1000")):
        config = container_config(name, BOX, "sh", "-c", command, memory_limit_in_bytes=100 << 20)
        request = {"pod_sandbox_id": pod_id, "config": config, "sandbox_config": pod}
        ids.append(cri("CreateContainer", **request)["container_id"])
        cri("StartContainer", container_id=ids[-1])
    first, second = ids
    if handler == "vmsandbox":
        roots = containerd.ok("sh", "-c", "ls -d /run/containerd/runc/k8s.io/s/*").split()
        assert len(roots) == 1, "two containers have one machine"

    # one network, one host name
    assert cri.execute(second, "sh", "-c", "hostname; echo err >&2; exit 3") == (3, f"pod-{handler}\n", "err\n")
    assert cri.execute(second, "wget", "-qO-", "http://127.0.0.1:8080/") == (0, "page\n", "")
    assert containerd.ok("busybox", "wget", "-qO-", f"http://{ip}:8080/") == "page\n"
    assert "nameserver 10.0.0.10" in cri.execute(second, "cat", "/etc/resolv.conf")[1]

    # what takes too long, what is not there, what streams
    with pytest.raises(grpc.RpcError) as caught:
        cri.execute(second, "sleep", "1000", timeout=1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert cri.execute(second, "sh", "-c", "ps | grep -c '[s]leep 1000'") == (0, "1\n", "")
    with pytest.raises(grpc.RpcError, match="executable file not found"):
        cri.execute(second, "nosuch")
    said = cri.stream(second, "sh", "-c", "read x; echo got $x; echo err >&2; exit 5", stdin=b"word\n")
    assert (said["1"], said["2"]) == ("got word\n", "err\n")
    assert '"ExitCode","message":"5"' in said["3"]
    script = "test -t 0 && test -t 1 && echo terminal; read x; echo got $x; exit 4"
    said = cri.stream(second, "sh", "-c", script, stdin=b"word\n", tty=True)
    assert "terminal\r\n" in said["1"]
    assert "got word\r\n" in said["1"]
    assert '"ExitCode","message":"4"' in said["3"]

    # a log that is rotated
    (logs / "second.log").rename(logs / "second.log.1")
    cri("ReopenContainerLog", container_id=second)
    assert cri.execute(second, "sh", "-c", "echo later > /proc/1/fd/1") == (0, "", "")
    deadline = time.monotonic() + TIMEOUT
    while "stdout F later" not in (logs / "second.log").read_text():
        assert time.monotonic() < deadline, "nothing comes into the new log"

    # what it uses, and may use
    stats = cri("ContainerStats", container_id=first)["stats"]
    assert int(stats["memory"]["working_set_bytes"]["value"]) > 0
    assert cri("PodSandboxStats", pod_sandbox_id=pod_id)["stats"]["linux"]["process"]["process_count"] != "0"
    cri("UpdateContainerResources", container_id=first, linux={"memory_limit_in_bytes": 150 << 20})
    if handler == "vmsandbox":
        assert cri.execute(first, "cat", "/sys/fs/cgroup/memory.max") == (0, f"{150 << 20}\n", "")

    # the end of one, with its log, and of all
    cri("StopContainer", container_id=first, timeout=20)
    assert cri("ContainerStatus", container_id=first)["status"]["exit_code"] == 9
    lines = [line.split(" ", 1)[1] for line in (logs / "first.log").read_text().splitlines()]
    assert sorted(lines) == ["stderr F err", "stdout F out"]
    cri("RemoveContainer", container_id=first)
    assert cri.execute(second, "true") == (0, "", "")
    cri("StopPodSandbox", pod_sandbox_id=pod_id)
    assert cri("ContainerStatus", container_id=second)["status"]["exit_code"] == 137
    cri("RemovePodSandbox", pod_sandbox_id=pod_id)
    assert cri("ListContainers")["containers"] == []
