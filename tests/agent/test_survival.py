"""Whatever a container does, the guest goes on: the agent answers, and other containers run.

One machine is mistreated by one test after the other, with a bystander in it that must notice nothing.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.agent.hearing import Heard, hear
from tests.agent.served import SLOW
from tests.agent.vm import VmAgent
from vmsandbox.errors import SandboxError
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.deadline(300)

MIB = 1 << 20
NOTHING = pb.Stdio()
OUTPUT = pb.Stdio(stdout=True, stderr=True)
#: the first process forks once, and then no more: it would end when it cannot
BOMB = "bomb() { bomb | bomb & bomb | bomb & }; bomb & exec sleep 1000"
#: what the agent may grow by over a test, in KiB
GROWTH = 24 * 1024


@pytest.fixture(scope="module")
def machine(guest: VmAgent) -> Iterator[VmAgent]:
    """The guest with a bystander that sleeps."""
    assert guest.loop is not None
    guest.loop.run(guest.create("bystander", ["sleep", "100000"], stdio=NOTHING))
    yield guest
    guest.loop.run(guest.client.remove_container("bystander", force=True))


@asynccontextmanager
async def removed(machine: VmAgent, *container_ids: str) -> AsyncIterator[None]:
    """Remove containers at the end of the block, and see that the guest is as it was."""
    try:
        yield
    finally:
        for container_id in container_ids:
            await machine.client.remove_container(container_id, force=True, timeout=SLOW)
    rows = await machine.client.containers(timeout=SLOW)
    assert [(row.container_id, row.status) for row in rows] == [("bystander", "running")]


async def assert_well(machine: VmAgent, exec_id: str = "check") -> None:
    """The agent answers, and runs what another container asks for."""
    metrics = await machine.client.metrics(timeout=SLOW)
    assert metrics.memory_total_kib > 0
    assert (await machine.client.stats("bystander", timeout=SLOW)).pids >= 1
    heard = await machine.exec("bystander", exec_id, ["sh", "-c", "echo alive"])
    assert (heard.stdout, heard.exit and heard.exit.code) == (b"alive\n", 0)


async def everything_of(machine: VmAgent, container_id: str, exec_id: str = "") -> Heard:
    async with asyncio.timeout(SLOW), machine.client.attach(container_id, exec_id) as attachment:
        return await hear(attachment)


async def process_count(machine: VmAgent) -> int:
    return (await machine.client.metrics(timeout=SLOW)).processes


# ---------------------------------------------------------------- processes


async def test_a_fork_bomb_with_a_limit_of_processes_harms_nobody(machine: VmAgent) -> None:
    async with removed(machine, "bomb"):
        await machine.create("bomb", ["sh", "-c", BOMB], stdio=NOTHING, resources={"pids": {"limit": 60}})
        await reach(machine, "bomb", 60)
        await assert_well(machine)
        stats = await machine.client.stats("bomb", timeout=SLOW)
        assert stats.pids_limit == 60
        assert stats.pids <= 60
        await machine.client.signal("bomb", "", 9, all=True, timeout=SLOW)
        assert (await machine.client.wait("bomb", "", timeout=SLOW)).code == 137


async def test_a_fork_bomb_without_a_limit_leaves_room_for_the_agent(machine: VmAgent) -> None:
    before = await process_count(machine)
    async with removed(machine, "bomb"):
        await machine.create("bomb", ["sh", "-c", BOMB], stdio=NOTHING)
        await reach(machine, "bomb", 300)
        await assert_well(machine)
        await machine.client.signal("bomb", "", 9, all=True, timeout=SLOW)
        assert (await machine.client.wait("bomb", "", timeout=SLOW)).code == 137
    await assert_well(machine)
    assert await process_count(machine) <= before + 5


async def reach(machine: VmAgent, container_id: str, pids: int) -> None:
    """Wait until a container has so many processes, or has had them: the kernel may have killed some for memory."""
    most = 0
    async with asyncio.timeout(SLOW):
        while most < pids:
            stats = await machine.client.stats(container_id, timeout=SLOW)
            most = max(most, stats.pids)
            if stats.oom_kills:
                return


async def test_orphans_are_reaped_whoever_left_them(machine: VmAgent) -> None:
    """Of a container that shares the guest's processes the agent itself is the reaper."""
    before = await process_count(machine)
    leave = "for i in $(seq 60); do sh -c 'sleep 0.1 & exit 0'; done; sleep 1"
    count = "grep -h '^State:.Z' /proc/[0-9]*/status | wc -l"
    async with removed(machine, "litter"):
        await machine.create("litter", ["sh", "-c", leave], stdio=NOTHING, own_pids=False)
        await machine.client.wait("litter", "", timeout=120)
        await machine.create("counter", ["sh", "-c", count], stdio=OUTPUT, own_pids=False)
        async with removed_too(machine, "counter"):
            heard = await everything_of(machine, "counter")
    assert int(heard.stdout) <= 1
    assert await process_count(machine) <= before + 3


