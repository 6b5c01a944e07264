"""Soft tokens of a session recommender in a LoRA-tuned language model: LLMGR's stage behave, built part by part.

    python -m examples.llm_stage
    python -m examples.llm_stage --llm smollm2 --num_layers 4

A session recommender is trained on the sessions of examples/minimal.py, and frozen. A projection adapter turns its item
and session vectors into soft tokens of a prompt, the language model encodes the prompt, and a head turns the hidden
state of the last token into item scores, to which the recommender's own are added. Adapter, LoRA matrices and head
train; the language model stays frozen. `random-tiny` is an untrained decoder of two layers: it shows that the parts
fit together, not what a language model gains.

Shapes: B sessions, V items, d1 columns of item and session vectors, d2 columns of the language model.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor, nn

import llmgr_rec as rec
from examples.minimal import NUM_CATEGORIES, NUM_ITEMS, NUM_SESSIONS, make_catalog, write_sessions
from llmgr_rec.config import HeadConfig
from llmgr_rec.data.prompt_templates import PromptTemplate
from llmgr_rec.modules.adapter import ProjectionAdapter
from llmgr_rec.modules.heads import TiedHead
from llmgr_rec.modules.language_model import LoraLanguageModel, mean_embedding_norm
from llmgr_rec.modules.param_groups import select_trainable
from llmgr_rec.modules.prompts import compile_prompt
from llmgr_rec.modules.tasks import BehaveTask, SbrTask
from llmgr_rec.storage.pretrained import load_decoder, load_tokenizer

D1, MAX_NODES = 32, 20
# {nodes} stands for one soft token per click, {graph} for one soft token of the whole session. All that differs between
# the prefixes of a session follows {nodes}, so they are encoded in one pass.
PROMPT = "Below are the items of a session and its graph. Name the next item:{nodes}{graph}"


def make_recommender() -> rec.SessionRecommender:
    """A session recommender with SR-GNN; in one process its tables need no sharding."""
    tables = rec.ItemTables(NUM_ITEMS, {"category": NUM_CATEGORIES}, D1)
    encoder = rec.build_encoder(rec.EncoderConfig(name="srgnn", dropout=0.0), D1)
    return rec.SessionRecommender(tables, encoder, score="cosine", temperature=0.15)


def make_llmgr(recommender: rec.SessionRecommender, llm: str, num_layers: int) -> rec.LLMGR:
    """The parts of LLMGR around a session recommender.

    Args:
        recommender: Trained session recommender.
        llm: `random-tiny`, `smollm2`, a local folder or a hub id.
        num_layers: Number of decoder layers kept, from the first; 0 keeps all.
    """
    decoder = load_decoder(llm, num_layers, dtype="float32")
    # Soft tokens get the mean norm of the token embeddings, which the decoder is used to.
    embedding_norm = mean_embedding_norm(decoder)
    language_model = LoraLanguageModel(decoder, rank=8, alpha=16.0, dropout=0.0)
    d2 = language_model.hidden_size
    prompt = compile_prompt(PromptTemplate("behave", "this file", PROMPT), load_tokenizer(llm), with_text=False)
    return rec.LLMGR(
        recommender,
        ProjectionAdapter(D1, d2, embedding_norm),
        language_model,
        TiedHead(HeadConfig(item_text=False), D1, d2, NUM_ITEMS),
        {"behave": prompt},
        max_nodes=MAX_NODES,
    )


def epochs(reader: rec.SessionReader, count: int) -> Iterator[rec.SessionBatch]:
    """The batches of some epochs, each in an order of its own."""
    return chain.from_iterable(reader.batches(epoch) for epoch in range(count))


def train(task: nn.Module, batches: Iterator[rec.SessionBatch], lr: float) -> list[float]:
    """Trains what requires a gradient; returns the loss of each batch."""
    optimizer = torch.optim.AdamW([weight for weight in task.parameters() if weight.requires_grad], lr=lr)
    task.train()
    losses = []
    for batch in batches:
        loss, _ = task(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def hit_rate(
    model: rec.SessionRecommender | rec.LLMGR, queries: Callable[[rec.SessionBatch], Tensor], test: rec.SessionReader
) -> float:
    """HR@20: the share of sessions whose next item is among the best 20 of the whole catalog."""
    ranker = rec.CatalogRanker(model.eval(), rec.Collator(make_catalog(), ["category"]), rec.World.alone())
    hits = [
        (ranker.rank(queries(batch), k=20)[0] == batch.targets_B.unsqueeze(1)).any(dim=1) for batch in test.batches(0)
    ]
    return float(torch.cat(hits).float().mean())


def main(argv: Sequence[str]) -> None:
    """Trains the session recommender, then LLMGR, and evaluates both."""
    parser = argparse.ArgumentParser(description="Trains stage behave of LLMGR on synthetic sessions.")
    parser.add_argument("--llm", default="random-tiny", help="random-tiny, smollm2, a local folder or a hub id")
    parser.add_argument("--num_layers", type=int, default=0, help="decoder layers kept, from the first; 0 keeps all")
    parser.add_argument("--steps", type=int, default=120, help="training steps of LLMGR")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    catalog = make_catalog()
    with tempfile.TemporaryDirectory() as folder:
        train_file, test_file = (
            write_sessions(Path(folder) / f"{seed}.parquet", NUM_SESSIONS, seed) for seed in (1, 2)
        )

        def reader(file: Path, candidates: rec.CandidateItems, order: rec.SamplingOrder) -> rec.SessionReader:
            collator = rec.Collator(catalog, ["category"], candidates)
            return rec.SessionReader([file], num_items=NUM_ITEMS, collate=collator, order=order)

        test = reader(test_file, rec.CandidateItems(), rec.SamplingOrder(batch_size=128))
        recommender = make_recommender()
        prefixes = rec.SamplingOrder(batch_size=128, shuffle=True, augment_prefixes=True)
        sessions = reader(train_file, rec.CandidateItems("full"), prefixes)
        losses = train(SbrTask(recommender), epochs(sessions, 5), lr=1e-2)
        print(f"session recommender: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
        print(f"session recommender: HR@20 {hit_rate(recommender, recommender.queries, test):.3f}")

        llmgr = make_llmgr(recommender, arguments.llm, arguments.num_layers)
        select_trainable(llmgr, {"adapter", "lora", "head"})
        # The tables are frozen, so the vectors of all items are looked up once.
        llmgr.cache_catalog(llmgr.rows(rec.Collator(catalog, ["category"]).item_features(torch.arange(NUM_ITEMS))))
        one_pass = rec.SamplingOrder(32, shuffle=True, augment_prefixes=True, max_prefixes_per_pass=MAX_NODES)
        prompts = reader(train_file, rec.CandidateItems("cached"), one_pass)
        batches = islice(epochs(prompts, arguments.steps), arguments.steps)
        losses = train(BehaveTask(llmgr, one_pass=True), batches, lr=5e-3)
        print(f"LLMGR: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
        print(f"LLMGR: HR@20 {hit_rate(llmgr, llmgr, test):.3f} (random ranking: {20 / NUM_ITEMS:.3f})")


if __name__ == "__main__":
    main(sys.argv[1:])
