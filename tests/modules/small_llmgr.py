"""A small complete model and batches for it, for the tests of modules."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from llmgr_rec.config import EncoderConfig, HeadConfig
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.collate import (
    CandidateItems,
    CandidateSource,
    Collator,
    LastItemsText,
    PromptTextSource,
    RandomNodeText,
)
from llmgr_rec.data.item_tokens import tokenize_texts
from llmgr_rec.data.jagged import Jagged, lengths_to_offsets
from llmgr_rec.data.prefixes import grow_prefixes
from llmgr_rec.data.prompt_templates import Task, parse_template
from llmgr_rec.modules.adapter import ProjectionAdapter
from llmgr_rec.modules.encoders import build_encoder
from llmgr_rec.modules.heads import build_head
from llmgr_rec.modules.item_tables import ItemTables
from llmgr_rec.modules.language_model import LoraLanguageModel, mean_embedding_norm
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.param_groups import select_trainable
from llmgr_rec.modules.prompts import compile_prompt
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.text_table import text_tables
from llmgr_rec.storage.pretrained import load_decoder, load_tokenizer

NUM_ITEMS = 12
D1 = 8
TEMPLATES: dict[Task, str] = {
    "behave": "Next item?[[ {text}]]\nItems:{nodes} Graph:{graph} ->",
    "align": "Which node? {text}:{nodes} ->",
    "structure_graph": "Items of {graph} ->",
    "structure_nodes": "Items: {nodes} ->",
}


def catalog() -> Catalog:
    """Items in memory, the even ones with a category."""
    lengths = torch.tensor([1, 0] * (NUM_ITEMS // 2))
    return Catalog(
        file=Path("items.parquet"),
        item_ids=pa.array([f"item{number}" for number in range(NUM_ITEMS)]),
        train_count_V=torch.arange(NUM_ITEMS) + 1,
        features={"category": Jagged.from_lengths(torch.arange(NUM_ITEMS // 2) % 3, lengths)},
    )


def item_tokens() -> Jagged:
    """Token ids of the items' texts."""
    return tokenize_texts([f"thing {number}" for number in range(NUM_ITEMS)], load_tokenizer("random-tiny"), 8)


def one_pass_batch(
    sessions: Sequence[Sequence[int]] = ((1, 2, 3, 2, 4), (7,), (5, 5, 6)), most: int = 20, **settings: Any
) -> SessionBatch:
    """A collated batch of all prefixes of sessions whose last click is their target; they share prompts."""
    raw = raw_sessions([session[:-1] for session in sessions], [session[-1] for session in sessions])
    return collator(**settings)(grow_prefixes(raw, most, int(raw.offsets_B1[-1])))


def raw_sessions(sessions: Sequence[Sequence[int]], targets: Sequence[int], weights: Any = None) -> RawSessions:
    """Sessions as the reader hands them out."""
    size = len(sessions)
    weights_B = torch.ones(size) if weights is None else torch.tensor(weights, dtype=torch.float32)
    return RawSessions(
        items_L=torch.tensor([item for session in sessions for item in session], dtype=torch.int64),
        offsets_B1=lengths_to_offsets(torch.tensor([len(session) for session in sessions])),
        targets_B=torch.tensor(targets),
        weights_B=weights_B,
        rows_B=torch.arange(size),
        global_size=int((weights_B > 0).sum()),
    )


def make_batch(
    sessions: Sequence[Sequence[int]] = ((1, 2, 3, 2, 4), (7,), (5, 5, 6)),
    targets: Sequence[int] = (0, 3, 11),
    weights: Any = None,
    **settings: Any,
) -> SessionBatch:
    """A collated batch, with the whole catalog as candidates unless the settings differ."""
    return collator(**settings)(raw_sessions(sessions, targets, weights))


def collator(
    candidates: CandidateSource = "full",
    num_draws: int = 0,
    text: PromptTextSource = "none",
    text_items: int = 0,
    **settings: Any,
) -> Collator:
    """Collates batches, by default with the whole catalog as candidates."""
    shown = {
        "none": None,
        "random_node": RandomNodeText(item_tokens()),
        "last_items": LastItemsText(item_tokens(), text_items),
    }
    sources = {"catalog": catalog(), "side_features": ["category"], **settings}
    return Collator(candidates=CandidateItems(candidates, num_draws), text=shown[text], **sources)


class QueriesAndItems(NamedTuple):
    """Both sides of the score of a batch: queries [B, Q] and the scored items [C, Q]."""

    queries_BQ: torch.Tensor
    items_CQ: torch.Tensor


def score(model: LLMGR, batch: SessionBatch) -> QueriesAndItems:
    """Queries and scored items of a batch, from one lookup as in training."""
    output = model.look_up(batch)
    return QueriesAndItems(model.queries(output, model.encode(output, batch, "behave")), model.items(output, batch))


def make_llmgr(
    head: str = "tied",
    residual: bool = True,
    with_text: bool = False,
    encoder: EncoderConfig | None = None,
    behave: str = TEMPLATES["behave"],
    separate_loss: bool = False,
    **settings: Any,
) -> LLMGR:
    """A seeded model on the random-tiny decoder whose LoRA matrices already matter; adapter, LoRA and head train."""
    torch.manual_seed(0)
    decoder = load_decoder("random-tiny", dtype="float32")
    width = decoder.config.hidden_size
    tables = ItemTables(NUM_ITEMS, {"category": 3}, D1)
    recommender = SessionRecommender(tables, build_encoder(encoder or EncoderConfig(), D1), "cosine", 0.1)
    embedding_norm = mean_embedding_norm(decoder)
    language_model = LoraLanguageModel(decoder, rank=2, alpha=2.0, dropout=0.0)
    for name, parameter in language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tokenizer = load_tokenizer("random-tiny")
    text = None
    if head == "tied":
        text = text_tables(NUM_ITEMS, width)
        torch.nn.init.normal_(text.embedding_bags["item_text"].weight)
    model = LLMGR(
        recommender=recommender,
        adapter=ProjectionAdapter(D1, width, embedding_norm),
        language_model=language_model,
        head=build_head(HeadConfig(name=head, residual=residual, separate_loss=separate_loss), D1, width, NUM_ITEMS),
        prompts={
            task: compile_prompt(parse_template(task, template, "test"), tokenizer, with_text or task == "align")
            for task, template in {**TEMPLATES, "behave": behave}.items()
        },
        text=text,
        **settings,
    )
    select_trainable(model, ["adapter", "lora", "head"])
    return model
