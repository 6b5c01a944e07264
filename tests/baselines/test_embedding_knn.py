"""Embedding-kNN against plain loops, and on items without text."""

import numpy as np
import pytest
import torch

from llmgr_rec.baselines import embedding_knn
from llmgr_rec.baselines.embedding_knn import EmbeddingKNN, whiten


def test_its_neighbors_are_those_of_a_plain_loop_over_whitened_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_knn, "_BLOCK_ITEMS", 7)
    embeddings_VH = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9) + 5
    # 28 texts are enough for 3 directions.
    embeddings_VH[[3, 17]] = 0
    has_text = [item for item in range(30) if item not in (3, 17)]
    plain = embeddings_VH[has_text].double().numpy()
    _, deviations, directions = np.linalg.svd((plain - plain.mean(0)) / np.sqrt(len(plain)), full_matrices=False)
    whitened = ((plain - plain.mean(0)) @ directions.T / (deviations + 0.02 * deviations[0]))[:, :3]
    whitened /= np.linalg.norm(whitened, axis=1, keepdims=True)
    expected = np.zeros((30, 30))
    for row, item in enumerate(has_text):
        cosines = [(float(whitened[row] @ whitened[other]), has_text[other]) for other in range(len(plain))]
        for cosine, other in sorted((pair for pair in cosines if pair[1] != item), reverse=True)[:5]:
            expected[item, other] = max(cosine, 0.0)
    found = EmbeddingKNN(embeddings_VH, k_neighbors=5).similarity_VV
    np.testing.assert_allclose(found.toarray(), expected, atol=1e-5)
    assert found.nnz == np.count_nonzero(expected)


def test_whitened_directions_vary_alike_and_equal_texts_have_no_neighbors() -> None:
    spread = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([9.0, 3, 1, 1]))
    assert torch.cov(whiten(spread).T).diagonal().numpy() == pytest.approx([0.8, 0.8, 0.9, 0.96], abs=0.1)
    for embeddings_VH in (torch.ones(4, 3), torch.zeros(4, 3), torch.ones(1, 3), torch.zeros(0, 3)):
        assert EmbeddingKNN(embeddings_VH, k_neighbors=2).similarity_VV.nnz == 0
