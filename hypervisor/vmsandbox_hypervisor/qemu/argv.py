"""From a `VmConfig` to QEMU's command line; pure, so that golden tests and template keys can rely on it.

QEMU gets descriptors, never paths it would have to open itself: it may run without the right to.  `descriptors`
numbers them by role, so equal configurations have equal command lines.

Where things are on the PCI bus: root ports first, eight to a slot, then the devices that stay, each in a slot of
the root complex.  Every address is written down, because the guest and a template's clone rely on it.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.api import PciAddress, PrivateMemory, SharedMemory

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from typing import Literal

    from vmsandbox_hypervisor.api import Nic, VmConfig

FIRST_FD = 3
#: slots of the root complex that q35 leaves free are 1 to 30
LAST_SLOT = 0x1E
VIRTIO_MEM_BLOCK_MIB = 2
#: All that QEMU emulates but "enhanced rep movsb": a guest that sees it clears and copies memory byte by byte, each an
#: iteration for the emulator, where it would otherwise use eight bytes or vectors.  Starting Python takes a third fewer
#: instructions without it.  And all but SMAP, whose two instructions around each access to user memory cut the
#: kernel's code into pieces that are translated one by one.
EMULATED_CPU = "max,-erms,-fsrm,-smap"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
NODE_NAME_MAX = 31
IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

MONITOR_SOCKET = "qmp.sock"
CONSOLE_SOCKET = "console.sock"


def descriptors(config: VmConfig) -> dict[str, int]:
    """The descriptor numbers in the child, by role, in a fixed order."""
    roles = ["monitor", "console", "kernel"]
    if config.kernel.initrd is not None:
        roles.append("initrd")
    if isinstance(config.memory.backing, PrivateMemory) or config.memory.backing.fd is not None:
        roles.append("memory")
    if config.vsock_cid is not None:
        roles.append("vsock")
    roles += [f"port-{port.name}" for port in config.ports]
    roles += [f"disk-{disk.id}" for disk in config.disks]
    for nic in config.nics:
        roles += [f"nic-{nic.id}", *([f"vhost-{nic.id}"] if nic.vhost_fd is not None else ())]
    return {role: number for number, role in enumerate(roles, FIRST_FD)}


def port_socket(name: str) -> str:
    """File name of a port's socket."""
    return f"port-{name}.sock"


def root_port_address(index: int) -> str:
    """Slot and function of a root port on the root complex, as the guest sees it."""
    return f"{1 + index // 8:02x}.{index % 8}"


def hotplug_address(index: int) -> PciAddress:
    """Where the guest finds what is plugged into a root port."""
    return PciAddress(pci_path=f"{root_port_address(index)}/00.0")


def node_name(kind: str, identifier: str) -> str:
    """A block node's name: QEMU allows 31 bytes, an id may be longer."""
    name = f"{kind}-{identifier}"
    if len(name) <= NODE_NAME_MAX:
        return name
    return f"{kind}-{hashlib.sha256(identifier.encode()).hexdigest()[:24]}"


def check_id(kind: str, identifier: str) -> None:
    """Refuse what QEMU would not take as an id, or would take apart."""
    if not IDENTIFIER.fullmatch(identifier) or len(identifier) > 128:
        raise ValueError(f"bad {kind} id '{identifier}': letters, digits, '.', '_' and '-', at most 128")


def blockdev(identifier: str, *, fdset: int, read_only: bool, block_device: bool) -> dict[str, object]:
    """The node of a disk: raw over a file or block device that QEMU got as a descriptor."""
    # The page cache is shared by every VM that uses an image, and absorbs the writes to a scratch disk.
    cache = {"direct": False, "no-flush": False}
    return {
        "driver": "raw",
        "node-name": node_name("disk", identifier),
        "read-only": read_only,
        "cache": cache,
        "discard": "ignore" if read_only else "unmap",
        "file": {
            "driver": "host_device" if block_device else "file",
            "node-name": node_name("file", identifier),
            "filename": f"/dev/fdset/{fdset}",
            "aio": "threads",
            "read-only": read_only,
            # Locks keep writers apart.  Anybody who may read a file could hold one against who reads it too.
            "locking": "off" if read_only and not block_device else "auto",
            "cache": cache,
            "discard": "ignore" if read_only else "unmap",
        },
    }


