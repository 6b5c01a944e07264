"""Similarity of node vectors before and after hybrid encoding: after the projection, and after the language model.

```sh
python -m benchmarks.hybrid_encoding --run RUN
```

Each item is the only node of a prompt. Its node vector is compared with its soft token, and with the language model's
hidden state at that token: by linear CKA, and by the share of common nearest neighbors. The same is measured for an
untrained projection, and for rows in random order, the chance level.

Shapes: N items, B sessions of one click each, D = d1 columns, H = d2 hidden width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import benchmark_parser, set_threads, write_report
from benchmarks.similarity import MIN_ITEMS, half_samples, interval, linear_cka, shared_neighbors
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.config import StageName
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.errors import UserError
from llmgr_rec.modules.adapter import ProjectionAdapter
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.prompts import CompiledPrompt, prompt_nodes
from llmgr_rec.modules.recommender import RecommenderOutput
from llmgr_rec.paths import LocalPath
from llmgr_rec.storage.bundle import Bundle, load_bundle
from llmgr_rec.storage.bundle_index import is_complete

STAGES: tuple[StageName, ...] = ("align", "behave")
PROJECTED, RANDOM = "after projection", "after random projection"
ENCODED, ENCODED_RANDOM = "after language model", "after language model, random projection"
SHUFFLED = "shuffled rows (chance)"
VARIANTS = (PROJECTED, RANDOM, ENCODED, ENCODED_RANDOM, SHUFFLED)
_RESAMPLES = 500
_BATCH = 256
_COLORS = ("#2b6cb0", "#d2552d")


@dataclass(frozen=True)
class Similarity:
    """One measure of the similarity of two sets of vectors, with its 95 % interval over items.

    Args:
        mean: Over all items.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:z.3f} [{self.low:z.3f} .. {self.high:z.3f}]"


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("hybrid_encoding", "Compares node vectors before and after hybrid encoding.", "--run run")
    parser.add_argument("--run", type=LocalPath, required=True, help="Run folder made by llmgr_rec.train.")
    parser.add_argument(
        "--items", type=int, default=2000, help="Most items compared, drawn from those with training clicks."
    )
    parser.add_argument("--neighbors", type=str, default="10,50", help="Numbers of nearest neighbors compared.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the sample of items and of the random projection.")
    args = parse_args(parser, argv).as_dict()
    set_threads(args["threads"])
    counts = _numbers(args["neighbors"])
    stages = [stage for stage in STAGES if is_complete(Path(args["run"]) / "export" / stage)]
    if not stages:
        raise UserError(f"{args['run']} has no finished stage {' or '.join(STAGES)}; train one with llmgr_rec.train")
    results: dict[str, Any] = {}
    for stage in stages:
        bundle = load_bundle(Path(args["run"]) / "export" / stage, dtype="float32")
        items_N = choose_items(bundle.catalog, args["items"], max(counts), args["seed"])
        vectors = encode(bundle, items_N, args["seed"])
        results[stage] = {"items": len(items_N), "variants": compare(vectors, counts, args["seed"])}
    print(table(results))
    write_report(args["output"], args, results)
    file = Path(args["output"]).with_suffix(".svg")
    plot(results, file)
    print(f"written: {file}")


def choose_items(catalog: Catalog, most: int, neighbors: int, seed: int) -> Tensor:
    """Items to compare, [N], in ascending order. Items without training clicks, whose id rows are random, are left out.

    Args:
        catalog: The items.
        most: Largest number of items.
        neighbors: Largest number of nearest neighbors compared.
        seed: Seed of the sample.

    Raises:
        UserError: There are too few items.
    """
    trained = torch.nonzero(catalog.train_count_V > 0).flatten()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(trained)))
    items_N = trained[order[:most]].sort().values
    fewest = max(MIN_ITEMS, neighbors + 2)
    if len(items_N) < fewest:
        raise UserError(
            f"{len(items_N)} items to compare, of {len(trained)} with training clicks, are too few for {neighbors} "
            f"neighbors, which need {fewest}; raise --items or lower --neighbors"
        )
    return items_N


@torch.no_grad()
def encode(bundle: Bundle, items_N: Tensor, seed: int) -> dict[str, Tensor]:
    """Vectors of the items before hybrid encoding, under `before`, and after it in each variant; one row per item.

    Args:
        bundle: Bundle of stage align or behave.
        items_N: Items.
        seed: Seed of the random projection and of the shuffled rows.

    Raises:
        UserError: The bundle has no language model, or its prompts show no nodes.
    """
    model = bundle.model
    if not isinstance(model, LLMGR):
        raise UserError(f"{bundle.path} has no language model; give a run with stage {' or '.join(STAGES)}")
    prompt = model.prompts["behave"]
    if not isinstance(prompt, CompiledPrompt) or "nodes" not in prompt.segments:
        raise UserError(f"template behave of {bundle.path} has no {{nodes}}; give a run whose prompts show nodes")
    adapters = {PROJECTED: model.adapter, RANDOM: untrained_adapter(model.adapter, seed)}
    states = {PROJECTED: ENCODED, RANDOM: ENCODED_RANDOM}
    parts: dict[str, list[Tensor]] = {name: [] for name in ("before", *VARIANTS[:-1])}
    for items_B in items_N.split(_BATCH):
        batch = bundle.collate(single_clicks(items_B))
        output = model.look_up(batch)
        parts["before"].append(node_vectors(model, output, batch))
        for variant, adapter in adapters.items():
            parts[variant].append(adapter.project(output.sessions_BD, parts["before"][-1])[len(items_B) :])
            parts[states[variant]].append(node_states(model, adapter, output, batch))
    vectors = {name: torch.cat(found) for name, found in parts.items()}
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(items_N)))
    return vectors | {SHUFFLED: vectors["before"][order]}


