"""What is mounted in the guest to become a container's root file system."""

from __future__ import annotations

from vmsandbox_protocol import agent_pb2 as pb

STORAGE = "/run/vmsandbox/storage"
ROOTFS = "/run/vmsandbox/rootfs"
#: tmpfs that only takes mount points of a read-only root file system
MOUNT_POINTS_BYTES = 1024 * 1024


def overlay_storages(
    image_name: str, image_address: str, layer_point: str, layer_address: str | None, rootfs: str
) -> list[pb.Storage]:
    """The image below, a writable layer above, both seen as one tree at `rootfs`.

    Without a disk for it the layer is a small tmpfs that only takes the mount points of a read-only container.
    """
    lower = f"{STORAGE}/{image_name}"
    if layer_address:
        writable = layer_storage(layer_point, layer_address)
    else:
        writable = pb.Storage(
            driver=pb.Storage.DRIVER_TMPFS, options=[f"size={MOUNT_POINTS_BYTES}"], mount_point=layer_point
        )
    image = pb.Storage(
        driver=pb.Storage.DRIVER_BLOCK, fstype="erofs", options=["ro"], mount_point=lower, pci_path=image_address
    )
    overlay = pb.Storage(
        driver=pb.Storage.DRIVER_OVERLAY,
        mount_point=rootfs,
        lower=[lower],
        upper=f"{layer_point}/upper",
        work=f"{layer_point}/work",
    )
    return [image, writable, overlay]


def layer_storage(point: str, address: str) -> pb.Storage:
    """The disk of a writable layer."""
    return pb.Storage(
        driver=pb.Storage.DRIVER_BLOCK, fstype="ext4", options=["noatime"], mount_point=point, pci_path=address
    )
