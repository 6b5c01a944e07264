"""Recommends with an exported program: needs torch and pyarrow, and nothing of llmgr_rec.

python serve_exported.py model.pt2 '[["pen", "ink"], []]'
"""

import json
import sys
from itertools import accumulate

import pyarrow.parquet as pq
import torch

file, sessions = sys.argv[1], json.loads(sys.argv[2])
ids = pq.read_table(file.removesuffix(".pt2") + ".items.parquet")["item_id"].to_pylist()
index_of = {item: index for index, item in enumerate(ids)}
rank = torch.export.load(file).module()
clicks = torch.tensor([index_of.get(item, -1) for session in sessions for item in session], dtype=torch.int64)
offsets = torch.tensor([0, *accumulate(map(len, sessions))])
with torch.no_grad():
    ranked, scores, fallback = rank(clicks, offsets)
for row, row_scores, is_fallback in zip(ranked.tolist(), scores.tolist(), fallback.tolist(), strict=True):
    found = [(ids[item], score) for item, score in zip(row, row_scores, strict=True) if item >= 0]
    print(json.dumps({"items": found, "fallback": is_fallback}))
