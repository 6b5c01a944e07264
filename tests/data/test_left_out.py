"""Whose id row is left out: the right ones, the right share, the same wherever an item stands."""

from pathlib import Path

import pytest
import torch

from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.collate import Collator
from llmgr_rec.data.left_out import LeftOutIds

from .files import write_items
from .test_collate import bags, raw_sessions

NUM_ITEMS = 40
UNSEEN = [0, 7, 39]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    found = Catalogue.load(write_items(tmp_path_factory.mktemp("items"), NUM_ITEMS))
    found.train_count_V[:] = 3
    found.train_count_V[UNSEEN] = 0
    return found


def collator(catalogue: Catalogue, share: float, **settings: object) -> Collator:
    left_out = LeftOutIds(catalogue.train_count_V, share, seed=0)
    return Collator(catalogue, ["brand"], "full", item_text=True, left_out=left_out, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_the_share_of_items_and_of_steps_is_the_one_asked_for(share: float) -> None:
    items = torch.arange(20_000)
    left_out = LeftOutIds(torch.ones_like(items), share, seed=3)
    masks_SX = torch.stack([left_out.mask(items, epoch, step) for epoch in range(3) for step in range(10)])
    # Four standard deviations of a share of 20,000 items, and of the rarest and commonest of them over 30 steps.
    spread = (share * (1 - share)) ** 0.5
    assert (masks_SX.float().mean(1) - share).abs().max() <= 4 * spread / 20_000**0.5
    assert masks_SX.float().mean().item() == pytest.approx(share, abs=4 * spread / 600_000**0.5)
    # Steps are drawn apart: as variable as 30 draws of each item should be.
    per_item_X = masks_SX.float().sum(0)
    assert per_item_X.var().item() == pytest.approx(30 * share * (1 - share), rel=0.1)


def test_draws_depend_on_item_seed_epoch_and_step_and_on_nothing_else() -> None:
    items = torch.arange(1000)
    counts = torch.ones_like(items)

    def mask(seed: int, epoch: int, step: int) -> list[bool]:
        return LeftOutIds(counts, 0.5, seed).mask(items, epoch, step).tolist()

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    assert len({tuple(mask(*place)) for place in places}) == len(places)
    left_out, shuffled = LeftOutIds(counts, 0.5, 5), items.flip(0).repeat(2)
    assert torch.equal(left_out.mask(shuffled, 2, 9), left_out.mask(items, 2, 9)[shuffled])


def test_an_item_is_left_out_as_a_node_and_as_a_candidate_alike(catalogue: Catalogue) -> None:
    raw = raw_sessions([list(range(NUM_ITEMS)), [5, 6, 7, 8], [8]], [1, 2, 3], epoch=1, step=4)
    batch = collator(catalogue, 0.5)(raw)
    items = torch.cat([batch.graph.node_items_N, batch.candidates_C]).tolist()
    found: dict[int, set[bool]] = {}
    for item, bag in zip(items, bags(batch.features, "item_id"), strict=True):
        assert bag in ([], [item])
        found.setdefault(item, set()).add(bool(bag))
    assert all(len(kinds) == 1 for kinds in found.values())
    assert {True, False} == {kind for kinds in found.values() for kind in kinds}
    assert bags(batch.features, "item_text") == [[item] for item in items], "the text is there always"


def test_items_that_training_never_sees_go_without_their_ids_always(catalogue: Catalogue) -> None:
    collate = collator(catalogue, 0.0)
    for step in range(3):
        batch = collate(raw_sessions([[7, 1, 39]], [2], step=step))
        assert bags(batch.features, "item_id")[:3] == [[], [1], []]
        empty = [item for item, bag in enumerate(bags(batch.features, "item_id")[3:]) if not bag]
        assert empty == UNSEEN
    assert collate.left_out is not None
    assert collate.left_out.untrained_V.nonzero().flatten().tolist() == UNSEEN


def test_a_share_of_one_leaves_nothing_that_trains() -> None:
    left_out = LeftOutIds(torch.ones(100, dtype=torch.int64), 1.0, 0)
    assert left_out.untrained_V.all()
    assert left_out.mask(torch.arange(100), 0, 0).all()


def test_bags_for_ranking_hold_every_id(catalogue: Catalogue) -> None:
    features = collator(catalogue, 0.9).item_features(torch.arange(NUM_ITEMS))
    assert features.keys() == ["item_id", "brand", "item_text"]
    assert bags(features, "item_id") == bags(features, "item_text") == [[item] for item in range(NUM_ITEMS)]


def test_it_goes_through_reader_processes(catalogue: Catalogue, tmp_path: Path) -> None:
    import pickle

    raw = raw_sessions([[1, 2, 3]], [4], epoch=2, step=1)
    collate = collator(catalogue, 0.4)
    again: Collator = pickle.loads(pickle.dumps(collate))  # noqa: S301 (this very test wrote it)
    assert torch.equal(again(raw).features.values(), collate(raw).features.values())
