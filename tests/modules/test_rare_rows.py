"""Rows of rare items: their neighbours by text, and how far they are drawn to them, against plain loops."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmgr_rec.modules.rare_rows import NEIGHBOURS, draw_to_neighbours, text_neighbours

ITEMS, SCALE = 40, 7.0
UNTRAINED, WITHOUT_TEXT = [3, 8, 21], [5, 8]


def items() -> Tensor:
    items_VK = functional.normalize(torch.randn(ITEMS, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    items_VK[WITHOUT_TEXT] = 0
    return items_VK


def trained() -> Tensor:
    trained_V = torch.ones(ITEMS, dtype=torch.bool)
    trained_V[UNTRAINED] = False
    return trained_V


def plain_neighbours(items_VK: Tensor, trained_V: Tensor, item: int) -> dict[int, float]:
    """Weights of an item's neighbours as the docstring says them."""
    if not items_VK[item].any():
        return {}
    others = [other for other in range(len(items_VK)) if other != item and trained_V[other] and items_VK[other].any()]
    cosine = {other: float(items_VK[other] @ items_VK[item]) for other in others}
    nearest = sorted(others, key=lambda other: -cosine[other])[:NEIGHBOURS]
    whole = sum(math.exp(SCALE * cosine[other]) for other in nearest)
    return {other: math.exp(SCALE * cosine[other]) / whole for other in nearest}


@pytest.mark.parametrize("own", [range(ITEMS), range(3, 9), range(39, 40)])
def test_neighbours_agree_with_a_loop(own: range) -> None:
    ids_UN, weights_UN = text_neighbours(items(), trained(), SCALE, own)
    for item, ids_N, weights_N in zip(own, ids_UN.tolist(), weights_UN.tolist(), strict=True):
        found = {other: weight for other, weight in zip(ids_N, weights_N, strict=True) if weight}
        assert found == pytest.approx(plain_neighbours(items(), trained(), item), abs=1e-5)
        assert not {item, *UNTRAINED, *WITHOUT_TEXT} & set(found)


def test_a_small_catalogue_has_fewer_neighbours() -> None:
    ids_UN, weights_UN = text_neighbours(items()[:4], trained()[:4], SCALE, range(4))
    assert ids_UN.shape == (4, 4)
    assert (weights_UN > 0).sum(dim=1).tolist() == [2, 2, 2, 3], "item 3 is nobody's, and has three itself"
    ids_UN, weights_UN = text_neighbours(items()[:2], torch.tensor([True, False]), SCALE, range(2))
    assert weights_UN.sum(dim=1).tolist() == [0, 1], "the only trained item has nobody"


def test_rows_are_drawn_the_further_the_rarer_an_item_is() -> None:
    generator = torch.Generator().manual_seed(1)
    rows_UC, near_UNC = torch.randn(5, 8, generator=generator), torch.randn(5, 2, 8, generator=generator)
    weights_UN = torch.tensor([[0.25, 0.75]] * 4 + [[0.0, 0.0]])
    count_U = torch.tensor([0, 1, 6, 10**9, 0])
    drawn_UC = draw_to_neighbours(rows_UC, near_UNC, weights_UN, count_U, 2.0)
    mean_UC = 0.25 * near_UNC[:, 0] + 0.75 * near_UNC[:, 1]
    torch.testing.assert_close(drawn_UC[0], mean_UC[0])
    torch.testing.assert_close(drawn_UC[1], (rows_UC[1] + 2 * mean_UC[1]) / 3)
    torch.testing.assert_close(drawn_UC[2], (6 * rows_UC[2] + 2 * mean_UC[2]) / 8)
    torch.testing.assert_close(drawn_UC[3], rows_UC[3])
    assert torch.equal(drawn_UC[4], rows_UC[4]), "no neighbours"
