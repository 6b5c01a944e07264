"""What text encodings know of the next click before anything is trained: by layer, weights and whitening.

```sh
python -m benchmarks.text_encodings --dataset PREPARED
```

An item's score is the cosine of its encoding with those of the clicks, newer clicks counting more, as in text-kNN and
item-kNN, which stand beside. Validation sessions are judged, over the whole catalogue.

Shapes: B sessions, V items, H columns of an encoding.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import benchmark_parser, set_threads, write_report
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.config import Config
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.recency import recency_weights
from llmgr_rec.distributed.assembly import assemble_decoder, item_tokens
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.baselines import DECAY
from llmgr_rec.evaluation.clicked import leaves_out_clicked
from llmgr_rec.evaluation.protocol import as_it_is, build_baseline, check_baselines, split_reader
from llmgr_rec.modules.language_model import encode_item_texts, standardise_encodings
from llmgr_rec.modules.whitening import whiten_encodings
from llmgr_rec.study.compare import hit_rate, ndcg
from llmgr_rec.study.judge import Places, judge_baseline, places

SPLIT = "valid"
BASELINES = ("item_knn", "text_knn")
CENTRED, WHITENED = "centred", "whitened"
_ENCODE_BATCH, _RANK_BATCH = 64, 512


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and measures."""
    parser = benchmark_parser("text_encodings", "Compares text encodings by what they know of the next click.")
    parser.add_argument("--dataset", type=str, required=True, help="Folder made by llmgr_rec.prepare.")
    parser.add_argument("--llm", type=str, default="smollm2", help="Language model, as llm.name_or_path.")
    parser.add_argument(
        "--layers", type=str, default="1,2,4", help="Decoder layers whose output encodes, one run each."
    )
    parser.add_argument("--max_text_tokens", type=int, default=24, help="Tokens kept of one item's text.")
    parser.add_argument("--random", type=bool, default=True, help="Measure weights that were never trained, too.")
    args = parse_args(parser, argv).as_dict()
    set_threads(args["threads"])
    dataset = Dataset(Path(args["dataset"]))
    catalogue = Catalogue.load(dataset.path)
    check_baselines(BASELINES, catalogue)
    layers = _numbers(args["layers"])
    results = {
        name: _quality(judge_baseline(build_baseline(name, dataset, catalogue), dataset, SPLIT)[0])
        for name in BASELINES
    }
    for is_random in (False, True) if args["random"] else (False,):
        for layer in layers:
            config = make_config(args["llm"], layer, args["max_text_tokens"], is_random)
            results |= measure(config, dataset, catalogue)
    print(table(results))
    write_report(args["output"], args, results)


def make_config(llm: str, layer: int, max_text_tokens: int, is_random: bool) -> Config:
    """Settings that make encodings of a layer."""
    config = Config()
    config.llm.name_or_path, config.llm.num_layers, config.llm.dtype = llm, layer, "float32"
    config.prompt.max_text_tokens = max_text_tokens
    config.controls.random_llm = is_random
    return config


def measure(config: Config, dataset: Dataset, catalogue: Catalogue) -> dict[str, dict[str, float]]:
    """Quality of one layer's encodings, centred and whitened."""
    started = time.monotonic()
    encodings_VH = encode(config, item_tokens(config, catalogue))
    seconds = time.monotonic() - started
    kind = "random" if config.controls.random_llm else "pre-trained"
    standardised = {CENTRED: standardise_encodings(encodings_VH), WHITENED: whiten_encodings(encodings_VH)}
    return {
        f"{kind}, layer {config.llm.num_layers}, {name}": {**_quality(rank(ready_VH, dataset)), "seconds": seconds}
        for name, ready_VH in standardised.items()
    }


@torch.no_grad()
def encode(config: Config, tokens: Jagged) -> Tensor:
    """Raw encodings of all items by the decoder of the settings, [V, H]."""
    return encode_item_texts(assemble_decoder(config, torch.device("cpu")), tokens, _ENCODE_BATCH)


def rank(encodings_VH: Tensor, dataset: Dataset) -> Places:
    """Place of each target by the cosine with the clicks; that of an item with itself is left out, as in text-kNN."""
    units_VH = functional.normalize(encodings_VH, dim=1)
    leave_out = leaves_out_clicked(dataset)
    found = []
    for weights_BV, targets_B in _sessions(dataset, units_VH.shape[0]):
        scores_BV = (weights_BV @ units_VH) @ units_VH.T - weights_BV
        if leave_out:
            scores_BV[weights_BV > 0] = float("-inf")
        found.append(places(scores_BV, targets_B))
    return torch.cat(found).int().numpy()


def _sessions(dataset: Dataset, num_items: int) -> Iterator[tuple[Tensor, Tensor]]:
    for raw in split_reader(dataset, SPLIT, _RANK_BATCH, as_it_is).batches(0):
        weights = recency_weights(raw.items_L.numpy(), raw.offsets_B1.numpy(), DECAY, num_items)
        real_B = raw.weights_B > 0
        yield torch.from_numpy(weights.toarray().astype(np.float32))[real_B], raw.targets_B[real_B]


def _quality(places_S: Places) -> dict[str, float]:
    return {"hr@20": float(hit_rate(places_S).mean()), "ndcg@20": float(ndcg(places_S).mean())}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What was measured, to read."""
    lines = [f"{'validation sessions':36}{'HR@20':>10}{'NDCG@20':>10}{'encoded in':>12}"]
    for name, values in results.items():
        seconds = f"{values['seconds']:.0f} s" if "seconds" in values else ""
        lines.append(f"{name:36}{values['hr@20']:>10.4f}{values['ndcg@20']:>10.4f}{seconds:>12}")
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"--layers is {text}; give numbers from 1 with commas between them, such as 1,2,4")
    return numbers


if __name__ == "__main__":
    run_cli(main)
