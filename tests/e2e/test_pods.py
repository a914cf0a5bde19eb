"""Pods: virtual machines that several containers share, which stay until they are removed."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.cli import Cli, awaited, kill, name_of, title, wait_until_gone
from vmsandbox import remains

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVE = "trap 'kill $!; exit 0' TERM; sleep 100000 & wait"
MANY = 20


@pytest.fixture(scope="module")
def shop(data_root: Path, box: str, pod_template: None) -> Iterator[Cli]:
    """The pod `shop`, shared by the tests that leave it as it was."""
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        made = Cli(Path(scratch), data_root)
        made.ok("pod", "create", "--name", "shop")
        yield made
        made.remove_all()
        assert made.leftovers() == []


def described(cli: Cli, name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(cli.ok("pod", "inspect", name))
    return found[0]


def inside(cli: Cli, name: str, script: str) -> str:
    return cli.ok("exec", name, "sh", "-c", script).strip()


@pytest.fixture
def empty(shop: Cli) -> Iterator[Cli]:
    """The shared pod without a container, before and after."""
    yield shop
    ids = [row["id"] for row in shop.ps()]
    if ids:
        shop.ok("rm", "-f", *ids)


# ---------------------------------------------------------------- in one pod


def test_a1_containers_of_a_pod_share_its_machine_ipc_and_hostname_and_no_files(empty: Cli, box: str) -> None:
    cli = empty
    for name in ("a", "b"):
        cli.ok("run", "-d", "--pod", "shop", "--name", name, box, "sh", "-c", SERVE)
    seen = [
        inside(cli, name, "hostname; for kind in ipc uts net; do readlink /proc/self/ns/$kind; done") for name in "ab"
    ]
    assert seen[0] == seen[1]
    assert seen[0].startswith("shop\n")
    inside(cli, "a", "echo shared > /dev/shm/note; echo own > /root/note")
    assert inside(cli, "b", "cat /dev/shm/note") == "shared"
    assert cli("exec", "b", "cat", "/root/note").code == 1
    assert inside(cli, "a", "readlink /proc/self/ns/pid") != inside(cli, "b", "readlink /proc/self/ns/pid")
    assert {cli.inspect(name)["pod"]["vm"]["pid"] for name in "ab"} == {described(cli, "shop")["vm"]["pid"]}


def test_a7_a_root_is_on_disks_with_ids_derived_from_what_they_are_for_and_noted(empty: Cli, box: str) -> None:
    cli = empty
    container_id = cli.ok("run", "-d", "--pod", "shop", box, "sh", "-c", SERVE).strip()
    path = cli.run_root / "s" / described(cli, "shop")["id"][:12] / "containers" / f"{container_id}.json"
    container = json.loads(path.read_text())
    image, scratch = container["disks"]["image"], container["disks"]["scratch"]
    assert scratch[0] == f"scratch-{container_id[:12]}"
    assert image[0] == f"image-{container['image']['id'].removeprefix('sha256:')[:12]}"
    seen = inside(cli, container_id, "cat /sys/block/vd*/ro")
    assert sorted(seen.splitlines()) == ["0", "1", "1"]  # its own, the guest's, the image's


def served(cli: Cli) -> list[str]:
    """What the pod has of the host's: the names of the mounts that virtiofsd serves, and virtiofsd itself."""
    shared = f"{described(cli, 'shop')['run_directory']}/shared"
    places = [place for place in remains.mounts_below(shared) if place != shared]
    return [place.rpartition("-")[2] for place in sorted(places)] + [
        name_of(process) for process in cli.processes() if name_of(process) == "virtiofsd" and not process.children()
    ]


def test_a6_shares_are_added_while_the_machine_runs_and_go_with_their_containers(
    empty: Cli, box: str, tmp_path: Path
) -> None:
    cli = empty
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(f"{name}\n")
    cli.ok("run", "-d", "--pod", "shop", "--name", "a", box, "sh", "-c", SERVE)
    assert served(cli) == []
    for name, share in (("b", "first"), ("c", "second")):
        cli.ok("run", "-d", "--pod", "shop", "--name", name, "-v", f"{tmp_path / share}:/data", box, "sh", "-c", SERVE)
    assert [inside(cli, name, "cat /data/file") for name in "bc"] == ["first", "second"]
    assert cli("exec", "a", "ls", "/data").code == 1
    assert sorted(served(cli)) == ["first", "second", "virtiofsd"]
    cli.ok("rm", "-f", "b")
    assert sorted(served(cli)) == ["second", "virtiofsd"]
    assert inside(cli, "c", "cat /data/file") == "second"
    cli.ok("rm", "-f", "c")
    assert served(cli) == []
    assert (
        cli.ok("run", "--rm", "--pod", "shop", "-v", f"{tmp_path}/first:/data", box, "cat", "/data/file") == "first\n"
    )
    assert served(cli) == []


