import re

import pytest

from tests.examples.run_example import run_example


def losses_and_hit_rate(printed: str) -> tuple[list[float], float]:
    losses = [float(value) for value in re.findall(r"epoch \d: loss ([\d.]+)", printed)]
    (rate,) = re.findall(r"HR@20 ([\d.]+)", printed)
    return losses, float(rate)


@pytest.mark.parametrize(
    "ranks", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.dist])], ids=["one rank", "two ranks"]
)
def test_it_learns_to_rank_the_next_item(ranks: int) -> None:
    losses, rate = losses_and_hit_rate(run_example("minimal", ranks=ranks))
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.75 * losses[0]
    # Four of five targets are one of four successors; a random ranking has 0.05.
    assert 0.5 < rate < 0.85
