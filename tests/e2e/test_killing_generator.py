"""Processes of ours are killed at moments that a seeded generator picks; nothing may be lost or left behind.

What a round does and checks is in `tests.harness.killing`; a failing one is repeated with its seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness import killing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.harness.killing import Ground

ROUNDS = 20
LONG_ROUNDS = 1000


@pytest.fixture(scope="module")
def ground(data_root: Path, box: str, pod_template: None) -> Iterator[Ground]:
    with killing.ground(data_root, box) as made:
        yield made


def test_the_normal_rounds_do_every_operation_and_kill_every_kind_of_process() -> None:
    rounds = [killing.Round.of(seed) for seed in range(ROUNDS)]
    assert {plan.operation for plan in rounds} == set(killing.OPERATIONS)
    victims = {victim for plan in rounds for victim in plan.victims}
    assert victims == {victim for about in killing.OPERATIONS.values() for victim in about.victims}


@pytest.mark.cloned
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_whatever_is_killed_nothing_is_lost_or_left(ground: Ground, seed: int) -> None:
    ground.play(seed)


@pytest.mark.cloned
@pytest.mark.long
def test_a_thousand_rounds_without_a_leak_or_a_loss(ground: Ground) -> None:
    for seed in range(LONG_ROUNDS):
        ground.play(seed)