def test_containers_of_a_pod_start_and_stop_independently_and_are_listed_with_it(empty: Cli, box: str) -> None:
    cli = empty
    assert cli.ok("run", "--rm", "--pod", "shop", box, "echo", "first") == "first\n"
    assert cli.ps() == []
    cli.ok("create", "--pod", "shop", "--name", "a", box, "sh", "-c", SERVE)
    cli.ok("run", "-d", "--pod", "shop", "--name", "b", box, "sh", "-c", SERVE)
    assert {row["name"]: (row["pod"], row["status"]) for row in cli.ps()} == {
        "a": ("shop", "created"),
        "b": ("shop", "running"),
    }
    cli.ok("start", "a")
    cli.ok("stop", "b")
    assert (cli.inspect("a")["status"], cli.inspect("b")["exit"]["code"]) == ("running", 0)
    pod = cli.pods()[0]
    assert (pod["name"], pod["status"], pod["running"], len(pod["containers"])) == ("shop", "running", 1, 2)
    assert "shop" in cli.ok("pod", "ls")
    assert "shop" in cli.ok("ps")
    refused = cli("pod", "rm", "shop")
    assert (refused.code, "'a'" in refused.stderr, "'--force'" in refused.stderr) == (1, True, True), refused
    assert cli("run", "--rm", "--pod", "shop", box, "sh", "-c", "exit 7").code == 7


def test_a4_a5_the_limits_of_a_pods_containers_size_its_machine_while_it_runs(empty: Cli, box: str) -> None:
    cli = empty
    cli.ok("run", "-d", "--pod", "shop", "--name", "a", "--memory", "64m", box, "sh", "-c", SERVE)
    size = "nproc; awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo"
    before = [int(word) for word in inside(cli, "a", size).split()]
    cli.ok("run", "-d", "--pod", "shop", "--name", "b", "--memory", "400m", "--cpus", "1", box, "sh", "-c", SERVE)
    after = [int(word) for word in inside(cli, "a", size).split()]
    assert after[0] == before[0] + 1
    assert 390 <= after[1] - before[1] <= 410
    cli.ok("rm", "-f", "b")
    again = [int(word) for word in inside(cli, "a", size).split()]
    assert again[0] == before[0]
    assert again[1] < after[1] - 200


def test_twenty_containers_in_a_pod_share_its_image_disk_and_give_everything_back(empty: Cli, box: str) -> None:
    cli = empty
    limits = ("--memory", "16m", "--cpus", "0.05")
    for some in range(0, MANY, 4):  # several at once, as they come
        starting = [
            cli.popen(
                "run",
                "-d",
                "--pod",
                "shop",
                "--name",
                f"c{number}",
                *limits,
                box,
                "sh",
                "-c",
                f"echo {number} > /mine; {SERVE}",
            )
            for number in range(some, some + 4)
        ]
        assert [client.wait(timeout=300) for client in starting] == [0] * 4
    assert cli.pods()[0]["running"] == MANY
    clients = [cli.popen("exec", f"c{number}", "cat", "/mine", stdout=subprocess.PIPE) for number in range(MANY)]
    assert [client.communicate(timeout=120)[0] for client in clients] == [b"%d\n" % number for number in range(MANY)]
    disks = inside(cli, "c0", "ls /sys/block | grep -c vd")
    assert int(disks) == 1 + 1 + MANY  # the guest's own, the image's, one each
    cli.ok("stop", "-t", "0", *[f"c{number}" for number in range(1, MANY)])
    cli.ok("rm", *[f"c{number}" for number in range(1, MANY)])
    assert inside(cli, "c0", "ls /sys/block | grep -c vd") == "3"


