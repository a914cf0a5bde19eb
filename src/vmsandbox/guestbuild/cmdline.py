"""What kernels are told: parameters that every guest boots with, and those that depend on how the kernel was made.

docs/guest.md says why each is there.
"""

from __future__ import annotations

from typing import Final

COMMON: Final = (
    "console=ttyS0", "quiet", "loglevel=4", "panic=-1", "reboot=t", "random.trust_cpu=on",
    "no_timer_check", "noreplace-smp", "memhp_default_state=online", "memory_hotplug.online_policy=auto-movable",
    "init_on_alloc=0",
)  # fmt: skip
#: for the distribution's kernel, which our initramfs takes to the image
PACKAGED: Final = (*COMMON, "cryptomgr.notests", "initcall_blacklist=tracer_init_tracefs")
#: for a kernel that has everything built in and mounts the image itself
MONOLITHIC: Final = (*COMMON, "root=/dev/vda", "rootfstype=erofs", "ro", "init=/sbin/init")
#: where the processor is emulated: its clock is the host's, no speculation is to be guarded against, and code is
#: translated once for each address it is at
EMULATED: Final = ("tsc=reliable", "mitigations=off", "vmsandbox.emulated=1")