@asynccontextmanager
async def removed_too(machine: VmAgent, container_id: str) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await machine.client.remove_container(container_id, force=True, timeout=SLOW)


async def test_a_container_that_ignores_every_signal_is_killed(machine: VmAgent) -> None:
    script = "trap '' 1 2 3 15; echo deaf; while :; do sleep 1; done"
    async with removed(machine, "deaf"):
        await machine.create("deaf", ["sh", "-c", script], stdio=OUTPUT)
        async with machine.client.attach("deaf", "") as attachment:
            await hear(attachment, until=b"deaf")
        for number in (1, 2, 3, 15):
            await machine.client.signal("deaf", "", number, timeout=SLOW)
        with pytest.raises(SandboxError):
            await machine.client.remove_container("deaf", timeout=SLOW)
        await machine.client.signal("deaf", "", 9, timeout=SLOW)
        status = await machine.client.wait("deaf", "", timeout=SLOW)
        assert (status.code, status.signal) == (137, 9)


# ---------------------------------------------------------------- memory

#: a program that takes so much memory and fills it, in MiB
HOG = "dd if=/dev/zero of=/dev/null bs={}M count=1 && echo survived"
LIMIT = {"memory": {"limit": 24 * MIB, "swap": 24 * MIB}}


async def test_more_memory_than_the_limit_ends_the_container_alone(machine: VmAgent) -> None:
    async with removed(machine, "hog"):
        await machine.create("hog", ["sh", "-c", HOG.format(60)], stdio=OUTPUT, resources=LIMIT)
        status = await machine.client.wait("hog", "", timeout=SLOW)
        assert (status.code, status.oom_killed) == (137, True)
        await assert_well(machine)


async def test_a_file_in_memory_counts_against_the_limit(machine: VmAgent) -> None:
    shm = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=100m"]}
    async with removed(machine, "hog"):
        fill = ["dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=60"]
        await machine.create("hog", fill, stdio=OUTPUT, resources=LIMIT, mounts=[shm])
        status = await machine.client.wait("hog", "", timeout=SLOW)
        assert (status.code, status.oom_killed) == (137, True)
        await assert_well(machine)


async def test_an_exec_that_takes_too_much_memory_is_what_is_killed(machine: VmAgent) -> None:
    async with removed(machine, "host"):
        await machine.create("host", ["sleep", "100000"], stdio=NOTHING, resources=LIMIT)
        await machine.start_exec("host", "hog", ["sh", "-c", HOG.format(60)])
        status = await machine.client.wait("host", "hog", timeout=SLOW)
        assert (status.code, status.oom_killed) == (137, True)
        rows = {row.container_id: row.status for row in await machine.client.containers(timeout=SLOW)}
        assert rows["host"] == "running"
        await assert_well(machine)


