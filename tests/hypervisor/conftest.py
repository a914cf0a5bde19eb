"""The hypervisor library alone: nothing of vmsandbox is imported here."""

from tests.harness.taps import tap
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
    "tap",
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
