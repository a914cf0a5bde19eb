"""Networks of engines beyond their first bridge: names, ports, two families, large frames, and changes on the fly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.cri import Cri, container_config, pod_config
from tests.harness.engines import BOX

if TYPE_CHECKING:
    from tests.harness.engines import Engines

SERVE = "mkdir /www; echo page > /www/index.html; httpd -h /www -p 80; exec sleep 100000"
#: asks by name: busybox is static, and so resolves none
FETCH = "until printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' | socat -t 20 - {} | grep page; do sleep 0.1; done"


@pytest.mark.parametrize("name", ["crun", "vmsandbox"])
def test_podman_connects_containers_by_name_and_while_they_run(engines: Engines, name: str) -> None:
    podman = ("podman", "--runtime", name)
    engines.ok("podman", "network", "create", "--ipv6", "-o", "mtu=9000", "pair")
    engines.ok("podman", "network", "create", "late")
    try:
        engines.ok(*podman, "run", "-d", "--name", "web", "--network", "pair", "-p", "8088:80", BOX, "sh", "-c", SERVE)
        engines.ok(*podman, "run", "-d", "--name", "asker", "--network", "pair", BOX, "sleep", "100000")
        assert engines.ok("podman", "exec", "asker", "sh", "-c", FETCH.format("TCP4:web:80")) == "page\n"
        assert engines.ok("podman", "exec", "asker", "sh", "-c", FETCH.format("TCP6:web:80")) == "page\n"
        assert engines.ok("sh", "-c", FETCH.format("TCP4:127.0.0.1:8088")) == "page\n"
        shown = engines.ok("podman", "exec", "asker", "ip", "-o", "link", "show", "eth0")
        assert "mtu 9000" in shown
        networks = engines.inspect("web")["NetworkSettings"]["Networks"]
        ping = ("ping", "-c", "1", "-W", "20", "-s", "8900")
        assert "1 packets received" in engines.ok("podman", "exec", "asker", *ping, networks["pair"]["IPAddress"])

        for each in ("web", "asker"):
            engines.ok("podman", "network", "connect", "late", each)
        address = engines.inspect("web")["NetworkSettings"]["Networks"]["late"]["IPAddress"]
        for each in ("web", "asker"):
            engines.ok("podman", "exec", each, "sh", "-c", "until ip route | grep -q eth1; do sleep 0.1; done")
        assert engines.ok("podman", "exec", "asker", "sh", "-c", FETCH.format(f"TCP4:{address}:80")) == "page\n"
        engines.ok("podman", "network", "disconnect", "late", "web")
        engines.ok("podman", "exec", "web", "sh", "-c", "while grep -q eth1 /proc/net/dev; do sleep 0.1; done")
        assert engines.ok("podman", "exec", "asker", "sh", "-c", FETCH.format("TCP4:web:80")) == "page\n"
    finally:
        engines("podman", "rm", "-af", "-t", "0")
        engines("podman", "network", "rm", "-f", "pair", "late")


@pytest.mark.parametrize("runtime", ["runc", "vmsandbox"])
def test_pods_of_a_kubelet_reach_each_other_and_have_ports_of_the_host(containerd: Engines, runtime: str) -> None:
    cri = Cri(containerd)
    made = []
    try:
        for number, name in enumerate(("one", "two")):
            logs = containerd.scratch / f"logs-net-{runtime}-{name}"
            logs.mkdir()
            pod = {**pod_config(name, logs), "port_mappings": [{"container_port": 80, "host_port": 8090 + number}]}
            pod_id = cri("RunPodSandbox", config=pod, runtime_handler=runtime)["pod_sandbox_id"]
            ip = cri("PodSandboxStatus", pod_sandbox_id=pod_id)["status"]["network"]["ip"]
            config = container_config("main", BOX, "sh", "-c", SERVE)
            request = {"pod_sandbox_id": pod_id, "config": config, "sandbox_config": pod}
            container_id = cri("CreateContainer", **request)["container_id"]
            made.append((pod_id, ip, container_id))
            cri("StartContainer", container_id=container_id)
        for (_, _, asking), (_, ip, _) in zip(made, reversed(made), strict=True):
            assert cri.execute(asking, "sh", "-c", FETCH.format(f"TCP4:{ip}:80"))[:2] == (0, "page\n")
        for port in (8090, 8091):
            assert containerd.ok("sh", "-c", FETCH.format(f"TCP4:127.0.0.1:{port}")) == "page\n"
    finally:
        for pod_id, _, _ in made:
            cri("StopPodSandbox", pod_sandbox_id=pod_id)
            cri("RemovePodSandbox", pod_sandbox_id=pod_id)
        cri.close()
