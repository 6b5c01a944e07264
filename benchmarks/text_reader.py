"""What a language model adds that is trained, whole, to read sessions as texts: alone, and beside a finished run.

```sh
python -m benchmarks.text_reader --dataset PREPARED --run RUN
```

A reader (`benchmarks.text_reader_model`) is trained on the texts of what training sessions clicked: after each click it
has to find the text of the next item among those of the batch and some drawn ones. Then the test sessions are ranked
over the whole catalogue by the run's recommender with its neighbours, by the reader alone, and by the sum of both, with
the weight that is best on the validation sessions. It wants a GPU: minutes there are hours on a CPU.

Shapes: B sessions, L clicks, V items, C candidates, S sessions of a split.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from benchmarks.harness import benchmark_parser, set_threads, write_report
from benchmarks.session_texts import (
    closed,
    drop_tokens,
    item_texts,
    last_places,
    newest,
    session_texts,
    windows,
)
from benchmarks.text_reader_model import TextReader
from llmgr_rec.cli import parse_args, progress, run_cli
from llmgr_rec.config import Config
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.item_text import tokenize_texts
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.pretrained import load_tokenizer
from llmgr_rec.distributed.assembly import assemble_decoder
from llmgr_rec.distributed.bundle import Bundle, load_bundle
from llmgr_rec.distributed.neighbour_prior import NeighbourPrior
from llmgr_rec.distributed.process_group import choose_device
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.baselines import Neighbours
from llmgr_rec.evaluation.protocol import as_it_is, split_reader
from llmgr_rec.evaluation.sparse_scores import Floats, Ints, top_k
from llmgr_rec.modules.losses import ranking_loss
from llmgr_rec.study.compare import METRICS, relative_gain
from llmgr_rec.study.judge import Places, judge_baseline, judge_model

FIELDS = ["title", "brand", "category"]
RUN, ALONE, BOTH = "run", "reader alone", "run + reader"
# Factors that the reader's score may get beside the run's.
WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_END = "\n"
_HEAD_RATE, _WEIGHT_DECAY, _CLIP_NORM, _WARMUP = 1e-3, 1e-2, 1.0, 0.05
_ROWS = 4096


def main(argv: Sequence[str]) -> None:
    """Parses the arguments, trains and judges."""
    parser = benchmark_parser("text_reader", "Trains a language model to read sessions as text, and judges it.")
    parser.add_argument("--dataset", type=str, required=True, help="Folder made by llmgr_rec.prepare.")
    parser.add_argument("--run", type=str, required=True, help="Run folder made by llmgr_rec.train on it.")
    parser.add_argument("--llm", type=str, default="smollm2", help="Language model, as llm.name_or_path.")
    parser.add_argument("--layers", type=int, default=0, help="First decoder layers kept; 0 keeps all.")
    parser.add_argument("--random", type=bool, default=False, help="Start from weights that were never trained.")
    parser.add_argument("--epochs", type=int, default=5, help="Passes over the training sessions.")
    parser.add_argument("--batch_size", type=int, default=128, help="Sessions of a step.")
    parser.add_argument("--lr", type=float, default=1e-4, help="Peak learning rate of the decoder.")
    parser.add_argument("--clicks", type=int, default=10, help="Clicks of a session that are read.")
    parser.add_argument("--max_text_tokens", type=int, default=31, help="Tokens kept of one item's text.")
    parser.add_argument("--dim", type=int, default=192, help="Columns of queries and items.")
    parser.add_argument("--drawn_items", type=int, default=512, help="Items a step beside the targets of its batch.")
    parser.add_argument("--dropped_tokens", type=float, default=0.1, help="Share of tokens left out in training.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of every draw.")
    args = parse_args(parser, argv).as_dict()
    set_threads(args["threads"])
    bundle = load_bundle(Path(args["run"]))
    dataset = Dataset(Path(args["dataset"]))
    if Catalogue.load(dataset.path).hash != bundle.catalogue.hash:
        raise UserError(
            f"{args['run']} was trained on another catalogue than {args['dataset']}; give the run's data set"
        )
    texts = catalogue_texts(bundle.catalogue, args["llm"], args["max_text_tokens"])
    reader = make_reader(args, texts)
    started = time.monotonic()
    loss = train(reader, texts, training_sessions(dataset), args)
    seconds = time.monotonic() - started
    results = judge(ReaderScores(reader, texts, args["clicks"]), bundle, dataset)
    results |= {"seconds": seconds, "loss": loss}
    print(table(results))
    write_report(args["output"], args, results)


def catalogue_texts(catalogue: Catalogue, llm: str, max_tokens: int) -> Jagged:
    """Token ids of all items' texts, each closed by the end of a line."""
    tokenizer = load_tokenizer(llm)
    end = tokenizer(_END, add_special_tokens=False)["input_ids"][-1]
    return closed(tokenize_texts(catalogue.texts(FIELDS, required=False), tokenizer, max_tokens), end)


