"""Text embeddings read from disk equal the plain reference, for any rectangle and any number of ranks."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.process_group import World
from llmgr_rec.modules import language_model
from llmgr_rec.modules.language_model import embed_item_texts
from llmgr_rec.storage.pretrained import load_decoder
from llmgr_rec.training import text_embeddings
from llmgr_rec.training.text_embeddings import TextEmbeddings, embed_catalog
from tests.ranks import run_on_ranks

ITEMS = 23


def texts() -> Jagged:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 6, (ITEMS,), generator=generator)
    lengths[0], lengths[1] = 0, 3
    return Jagged.from_lengths(torch.randint(4, 200, (int(lengths.sum()),), generator=generator), lengths)


def standardized(embeddings_VH: Tensor) -> Tensor:
    """Centered on the mean of the items with text, and scaled to a root mean square norm of 1; zeros stay zeros."""
    has_text_V = embeddings_VH.any(dim=1)
    centered_VH = (embeddings_VH - embeddings_VH[has_text_V].mean(dim=0)) * has_text_V.unsqueeze(1)
    return centered_VH / centered_VH[has_text_V].square().sum(dim=1).mean().sqrt()


def embeddings_of(world: World, run: str) -> torch.Tensor:
    text_embeddings._MIN_ROWS = 4
    decoder = load_decoder("random-tiny", 1, "float32")
    found = embed_catalog(decoder, texts(), world, Path(run), "hash")
    left, right = found.read(range(9), range(64)), found.read(range(9, ITEMS), range(64))
    assert torch.equal(found.read(range(3, 15), range(8, 20)), torch.cat([left, right])[3:15, 8:20])
    return torch.cat([left, right])


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_embeddings_on_disk_equal_the_reference(tmp_path: Path, ranks: int) -> None:
    decoder = load_decoder("random-tiny", 1, "float32")
    expected = standardized(embed_item_texts(decoder, texts(), ITEMS))
    for found in run_on_ranks(embeddings_of, ranks, str(tmp_path)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(list(tmp_path.rglob("items-*.safetensors"))) == 6


def embed_with_a_slow_rank(world: World, folder: str) -> None:
    """Rank 0 takes longer than the ranks' own group waits."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), None)
    if world.rank == 0:
        language_model.embed_item_texts = slowly(language_model.embed_item_texts)
    embed_catalog(load_decoder("random-tiny", 1, "float32"), texts(), world, Path(folder), "hash")


def slowly(work: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wait_and_work(*args: Any) -> Tensor:
        time.sleep(4)
        return work(*args)

    return wait_and_work


@pytest.mark.dist
def test_ranks_wait_for_the_slowest(tmp_path: Path) -> None:
    run_on_ranks(embed_with_a_slow_rank, 2, str(tmp_path), timeout_s=60)


def test_finished_files_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_embeddings, "_MIN_ROWS", 4)
    decoder = load_decoder("random-tiny", 1, "float32")
    one = World.alone()
    first = embed_catalog(decoder, texts(), one, tmp_path, "hash").read(range(ITEMS), range(64))
    monkeypatch.setattr(language_model, "embed_item_texts", lambda *_: pytest.fail("computed again"))
    again: TextEmbeddings = embed_catalog(decoder, texts(), one, tmp_path, "hash")
    assert torch.equal(again.read(range(ITEMS), range(64)), first)


def test_damaged_files_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_embeddings, "_MIN_ROWS", 4)
    decoder = load_decoder("random-tiny", 1, "float32")
    one = World.alone()
    first = embed_catalog(decoder, texts(), one, tmp_path, "hash").read(range(ITEMS), range(64))
    flipped, cut, *_ = sorted(tmp_path.rglob("*.safetensors"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    again = embed_catalog(decoder, texts(), one, tmp_path, "hash")
    assert torch.equal(again.read(range(ITEMS), range(64)), first)