def disk_device(identifier: str, *, bus: str, addr: str) -> dict[str, object]:
    """The virtio-blk device; a full host disk becomes an error in the guest instead of a paused VM."""
    return {
        "driver": "virtio-blk-pci",
        "id": f"disk-{identifier}",
        "drive": node_name("disk", identifier),
        "serial": identifier[:20],
        "werror": "report",
        "rerror": "report",
        "bus": bus,
        "addr": addr,
    }


def tap_netdev(identifier: str, *, fd: str, vhost_fd: str = "") -> dict[str, object]:
    """The host's side of an interface; descriptors are given by name.  Offloads are as the tap has them."""
    made: dict[str, object] = {"type": "tap", "id": f"net-{identifier}", "fd": fd}
    if vhost_fd:
        made |= {"vhost": True, "vhostfd": vhost_fd}
    return made


def nic_device(nic: Nic, *, port: int) -> dict[str, object]:
    """The virtio-net device in a root port."""
    made: dict[str, object] = {
        "driver": "virtio-net-pci",
        "id": f"nic-{nic.id}",
        "netdev": f"net-{nic.id}",
        "mac": nic.mac,
        # A clone is no machine that has moved: its guest has nothing to announce.
        "guest_announce": False,
        "romfile": "",
        "bus": f"rp{port}",
        "addr": "0",
    }
    return made | {"host_mtu": nic.mtu} if nic.mtu else made


def nic_address(config: VmConfig, nic_id: str) -> PciAddress:
    """Where the guest finds a network card that is there from the start."""
    return hotplug_address([nic.id for nic in config.nics].index(nic_id))


def ninep_device(tag: str, *, bus: str, addr: str) -> dict[str, object]:
    return {
        "driver": "virtio-9p-pci",
        "id": f"ninep-{tag}",
        "fsdev": f"export-{tag}",
        "mount_tag": tag,
        "bus": bus,
        "addr": addr,
    }


def guest_option(name: str) -> str:
    """By what a command line tells whose it is."""
    return f"guest={_value(name)},"


def validate(config: VmConfig) -> None:
    """Refuse a configuration that cannot become a machine; `ValueError` says why."""
    memory, cpus = config.memory, config.cpus
    for kind, names in (
        ("disk", [disk.id for disk in config.disks]),
        ("nic", [nic.id for nic in config.nics]),
        ("port", [port.name for port in config.ports]),
        ("share", [share.tag for share in config.shares]),
    ):
        for name in names:
            check_id(kind, name)
        if len(set(names)) != len(names):
            raise ValueError(f"two {kind}s have the same name: {names}")
    if memory.size_mib < 16:
        raise ValueError(f"memory of {memory.size_mib} MiB is too small for any guest")
    if memory.hotplug_mib < 0 or memory.hotplug_mib % VIRTIO_MEM_BLOCK_MIB:
        raise ValueError(f"hotplug_mib {memory.hotplug_mib} is not a multiple of {VIRTIO_MEM_BLOCK_MIB}")
    if memory.free_page_reporting and isinstance(memory.backing, PrivateMemory):
        raise ValueError("free_page_reporting needs memory that is mapped shared")
    if bool(memory.dimm_slots) != bool(memory.dimm_mib):
        raise ValueError("dimm_slots and dimm_mib go together")
    if not 1 <= cpus.boot <= cpus.maximum:
        raise ValueError(f"{cpus.boot} vCPUs at boot, but at most {cpus.maximum}")
    if not 0 <= config.root_ports <= 64:
        raise ValueError(f"{config.root_ports} root ports: 0 to 64 are possible")
    if len(config.nics) > config.root_ports:
        raise ValueError(f"{len(config.nics)} network cards, but {config.root_ports} root ports")
    if config.vsock_cid is not None and config.vsock_cid != 0 and not 3 <= config.vsock_cid <= 2**32 - 2:
        raise ValueError(f"vsock context id {config.vsock_cid} is reserved")


