"""Reads a bundle by hand, without the code that is tested."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmgr_rec.storage.bundle_index import TENSOR, read_index


@dataclass
class Exported:
    """Everything in a bundle, by name."""

    tables: dict[str, Tensor]
    recommender: dict[str, Tensor]
    language: dict[str, Tensor]
    lora: dict[str, Tensor]

    @classmethod
    def read(cls, bundle: Path) -> "Exported":
        index = read_index(bundle)
        tables = {name: torch.full(shape, float("nan")) for name, shape in index.tables.items()}
        for name, pieces in index.table_files.items():
            for piece in pieces:
                rows, cols = slice(piece.row, piece.row + piece.rows), slice(piece.col, piece.col + piece.cols)
                tables[name][rows, cols] = load_file(bundle / piece.file)[TENSOR]
        assert not any(value.isnan().any() for value in tables.values())
        language, lora = bundle / "llmgr.safetensors", bundle / "lora" / "adapter_model.safetensors"
        return cls(
            tables,
            load_file(bundle / "recommender.safetensors"),
            load_file(language) if language.exists() else {},
            # Each weight has a second name, in the causal language model around the decoder.
            {name: value for name, value in load_file(lora).items() if not name.startswith("base_model.model.model.")}
            if lora.exists()
            else {},
        )