def untrained_adapter(trained: ProjectionAdapter, seed: int) -> ProjectionAdapter:
    """An adapter of the same shape, as before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ProjectionAdapter(trained.nodes.in_features, trained.nodes.out_features, float(trained.embedding_norm))


def single_clicks(items_B: Tensor) -> RawSessions:
    """One session per item, whose only click it is."""
    count = len(items_B)
    return RawSessions(
        items_L=items_B,
        offsets_B1=torch.arange(count + 1),
        targets_B=torch.full((count,), -1),
        weights_B=torch.ones(count),
        rows_B=torch.arange(count),
        global_size=count,
    )


def node_vectors(model: LLMGR, output: RecommenderOutput, batch: SessionBatch) -> Tensor:
    """Vector that is projected to the node token of each session of one click, [B, D]."""
    nodes = prompt_nodes(batch.graph, model.node_order, model.max_nodes)
    vectors_ND = output.rows_ND if model.node_source == "table" else output.states_ND
    return vectors_ND.index_select(0, nodes.values)


def node_states(model: LLMGR, adapter: ProjectionAdapter, output: RecommenderOutput, batch: SessionBatch) -> Tensor:
    """Hidden state of the language model at the node token of each session of one click, [B, H].

    Args:
        model: Its language model and the prompt of stage behave are used.
        adapter: Makes the soft tokens.
        output: From the model's `look_up`.
        batch: The same sessions.
    """
    nodes = prompt_nodes(batch.graph, model.node_order, model.max_nodes)
    packed = model.prompts("behave", nodes, batch.text_tokens)
    embeddings_XH = adapter(
        model.language_model.token_embedding(packed.token_ids_X),
        packed.soft_rows_X,
        output.sessions_BD,
        node_vectors(model, output, batch),
    )
    # Rows of graph tokens come first, one per session.
    node_tokens_B = torch.nonzero(packed.soft_rows_X >= batch.num_sessions).flatten()
    states_BH: Tensor = model.language_model(embeddings_XH, replace(packed, output_token_C=node_tokens_B))
    return states_BH


def compare(vectors: Mapping[str, Tensor], counts: Sequence[int], seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Similarity of vectors before and after hybrid encoding, by variant and measure, with 95 % intervals over items.

    Args:
        vectors: From `encode`.
        counts: Numbers of nearest neighbors.
        seed: Seed of the half-samples.
    """
    before_ND = vectors["before"]
    halves_RN = half_samples(len(before_ND), _RESAMPLES, seed)
    found = {}
    for variant in VARIANTS:
        after_NH = vectors[variant]
        spread = interval(linear_cka(before_ND, after_NH, halves_RN).numpy())
        measures = {"cka": Similarity(float(linear_cka(before_ND, after_NH)), *spread)}
        for k in counts:
            share_N = shared_neighbors(before_ND, after_NH, k)
            means_R = halves_RN @ share_N / halves_RN.sum(1)
            measures[f"overlap@{k}"] = Similarity(float(share_N.mean()), *interval(means_R.numpy()))
        found[variant] = {name: asdict(similarity) for name, similarity in measures.items()}
    return found


def table(results: Mapping[str, Any]) -> str:
    """The results as text."""
    measures = _measures(results)
    lines = [f"{'node vectors before, and':48}{''.join(f'{name:>26}' for name in measures)}"]
    for stage, found in results.items():
        lines.append(f"stage {stage}, {found['items']:,} items")
        for variant, values in found["variants"].items():
            cells = "".join(f"{Similarity(**values[name])!s:>26}" for name in measures)
            lines.append(f"  {variant:46}{cells}")
    return "\n".join(lines)


def plot(results: Mapping[str, Any], file: Path) -> None:
    """Draws an SVG file with a panel for each measure, a row for each variant and a color for each stage."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    measures = _measures(results)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "hybrid-encoding"}
    with rc_context(style):
        figure = Figure(figsize=(3 + 2.6 * len(measures), 3))
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for panel, measure in zip(panels, measures, strict=True):
            for number, (stage, found) in enumerate(results.items()):
                values = [Similarity(**found["variants"][variant][measure]) for variant in VARIANTS]
                means = [value.mean for value in values]
                below = [max(value.mean - value.low, 0.0) for value in values]
                above = [max(value.high - value.mean, 0.0) for value in values]
                rows = [len(VARIANTS) - 1 - row + 0.2 * (0.5 - number) for row in range(len(VARIANTS))]
                color = _COLORS[number % len(_COLORS)]
                panel.errorbar(means, rows, xerr=[below, above], fmt="o", markersize=4, color=color, label=stage)
            panel.set_xlim(-0.05, 1.05)
            panel.set_title(measure, loc="left", fontsize=10)
            panel.grid(color="#e6e9ed", axis="x")
        panels[0].set_yticks(range(len(VARIANTS)), VARIANTS[::-1])
        panels[0].legend(frameon=False, title="after stage")
        figure.supxlabel("similarity to the node vectors before projection, with 95 % interval", fontsize=9)
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None})


def _measures(results: Mapping[str, Any]) -> list[str]:
    return list(next(iter(results.values()))["variants"][PROJECTED])


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(word) for word in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise UserError(f"--neighbors is {text}; give numbers from 1 with commas between them, such as 10,50")
    return numbers


if __name__ == "__main__":
    run_cli(main)