def make_reader(args: Mapping[str, Any], texts: Jagged) -> TextReader:
    """A reader on the device that there is, whitened on the catalogue."""
    config = Config(seed=args["seed"])
    config.llm.name_or_path, config.llm.num_layers, config.llm.dtype = args["llm"], args["layers"], "float32"
    config.controls.random_llm = args["random"]
    device = choose_device("auto")
    reader = TextReader(assemble_decoder(config, device), args["dim"]).to(device)
    with torch.no_grad():
        reader.whiten(torch.cat([reader.read(item_texts(texts, items)) for items in _all_items(texts)]))
    return reader


def training_sessions(dataset: Dataset) -> Jagged:
    """Items of all training sessions, each with its target as the last one."""
    rows, lengths = [], []
    for raw in split_reader(dataset, "train", _ROWS, as_it_is).batches(0):
        targets = Jagged(raw.targets_B, torch.arange(len(raw.targets_B) + 1))
        sessions = Jagged.beside([Jagged(raw.items_L, raw.offsets_B1), targets])
        real = sessions.select(torch.nonzero(raw.weights_B > 0).flatten())
        rows.append(real.values)
        lengths.append(real.lengths)
    return Jagged.from_lengths(torch.cat(rows), torch.cat(lengths))


def train(reader: TextReader, texts: Jagged, sessions: Jagged, args: Mapping[str, Any]) -> float:
    """Trains a reader.

    Args:
        reader: Is left in eval mode.
        texts: Of the whole catalogue.
        sessions: From `training_sessions`.
        args: The settings.

    Returns:
        Mean loss of the last epoch, in nats.
    """
    generator = torch.Generator().manual_seed(args["seed"])
    torch.manual_seed(args["seed"])
    heads = [parameter for name, parameter in reader.named_parameters() if not name.startswith("decoder.")]
    groups = [{"params": list(reader.decoder.parameters()), "lr": args["lr"]}, {"params": heads, "lr": _HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)
    steps = args["epochs"] * -(-sessions.num_rows // args["batch_size"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    chance_V = _chances(sessions, texts.num_rows)
    bar = progress(steps, "train reader", "step")
    losses: list[float] = []
    reader.train()
    for _ in range(args["epochs"]):
        losses = []
        for rows in torch.randperm(sessions.num_rows, generator=generator).split(args["batch_size"]):
            loss = step_loss(reader, texts, sessions.select(rows), chance_V, args, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reader.parameters(), _CLIP_NORM)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
    bar.close()
    reader.eval()
    return float(np.mean(losses))


def step_loss(
    reader: TextReader,
    texts: Jagged,
    sessions: Jagged,
    chance_V: Tensor,
    args: Mapping[str, Any],
    generator: torch.Generator,
) -> Tensor:
    """Softmax loss of the next item after every click, over the batch's targets and items drawn beside them.

    Args:
        reader: The reader.
        texts: Of the whole catalogue.
        sessions: Items of each session, the last one a target only.
        chance_V: Share of each item among the targets.
        args: The settings.
        generator: Draws clicks, items and tokens.
    """
    shown = windows(sessions, args["clicks"] + 1, generator)
    starts, lengths = shown.offsets[:-1], shown.lengths - 1
    clicks, targets_L = shown.gather(starts, lengths), shown.gather(starts + 1, lengths).values
    drawn = torch.randperm(texts.num_rows, generator=generator)[: args["drawn_items"]]
    candidates_C = torch.cat([targets_L, drawn]).unique()
    share = min(args["drawn_items"] / texts.num_rows, 1.0)
    # Chance that an item is among the candidates, by either way (logQ correction).
    log_q_C = torch.log1p(-(1 - share) * (1 - chance_V[candidates_C]) ** targets_L.numel())
    queries_LD = reader.queries(drop_tokens(session_texts(texts, clicks), args["dropped_tokens"], generator))
    items_CD = reader.items(drop_tokens(item_texts(texts, candidates_C), args["dropped_tokens"], generator))
    device = queries_LD.device
    columns_L = torch.searchsorted(candidates_C, targets_L).to(device)
    weights_L = torch.ones(targets_L.numel(), device=device)
    return ranking_loss(queries_LD, items_CD, columns_L, weights_L, targets_L.numel(), 1, log_q_C.to(device))


class ReaderScores:
    """A trained reader as a baseline that scores items; see `Neighbours`.

    Args:
        reader: The reader.
        texts: Of the whole catalogue.
        clicks: Newest clicks of a session that are read.
    """

    def __init__(self, reader: TextReader, texts: Jagged, clicks: int) -> None:
        self._reader = reader.eval()
        self._texts = texts
        self._clicks = clicks
        with torch.no_grad():
            self._items_VD = torch.cat([reader.items(item_texts(texts, items)) for items in _all_items(texts)])

    @torch.no_grad()
    def scores(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """Scores of all items, [B, V]; none is absent."""
        sessions = newest(Jagged(torch.from_numpy(items_L), torch.from_numpy(offsets_B1)), self._clicks)
        queries_BD = self._reader.queries(last_places(session_texts(self._texts, sessions)))
        scores_BV = (queries_BD @ self._items_VD.T).float().cpu().numpy()
        rows, width = scores_BV.shape
        columns = np.tile(np.arange(width), rows)
        return sparse.csr_array((scores_BV.ravel(), columns, np.arange(rows + 1) * width), shape=scores_BV.shape)

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """The k best items of each session with their scores."""
        return top_k(self.scores(items_L, offsets_B1), k)


class PriorScores:
    """What a bundle's neighbours add, as a baseline that scores items; see `Neighbours`."""

    def __init__(self, prior: NeighbourPrior) -> None:
        self._prior = prior

    def scores(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """Scores of each session's items, [B, V]; absent ones are 0."""
        return self._prior.scores(Jagged(torch.from_numpy(items_L), torch.from_numpy(offsets_B1)))

    def rank(self, items_L: Ints, offsets_B1: Ints, k: int) -> tuple[Ints, Floats]:
        """The k best items of each session with their scores."""
        return top_k(self.scores(items_L, offsets_B1), k)


def judge(reader: ReaderScores, bundle: Bundle, dataset: Dataset) -> dict[str, Any]:
    """Quality on the test sessions, with the weight that the validation sessions choose."""
    neighbours: list[Neighbours] = [PriorScores(bundle.prior)] if bundle.prior else []

    def places_WS(split: str, weights: Sequence[float]) -> Places:
        sets = [(*[1.0] * len(neighbours), weight) for weight in weights]
        beside = [*neighbours, reader]
        return judge_model(bundle.model, dataset, split, bundle.config, bundle.catalogue, beside, sets)

    by_weight = METRICS["ndcg@20"](places_WS("valid", WEIGHTS)).mean(axis=1)
    weight = WEIGHTS[int(by_weight.argmax())]
    run_S, both_S = places_WS("test", (0.0, weight))
    ways = {RUN: run_S, ALONE: judge_baseline(reader, dataset, "test")[0], BOTH: both_S}
    return {
        "weight": weight,
        "validation ndcg@20 by weight": dict(zip(map(str, WEIGHTS), by_weight.tolist(), strict=True)),
        "test": {
            way: {
                name: {
                    "mean": float(metric(places_S).mean()),
                    "gain": vars(relative_gain([metric(places_S)], [metric(run_S)])),
                }
                for name, metric in METRICS.items()
            }
            for way, places_S in ways.items()
        },
    }


def table(results: Mapping[str, Any]) -> str:
    """What was measured, to read."""
    lines = [f"{'test sessions':16}" + "".join(f"{name:>10}{'gain over the run':>32}" for name in METRICS)]
    for way, metrics in results["test"].items():
        cells = []
        for values in metrics.values():
            gain = values["gain"]
            told = "" if way == RUN else f"{gain['mean']:+.1%} [{gain['low']:+.1%} .. {gain['high']:+.1%}]"
            cells.append(f"{values['mean']:>10.4f}{told:>32}")
        lines.append(f"{way:16}" + "".join(cells))
    lines.append(f"weight of the reader {results['weight']:g}; trained in {results['seconds']:.0f} s")
    return "\n".join(lines)


def _rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to zero."""
    warm = max(1, round(_WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def _chances(sessions: Jagged, num_items: int) -> Tensor:
    """Share of each item among the targets, which are all clicks but the first ones; half a click more for each."""
    is_target_S = torch.ones(sessions.values.numel(), dtype=torch.bool)
    is_target_S[sessions.offsets[:-1]] = False
    counts_V = torch.bincount(sessions.values[is_target_S], minlength=num_items) + 0.5
    return counts_V / counts_V.sum()


def _all_items(texts: Jagged) -> Iterator[Tensor]:
    yield from torch.arange(texts.num_rows).split(_ROWS)


if __name__ == "__main__":
    run_cli(main)