def argv(
    config: VmConfig,
    accel: Literal["kvm", "tcg"],
    *,
    block_devices: Collection[str] = (),
    vsock_cid: int | None = None,
) -> list[str]:
    """QEMU's command line without any wrapper.

    `block_devices` are the ids of the disks that are block devices, `vsock_cid` the context id claimed for a
    configuration that takes any.  Raises `ValueError` for an impossible configuration.
    """
    validate(config)
    fds = descriptors(config)
    memory = config.memory
    # fmt: off
    line = [
        str(config.binary),
        "-name", f"{guest_option(config.name)}debug-threads=on",
        "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none",
        "-sandbox", SANDBOX,
        "-accel", "kvm" if accel == "kvm" else "tcg,thread=multi",
        "-cpu", "host" if accel == "kvm" else EMULATED_CPU,
        "-machine", "q35,memory-backend=mem0,vmport=off,sata=off,smbus=off",
        "-smp", f"cpus={config.cpus.boot},maxcpus={config.cpus.maximum}",
        "-m", _memory_size(config),
        "-object", _memory_backend(memory.size_mib, memory.backing, fds.get("memory")),
        "-bios", "qboot.rom",
        "-kernel", f"/proc/self/fd/{fds['kernel']}",
    ]
    if "initrd" in fds:
        line += ["-initrd", f"/proc/self/fd/{fds['initrd']}"]
    parameters = config.kernel.cmdline + (config.kernel.emulated_cmdline if accel == "tcg" else ())
    if parameters:
        line += ["-append", " ".join(parameters)]
    line += [
        "-chardev", f"socket,id=monitor,fd={fds['monitor']},server=on,wait=off",
        "-mon", "chardev=monitor,mode=control",
        "-chardev", f"socket,id=console,fd={fds['console']},server=on,wait=off",
        "-device", "isa-serial,chardev=console",
    ]
    # fmt: on
    for index in range(config.root_ports):
        address = root_port_address(index).removeprefix("0")
        line += [
            "-device",
            _joined(
                "pcie-root-port",
                {
                    "id": f"rp{index}",
                    "bus": "pcie.0",
                    "addr": f"0x{address}",
                    "chassis": index + 1,
                    "slot": index + 1,
                    "multifunction": "on",
                    "io-reserve": 0,
                },
            ),
        ]
    for port, nic in enumerate(config.nics):
        vhost_fd = str(fds.get(f"vhost-{nic.id}", ""))
        line += [
            "-netdev",
            json.dumps(tap_netdev(nic.id, fd=str(fds[f"nic-{nic.id}"]), vhost_fd=vhost_fd)),
            "-device",
            json.dumps(nic_device(nic, port=port)),
        ]
    for slot, options in _placed(config, _devices(config, fds, block_devices, vsock_cid)):
        line += [option.replace("@SLOT@", f"0x{slot:x}") for option in options]
    if config.restore is not None:
        line += ["-incoming", "defer"]
    return line


def disk_address(config: VmConfig, disk_id: str) -> PciAddress:
    """Where the guest finds a disk that is there from the start."""
    device = f"disk-{disk_id}"
    for slot, options in _placed(config, _devices(config, descriptors(config), (), config.vsock_cid)):
        if options[-1].startswith("{") and json.loads(options[-1])["id"] == device:
            return PciAddress(pci_path=f"{slot:02x}.0")
    raise ValueError(f"no disk '{disk_id}' is there from the start")