def test_what_belongs_to_the_pod_is_refused_for_a_container_of_it(shop: Cli, box: str) -> None:
    for option in (("-p", "80:80"), ("--network", "none"), ("--dns", "10.0.0.1"), ("--accel", "tcg")):
        refused = shop("run", "--rm", "--pod", "shop", *option, box, "true")
        assert (refused.code, f"'{option[0]}' belongs to the pod" in refused.stderr) == (125, True), refused
    for option, why in (
        (("--hostname", "x"), "it is the pod's"),
        (("--shm-size", "1m"), "give '--shm-size' to 'pod create'"),
        (("--sysctl", "net.core.somaxconn=1"), "set it for the pod"),
    ):
        refused = shop("run", "--rm", "--pod", "shop", *option, box, "true")
        assert (refused.code, why in refused.stderr) == (125, True), refused
    assert shop.ps() == []


def test_c7_names_are_reserved_before_work_and_a_conflict_names_the_holder(empty: Cli, box: str) -> None:
    cli = empty
    taken = cli("pod", "create", "--name", "shop")
    assert (taken.code, described(cli, "shop")["id"][:12] in taken.stderr) == (1, True), taken
    taken = cli("run", "--rm", "--pod", "shop", "--name", "shop", box, "true")
    assert (taken.code, "is in use by" in taken.stderr) == (125, True), taken
    failed = cli("run", "--pod", "shop", "--name", "a", box, "/no/such")
    assert failed.code == 127, failed
    assert cli.ok("run", "--rm", "--pod", "shop", "--name", "a", box, "echo", "free") == "free\n"


def test_c8_pods_are_found_by_prefix_and_what_is_no_pod_is_said(shop: Cli, box: str) -> None:
    pod_id = described(shop, "shop")["id"]
    assert described(shop, pod_id[:8])["id"] == pod_id
    for words in (["pod", "inspect"], ["pod", "start"], ["pod", "stop"], ["pod", "rm"]):
        result = shop(*words, "nothing")
        assert (result.code, "no such pod: 'nothing'" in result.stderr) == (1, True), result
    result = shop("run", "--pod", "nothing", box, "true")
    assert (result.code, "no such pod: 'nothing'" in result.stderr) == (125, True), result


# ---------------------------------------------------------------- the life of a pod


