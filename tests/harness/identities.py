"""What no two machines may have in common, as a container sees it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.harness.cli import Cli

#: seconds a machine's clock may differ from the host's
CLOCK = 0.05
#: prints one line each; openssl asks getrandom(2)
IDENTITY = """
head -c 32 /dev/urandom | hexdump -ve '1/1 "%02x"'; echo
openssl rand -hex 32
cat /proc/sys/kernel/random/uuid
cat /proc/sys/kernel/random/boot_id
openssl genpkey -algorithm ed25519 -outform DER | sha256sum
grep -m1 stack /proc/self/maps
grep -m1 heap /proc/self/maps
cat /etc/hostname
cat /sys/class/net/eth0/address 2>/dev/null
true
"""


def assert_all_differ(cli: Cli, names: Sequence[str], *, facts: int) -> None:
    """The machines of these containers have none of so many facts in common, and their clocks are the host's."""
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: cli.ok("exec", name, "sh", "-c", IDENTITY).splitlines(), names))
    assert [len(answer) for answer in answers] == [facts] * len(names)
    for each in zip(*answers, strict=True):
        assert len(set(each)) == len(names), each
    for name in names:
        before = time.time()
        guest = float(cli.ok("exec", name, "date", "+%s.%N"))
        assert before - CLOCK <= guest <= time.time() + CLOCK
    assert len({cli.inspect(name)["pod"]["vm"]["pid"] for name in names}) == len(names)