def _placed(config: VmConfig, devices: list[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Each device with its slot of the root complex; ports of virtio-serial need none."""
    slot = 1 + (config.root_ports + 7) // 8
    for options in devices:
        if options[-1].startswith("virtserialport"):
            yield slot, options
            continue
        if slot > LAST_SLOT:
            raise ValueError(f"more devices than the {LAST_SLOT} slots of the root complex")
        yield slot, options
        slot += 1


def _devices(
    config: VmConfig, fds: dict[str, int], block_devices: Collection[str], vsock_cid: int | None
) -> list[list[str]]:
    """What stays for the VM's life; ``@SLOT@`` stands for a slot of the root complex."""
    place = "bus=pcie.0,addr=@SLOT@"
    found = [["-object", "rng-builtin,id=rng0", "-device", f"virtio-rng-pci,id=rng,rng=rng0,{place}"]]
    if config.ports:
        found.append(["-device", f"virtio-serial-pci,id=serial,max_ports={len(config.ports) + 1},{place}"])
    for number, port in enumerate(config.ports, 1):
        role = f"port-{port.name}"
        found.append(
            [
                "-chardev",
                f"socket,id={role},fd={fds[role]},server=on,wait=off",
                "-device",
                f"virtserialport,bus=serial.0,nr={number},chardev={role},name={port.name}",
            ]
        )
    if config.memory.hotplug_mib:
        found.append(
            [
                "-object",
                f"memory-backend-memfd,id=vmem0-backend,size={config.memory.hotplug_mib}M,share=on,reserve=off",
                "-device",
                _joined(
                    "virtio-mem-pci",
                    {
                        "id": "vmem0",
                        "memdev": "vmem0-backend",
                        "requested-size": 0,
                        "block-size": f"{VIRTIO_MEM_BLOCK_MIB}M",
                        "bus": "pcie.0",
                        "addr": "@SLOT@",
                    },
                ),
            ]
        )
    if config.memory.free_page_reporting:
        found.append(["-device", f"virtio-balloon-pci,id=balloon,free-page-reporting=on,{place}"])
    if config.vsock_cid is not None:
        cid = vsock_cid or config.vsock_cid
        found.append(["-device", f"vhost-vsock-pci,id=vsock0,guest-cid={cid},vhostfd={fds['vsock']},{place}"])
    for number, disk in enumerate(config.disks, 1):
        node = blockdev(disk.id, fdset=number, read_only=disk.read_only, block_device=disk.id in block_devices)
        device = disk_device(disk.id, bus="pcie.0", addr="@SLOT@")
        found.append(
            [
                "-add-fd",
                f"fd={fds[f'disk-{disk.id}']},set={number}",
                "-blockdev",
                json.dumps(node),
                "-device",
                json.dumps(device),
            ]
        )
    for share in config.shares:
        # Without the rights of root, changes of owner fail and must not fail the operation.
        security = "passthrough" if config.confinement is None else "none"
        export = [
            "-fsdev",
            _joined(
                "local",
                {
                    "id": f"export-{share.tag}",
                    "path": str(share.path),
                    "security_model": security,
                    "multidevs": "remap",
                    "readonly": "on" if share.read_only else "off",
                },
            ),
        ]
        if share.plugged:
            found.append([*export, "-device", json.dumps(ninep_device(share.tag, bus="pcie.0", addr="@SLOT@"))])
        else:
            found[0] = [*export, *found[0]]
    return found


def _memory_size(config: VmConfig) -> str:
    memory = config.memory
    size = f"size={memory.size_mib}M"
    more = memory.hotplug_mib + memory.dimm_mib
    if more:
        size += f",slots={memory.dimm_slots},maxmem={memory.size_mib + more}M"
    return size


def _memory_backend(size_mib: int, backing: SharedMemory | PrivateMemory, fd: int | None) -> str:
    if fd is None:
        return f"memory-backend-memfd,id=mem0,size={size_mib}M,share=on"
    share = "off" if isinstance(backing, PrivateMemory) else "on"
    return f"memory-backend-file,id=mem0,size={size_mib}M,mem-path=/proc/self/fd/{fd},share={share}"


def _joined(driver: str, options: dict[str, object]) -> str:
    """``driver,key=value,...``"""
    return ",".join([driver, *(f"{key}={_value(str(value))}" for key, value in options.items())])


def _value(text: str) -> str:
    """An option's value, in which QEMU wants a comma doubled."""
    return text.replace(",", ",,")