def test_a_pod_remains_without_containers_is_stopped_and_starts_with_what_was_in_it(
    cli: Cli, box: str, pod_template: None
) -> None:
    cli.ok("pod", "create", "--name", "p", "--share", "pid")
    script = f"echo started >> /count; cat /count; {SERVE}"
    cli.ok("run", "-d", "--pod", "p", "--name", "a", box, "sh", "-c", script)
    cli.ok("run", "-d", "--pod", "p", "--name", "b", box, "sh", "-c", SERVE)
    # With pids shared, each sees the other's processes; hostnames are their own then.
    assert inside(cli, "a", "readlink /proc/self/ns/pid") == inside(cli, "b", "readlink /proc/self/ns/pid")
    assert inside(cli, "a", "hostname") != inside(cli, "b", "hostname")
    machine = described(cli, "p")["vm"]["pid"]
    assert cli.ok("pod", "stop", "p") == "p\n"
    wait_until_gone(machine)
    assert cli.processes() == []
    assert [cli.inspect(name)["exit"]["code"] for name in "ab"] == [0, 0]
    assert (cli.pods()[0]["status"], cli.pods()[0]["running"]) == ("stopped", 0)
    assert cli.ok("pod", "stop", "p") == "p\n"
    both = [cli.popen("pod", "start", "p", stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [client.wait(120) for client in both] == [0, 0]
    assert (cli.pods()[0]["status"], cli.pods()[0]["running"]) == ("running", 2)
    assert described(cli, "p")["vm"]["pid"] != machine
    assert inside(cli, "a", "cat /count") == "started\nstarted"
    # What it says and what is seen in it come by different ways.
    awaited(lambda: cli.ok("logs", "a") == "started\nstarted\nstarted\n")
    cli.ok("pod", "rm", "-f", "p")
    assert cli.leftovers() == []


def test_a_container_brings_the_machine_of_a_stopped_pod_up_again(cli: Cli, box: str, pod_template: None) -> None:
    cli.ok("pod", "create", "--name", "p")
    cli.ok("pod", "stop", "p")
    assert cli.ok("run", "--rm", "--pod", "p", box, "echo", "up") == "up\n"
    assert cli.pods()[0]["status"] == "running"
    cli.ok("pod", "rm", "p")
    assert cli.leftovers() == []


def test_c5_a_pod_that_cannot_start_leaves_nothing(cli: Cli) -> None:
    config = cli.run_root / "broken.toml"
    config.write_text('[hypervisor]\nbinary = "/no/such/qemu"\n')
    cli.config = config
    failed = cli("pod", "create", "--name", "p")
    assert (failed.code, "/no/such/qemu" in failed.stderr) == (1, True), failed
    cli.config = None
    assert cli.pods() == []
    assert cli.leftovers() == []


def test_c5_a_pod_that_is_killed_while_it_is_made_leaves_nothing(cli: Cli) -> None:
    creating = cli.popen("pod", "create", "--name", "p", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any("qemu" in title(process) for process in cli.processes()):
        assert time.monotonic() < deadline
    for process in cli.processes():
        if "qemu" not in name_of(process):
            process.kill()
    assert creating.wait(timeout=120) == 1
    assert cli.pods() == []
    assert cli.leftovers() == []


def test_a_pod_outlives_its_supervisor_and_its_machines_death_stops_it(cli: Cli, box: str, pod_template: None) -> None:
    cli.ok("pod", "create", "--name", "p")
    cli.ok("run", "-d", "--pod", "p", "--name", "a", box, "sh", "-c", SERVE)
    leave_unfinished(cli, described(cli, "p"))
    kill(described(cli, "p")["supervisor"]["pid"])
    assert inside(cli, "a", "ls /sys/block | grep -c vd") == "3"  # the guest's own, the image's, its layer
    assert [row["name"] for row in cli.ps()] == ["a"]
    before = described(cli, "p")
    cli.ok("stop", "a")
    kill(before["supervisor"]["pid"])
    cli.ok("gc", "-q")  # an empty pod without a supervisor is no rubbish
    assert cli.pods()[0]["status"] == "running"
    assert cli.ok("run", "--rm", "--pod", "p", box, "echo", "here") == "here\n"
    after = described(cli, "p")
    assert after["vm"]["pid"] == before["vm"]["pid"]
    assert after["supervisor"]["pid"] != before["supervisor"]["pid"]
    uid = os.stat(f"/proc/{after['vm']['pid']}").st_uid
    assert (cli.run_root / "u" / str(uid)).is_symlink()
    cli.ok("start", "a")
    kill(after["vm"]["pid"])
    assert cli.ok("wait", "a") == "137\n"
    assert "virtual machine" in cli.inspect("a")["exit"]["reason"]
    wait_until_gone(after["supervisor"]["pid"])
    assert (cli.pods()[0]["status"], cli.processes()) == ("stopped", [])
    cli.ok("start", "a")
    assert cli.inspect("a")["status"] == "running"


def leave_unfinished(cli: Cli, pod: dict[str, Any]) -> None:
    """A container that was being made when the supervisor died, and had the image's disk like the one that runs."""
    directory = cli.run_root / "s" / pod["id"][:12]
    (path,) = (directory / "containers").glob("*.json")
    unfinished = {**json.loads(path.read_text()), "id": "0" * 64, "name": "", "status": "creating", "standin": None}
    del unfinished["disks"]["scratch"]
    (directory / "containers" / f"{unfinished['id']}.json").write_text(json.dumps(unfinished))
    (cli.run_root / "c" / unfinished["id"]).symlink_to(f"../s/{directory.name}")


def test_b8_a_damaged_pod_is_named_and_spoils_no_other(shop: Cli, box: str) -> None:
    broken = shop.run_root / "s" / "ffffffffffff"
    (broken / "containers").mkdir(parents=True)
    (broken / "sandbox.json").write_text('{"version": 1, "na')
    link = shop.run_root / "p" / ("f" * 64)
    link.symlink_to("../s/ffffffffffff")
    listed = shop("pod", "ls")
    assert (listed.code, "shop" in listed.stdout, "is damaged" in listed.stderr) == (0, True, True), listed
    assert str(broken) in listed.stderr
    refused = shop("pod", "rm", "fffff")
    assert (refused.code, "'vmsandbox gc' removes it" in refused.stderr) == (1, True), refused
    assert shop.ok("run", "--rm", "--pod", "shop", box, "echo", "fine") == "fine\n"
    (broken / "lock").touch()
    os.utime(link, (1, 1), follow_symlinks=False)
    shop.ok("gc")
    assert not broken.exists()
    assert not link.is_symlink()
    assert [pod["name"] for pod in shop.pods()] == ["shop"]