async def test_all_memory_of_the_guest_is_not_enough_to_kill_the_agent(machine: VmAgent) -> None:
    async with removed(machine, "hog"):
        total = (await machine.client.metrics(timeout=SLOW)).memory_total_kib
        # The kernel refuses at once to give more than there is at all.
        await machine.create("hog", ["sh", "-c", HOG.format(total // 1024 - 4)], stdio=OUTPUT)
        status = await machine.client.wait("hog", "", timeout=120)
        assert (status.code, status.oom_killed) == (137, True)
        await assert_well(machine)


async def test_processes_are_chosen_by_the_kernel_as_if_the_agent_were_not_protected(machine: VmAgent) -> None:
    """What the agent starts does not inherit a protection that would make it impossible to kill."""
    async with removed(machine, "plain"):
        await machine.create("plain", ["cat", "/proc/self/oom_score_adj"], stdio=OUTPUT)
        assert (await everything_of(machine, "plain")).stdout == b"0\n"
    heard = await machine.exec("bystander", "score", ["cat", "/proc/self/oom_score_adj"])
    assert heard.stdout == b"0\n"


# ---------------------------------------------------------------- the clock


async def test_the_clock_is_shifted_by_exactly_what_is_told(machine: VmAgent) -> None:
    began, shown = time.monotonic_ns(), await machine.client.read_time()
    hour = 3600 * 10**9
    for shift in (hour, -hour):
        after = await machine.client.shift_time(shift)
        assert 0 <= after - shown - shift <= time.monotonic_ns() - began
        shown = after


# ---------------------------------------------------------------- disks


async def test_a_full_disk_is_an_error_in_its_container_and_nowhere_else(machine: VmAgent) -> None:
    async with removed(machine, "full"):
        script = "dd if=/dev/zero of=/fill bs=64k; echo still writing; echo x > /more || echo refused; cat"
        await machine.create("full", ["sh", "-c", script], size="4m")
        async with asyncio.timeout(SLOW), machine.client.attach("full", "") as attachment:
            hearing = asyncio.create_task(hear(attachment))
            await attachment.send_input(0, b"input\n", eof=True)
            heard = await hearing
        assert heard.stdout == b"still writing\nrefused\ninput\n"
        assert b"No space left on device" in heard.stderr
        await assert_well(machine)


async def test_full_shared_memory_is_an_error_and_the_agent_goes_on(machine: VmAgent) -> None:
    """The guest's own /dev/shm, which the containers of a pod share."""
    shm = {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind", "rw"]}
    async with removed(machine, "full"):
        script = "dd if=/dev/zero of=/dev/shm/fill bs=1M; echo went on; rm /dev/shm/fill"
        await machine.create("full", ["sh", "-c", script], stdio=OUTPUT, mounts=[shm])
        heard = await everything_of(machine, "full")
        assert heard.stdout == b"went on\n"
        assert b"No space left on device" in heard.stderr
        await assert_well(machine)


async def test_filling_a_file_of_the_pod_takes_no_room_from_the_agent(machine: VmAgent) -> None:
    """Hosts, hostname and resolv.conf are the agent's files, and containers may write to them."""
    hosts = {
        "destination": "/etc/hosts",
        "type": "bind",
        "source": "/run/vmsandbox/etc/hosts",
        "options": ["rbind", "rw"],
    }
    async with removed(machine, "full"):
        script = "dd if=/dev/zero of=/etc/hosts bs=64k; wc -c < /etc/hosts; echo 127.0.0.1 localhost > /etc/hosts"
        await machine.create("full", ["sh", "-c", script], stdio=OUTPUT, mounts=[hosts])
        heard = await everything_of(machine, "full")
        assert b"No space left on device" in heard.stderr
        assert int(heard.stdout) <= 8 * MIB
        await assert_well(machine)


# ---------------------------------------------------------------- streams


async def test_a_container_may_close_all_of_its_streams(machine: VmAgent) -> None:
    async with removed(machine, "closed"):
        script = "echo last words; exec 0<&- 1>&- 2>&-; sleep 1; exit 9"
        await machine.create("closed", ["sh", "-c", script])
        heard = await everything_of(machine, "closed")
        assert heard.stdout == b"last words\n"
        assert heard.exit is not None
        assert heard.exit.code == 9
        assert heard.input_closed
        await assert_well(machine)


async def test_a_container_whose_reader_went_away_is_told_so(machine: VmAgent) -> None:
    async with removed(machine, "noisy"):
        await machine.create("noisy", ["yes"], stdio=OUTPUT)
        async with asyncio.timeout(SLOW), machine.client.attach("noisy", "") as attachment:
            await hear(attachment, until=b"y\n")
            await attachment.close_output(2)
            status = await machine.client.wait("noisy", "", timeout=SLOW)
        assert status.code in (1, 141)  # SIGPIPE, or EPIPE where that is ignored
        await assert_well(machine)


async def test_output_that_nobody_reads_stops_its_writer_and_costs_little(machine: VmAgent) -> None:
    before = (await machine.client.metrics(timeout=SLOW)).agent_rss_kib
    async with removed(machine, "noisy"):
        await machine.create("noisy", ["yes"], stdio=OUTPUT)
        async with asyncio.timeout(SLOW), machine.client.attach("noisy", "") as attachment:
            heard = await hear(attachment, acknowledge=False, until=b"y\n" * 500_000)
            await assert_well(machine)
            metrics = await machine.client.metrics(timeout=SLOW)
            assert len(heard.stdout) <= 4 * MIB
            assert metrics.agent_rss_kib - before < GROWTH
        usage = (await machine.client.stats("noisy", timeout=SLOW)).cpu_usage_us
        await assert_well(machine, "again")
        # The writer stands still: its processor time does not grow.
        assert (await machine.client.stats("noisy", timeout=SLOW)).cpu_usage_us - usage < 100_000


# ---------------------------------------------------------------- the end


async def test_the_guest_switches_itself_off_within_the_grace(directory: Path) -> None:
    """One container takes its leave, the other is deaf and is killed."""
    async with VmAgent.booted(directory) as machine:
        polite = "trap 'echo leaving; exit 0' TERM; echo ready; while :; do sleep 0.2; done"
        deaf = "trap '' TERM; echo ready; while :; do sleep 0.2; done"
        await machine.create("polite", ["sh", "-c", polite], stdio=OUTPUT)
        await machine.create("deaf", ["sh", "-c", deaf], stdio=OUTPUT)
        async with machine.client.attach("polite", "") as attachment, machine.client.attach("deaf", "") as other:
            await hear(other, until=b"ready\n")
            hearing = asyncio.create_task(hear(attachment, until=b"leaving\n"))
            await machine.client.destroy_sandbox(power_off=True, grace=10, timeout=SLOW)
            assert b"leaving\n" in (await hearing).stdout
        async with asyncio.timeout(SLOW):
            status = await machine.vm.wait()
        assert status == 0
        assert json.dumps(machine.vm.console()).count("Kernel panic") == 0
