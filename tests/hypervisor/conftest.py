"""The hypervisor library alone: nothing of vmsandbox is imported here."""

from vmsandbox_hypervisor.testing import (
    hypervisor,
    vm,
    vm_booted,
    vm_config,
    vm_confinement,
    vm_cpus,
    vm_directory,
    vm_files,
    vm_kept,
    vm_memory,
    vm_ports,
    vm_shared,
    vm_template,
)

__all__ = [
    "hypervisor",
    "vm",
    "vm_booted",
    "vm_config",
    "vm_confinement",
    "vm_cpus",
    "vm_directory",
    "vm_files",
    "vm_kept",
    "vm_memory",
    "vm_ports",
    "vm_shared",
    "vm_template",
]
