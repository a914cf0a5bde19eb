"""Processes of ours are killed at moments that a seeded generator picks; nothing may be lost or left behind.

What a round does and checks is in `tests.harness.killing`; a failing one is repeated with its seed.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.harness import killing, rounds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.harness.killing import Ground

#: a stretch in which everybody is killed, some several times
ROUNDS = range(226, 249)
LONG_ROUNDS = range(1300)
#: moments of an operation at which each victim is killed in the long run
MOMENTS = 3


@pytest.fixture(scope="module")
def ground(data_root: Path, box: str, pod_template: None) -> Iterator[Ground]:
    with killing.ground(data_root, box) as made:
        yield made


def test_the_normal_rounds_do_every_operation_and_kill_every_kind_of_process() -> None:
    played = [rounds.Round.of(seed) for seed in ROUNDS]
    assert {plan.operation for plan in played} == set(rounds.OPERATIONS)
    victims = {victim for plan in played for victim in plan.victims}
    assert victims == {victim for about in rounds.OPERATIONS.values() for victim in about.victims} | {"virtiofsd"}


def test_the_long_rounds_kill_everybody_at_several_moments_of_every_operation() -> None:
    played = [rounds.Round.of(seed) for seed in LONG_ROUNDS]
    times = Counter((plan.operation, victim) for plan in played for victim in plan.victims)
    for operation, about in rounds.OPERATIONS.items():
        for victim in (*about.victims, *(("virtiofsd",) if about.may_share else ())):
            assert times[operation, victim] >= MOMENTS, (operation, victim)


@pytest.mark.cloned
@pytest.mark.parametrize("seed", ROUNDS)
def test_whatever_is_killed_nothing_is_lost_or_left(ground: Ground, seed: int) -> None:
    ground.play(seed)


@pytest.mark.cloned
@pytest.mark.long
def test_more_than_a_thousand_rounds_without_a_leak_or_a_loss(ground: Ground) -> None:
    for seed in LONG_ROUNDS:
        ground.play(seed)
