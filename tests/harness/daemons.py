"""containerd, with its CRI plugin, and dockerd over it: their configuration, and images for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.harness.engines import Engines

CONTAINERD = "/run/engines/containerd.sock"
DOCKER = "/run/engines/docker.sock"
CNI_DIRECTORY = "/run/engines/cni.d"
CONTAINERD_CONF = """version = 2
root = "/run/engines/containerd-root"
state = "/run/engines/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "/run/engines/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  stream_server_address = "127.0.0.1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  enable_unprivileged_ports = true
  netns_mounts_under_state_dir = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/run/engines/cni.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"""
CNI_CONF = {
    "cniVersion": "0.4.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "pods0",
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": "/run/engines/cni",
                "ranges": [[{"subnet": "10.88.7.0/24"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}


def configure(engines: Engines) -> None:
    """Write what the daemons need on a machine of tests; our runtime is not in it."""
    for directory in ("/etc/containerd", "/etc/docker", CNI_DIRECTORY):
        engines.inside(directory).mkdir(exist_ok=True)
    engines.inside("/etc/containerd/config.toml").write_text(CONTAINERD_CONF)
    engines.inside(f"{CNI_DIRECTORY}/10-pods.conflist").write_text(json.dumps(CNI_CONF))
    docker = {
        "data-root": "/run/engines/docker-data",
        "exec-root": "/run/engines/docker",
        "pidfile": "/run/engines/docker.pid",
        "hosts": [f"unix://{DOCKER}"],
        "containerd": CONTAINERD,
        "storage-driver": "overlay2",
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
        "bip": "10.88.9.1/24",
        "features": {"buildkit": False},
        "default-runtime": "runc",
    }
    engines.inside("/etc/docker/daemon.json").write_text(json.dumps(docker))


def start_containerd(engines: Engines) -> None:
    """Start containerd and give it podman's images, for `ctr` and for CRI."""
    engines.daemon("containerd", ("containerd",), ("ctr", "version"))
    for number, image in enumerate(("localhost/box:1", "localhost/pause:1")):
        archive = f"{engines.scratch}/{number}.tar"
        engines.ok("podman", "save", "-q", "--format", "oci-archive", "-o", archive, image)
        for namespace in ("default", "k8s.io"):
            engines.ok("ctr", "-n", namespace, "image", "import", archive)


def start_docker(engines: Engines) -> None:
    """Start dockerd over the containerd that runs, and give it the image."""
    engines.daemon("dockerd", ("dockerd",), ("docker", "version"))
    engines.ok("sh", "-c", f"tar -C {engines.rootfs} -c . | docker import - box:1")
