"""Fits a cross-encoder on the best items of sessions, and scores such items; both are kept in a folder.

Shapes: S sessions, K candidates of a list, N of them in training.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.best_lists import Lists, training_examples, validation_examples
from benchmarks.candidate_prompts import CrossEncoder
from llmgr_rec.cli import progress
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.item_tokens import tokenize_texts
from llmgr_rec.data.session_tokens import append_token
from llmgr_rec.experiments.controls import draw_decoder
from llmgr_rec.files import atomic_write
from llmgr_rec.modules.language_model import LoraLanguageModel
from llmgr_rec.storage.pretrained import load_decoder, load_tokenizer

# The decoder before training; drawn weights are the control.
INITIAL_WEIGHTS = ("pretrained", "random")
_PREFIX, _END = "Clicked, then next:\n", "\n"
_RANK, _ALPHA, _DROPOUT = 16, 32.0, 0.05
_WARM_UP = 0.05
# Sessions whose candidates give the mean and the deviation of each column of the states.
_STANDARDIZED = 64
# Sessions of a file of scores.
_BLOCK = 512
# Begins the names of what is kept beside the weights.
_COST = "cost."


@dataclass(frozen=True)
class Training:
    """How the cross-encoder is built and trained.

    Args:
        llm: Decoder, see `load_decoder`.
        layers: Its first layers that are used; 0 uses all.
        epochs: Passes over the fitted sessions.
        sessions: Most sessions of a pass.
        depth: Items of a list in which the target is looked for.
        candidates: Candidates of a session in training, the target among them.
        batch: Sessions of a step.
        lr: Largest learning rate of AdamW.
        tokens: Most tokens of a title.
        clicks: Newest clicks that are shown.
        fit_on: `training` or `validation` sessions.
        seed: Seed of all random numbers.
        device: Device of the decoder.
    """

    llm: str
    layers: int
    epochs: int
    sessions: int
    depth: int
    candidates: int
    batch: int
    lr: float
    tokens: int
    clicks: int
    fit_on: str
    seed: int
    device: str


def build(training: Training, catalog: Catalog, initial: str) -> CrossEncoder:
    """The cross-encoder before training.

    Args:
        training: Its settings.
        catalog: The items; one without a title has the end token alone.
        initial: One of `INITIAL_WEIGHTS`.
    """
    tokenizer, device = load_tokenizer(training.llm), torch.device(training.device)
    prefix, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (_PREFIX, _END))
    texts = append_token(
        tokenize_texts(catalog.texts(["title"], required=False), tokenizer, training.tokens), end[-1]
    ).to(device)
    load = load_decoder if initial == "pretrained" else partial(draw_decoder, seed=training.seed)
    torch.manual_seed(training.seed)
    language_model = LoraLanguageModel(load(training.llm, training.layers, device=device), _RANK, _ALPHA, _DROPOUT)
    return CrossEncoder(language_model, texts, torch.tensor(prefix, device=device), training.clicks).to(device).eval()


def fit(model: CrossEncoder, lists: Lists, training: Training) -> dict[str, float]:
    """Trains on lists that have their targets, or on training sessions.

    Returns:
        Processor seconds, tokens of a session, sessions, and mean losses of the first and the last tenth of the steps.
    """
    random, device = np.random.default_rng(training.seed), training.device
    make = training_examples if training.fit_on == "training" else validation_examples
    passes = [random.permutation(len(lists))[: training.sessions] for _ in range(training.epochs)]
    rows = torch.from_numpy(np.concatenate(passes))
    clicks, items_SN, _ = make(lists.rows(rows[:_STANDARDIZED]), training.candidates, random)
    model.standardize(model.pack(clicks, items_SN))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.lr, weight_decay=0.01, fused=True)
    batches, bar = rows.split(training.batch), progress(len(rows), "cross-encoder", "session")
    started, num_tokens, losses = time.process_time(), 0, []
    target_S = torch.zeros(training.batch, dtype=torch.int64, device=device)
    model.train()
    for step, batch in enumerate(batches):
        done = step / len(batches)
        optimizer.param_groups[0]["lr"] = training.lr * min((done + 1e-3) / _WARM_UP, (1 - done) / (1 - _WARM_UP))
        clicks, items_SN, scores_SN = make(lists.rows(batch), training.candidates, random)
        packed = model.pack(clicks, items_SN)
        # The target is the first candidate.
        loss = cross_entropy(scores_SN.to(device) + model(packed).view(items_SN.shape), target_S[: len(batch)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        num_tokens += packed.num_tokens
        bar.update(len(batch))
    bar.close()
    model.eval()
    tenth, losses_T = max(len(losses) // 10, 1), torch.stack(losses).cpu()
    return {
        "processor_s": time.process_time() - started,
        "tokens_a_session": num_tokens / len(rows),
        "sessions": len(rows),
        "first_loss": float(losses_T[:tenth].mean()),
        "last_loss": float(losses_T[-tenth:].mean()),
    }


@torch.no_grad()
def scores_of(model: CrossEncoder, lists: Lists, batch: int) -> tuple[Tensor, float, int]:
    """Scores of the items of lists, float32 [S, K], processor seconds and tokens."""
    started, num_tokens, scores = time.process_time(), 0, []
    for rows in torch.arange(len(lists)).split(batch):
        items_SK = lists.ids_SD[rows]
        packed = model.pack(lists.clicks.select(rows), items_SK)
        scores.append(model(packed).view(items_SK.shape).cpu())
        num_tokens += packed.num_tokens
    return torch.cat(scores), time.process_time() - started, num_tokens


class Work:
    """Fitted weights and scores in a folder.

    Args:
        folder: The folder; what is in it is used again.
        training: Settings of the cross-encoder.
        catalog: The items.
        lists: All lists, of whose hash the name of the folder within it is made.
    """

    def __init__(self, folder: Path, training: Training, catalog: Catalog, lists: Sequence[Lists]) -> None:
        self._training, self._catalog = training, catalog
        digest = hashlib.sha256(json.dumps(asdict(training), sort_keys=True).encode())
        for some in lists:
            digest.update(some.targets_S.numpy().tobytes() + some.scores_SD.numpy().tobytes())
        self._folder = folder / digest.hexdigest()[:12]

    def fitted(self, initial: str, lists: Lists) -> tuple[CrossEncoder, dict[str, float]]:
        """The trained cross-encoder, and what `fit` returned."""
        model = build(self._training, self._catalog, initial)

        def make() -> dict[str, Tensor]:
            cost = fit(model, lists, self._training)
            of_model = {name: value.contiguous() for name, value in model.state_dict().items() if _is_trained(name)}
            return {**of_model, **{f"{_COST}{name}": torch.tensor(value) for name, value in cost.items()}}

        stored = self._stored(f"{initial}.safetensors", make)
        cost = {name.removeprefix(_COST): float(stored.pop(name)) for name in list(stored) if name.startswith(_COST)}
        model.load_state_dict(stored, strict=False)
        return model, cost

    def scores(self, initial: str, part: str, model: CrossEncoder, lists: Lists) -> tuple[Tensor, dict[str, float]]:
        """Scores of the items of lists that have their targets, and the cost of a session."""

        def make(rows: Tensor) -> dict[str, Tensor]:
            scores_SK, seconds, tokens = scores_of(model, lists.rows(rows), self._training.batch)
            return {"scores": scores_SK, "cost": torch.tensor([seconds, tokens, len(rows)], dtype=torch.float64)}

        blocks = [
            self._stored(f"{initial}-{part}-{len(lists)}-{int(rows[0])}.safetensors", partial(make, rows))
            for rows in torch.arange(len(lists)).split(_BLOCK)
        ]
        seconds, tokens, count = torch.stack([block["cost"] for block in blocks]).sum(dim=0).tolist()
        cost = {"processor_ms_a_session": 1000 * seconds / count, "tokens_a_session": tokens / count}
        return torch.cat([block["scores"] for block in blocks]), cost

    def _stored(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        file = self._folder / name
        if not file.is_file():
            made = make()
            with atomic_write(file) as partial_file:
                save_file(made, partial_file)
        return load_file(file)


def _is_trained(name: str) -> bool:
    return "lora_" in name or not name.startswith("language_model.")
