"""Whitening: what it makes of encodings, and how little it dares with few of them."""

import pytest
import torch

from llmgr_rec.modules.whitening import whiten_encodings, whitening_map


def skewed(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Encodings with a common direction and variances from 1 to 0.01."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    scales = torch.logspace(0, -1, width)
    return torch.randn(rows, width, generator=generator) * scales @ mixing + 5.0


def test_many_encodings_come_out_white():
    whitened_VH = whiten_encodings(skewed(20_000, 8)).double()
    covariance_HH = whitened_VH.T @ whitened_VH / len(whitened_VH)
    torch.testing.assert_close(covariance_HH, torch.eye(8).double() / 8, atol=5e-3, rtol=0)
    assert whitened_VH.mean(dim=0).abs().max() < 1e-6


def test_few_encodings_are_hardly_reshaped():
    """Noise of equal variances looks uneven in ten draws; whitening it would make all items equally unlike."""
    generator = torch.Generator().manual_seed(0)
    encodings_VH = torch.randn(10, 64, generator=generator)
    centred_VH = encodings_VH - encodings_VH.mean(dim=0)
    cosine = torch.nn.functional.cosine_similarity(whiten_encodings(encodings_VH), centred_VH, dim=1)
    assert cosine.min() > 0.99


def test_the_shrinkage_is_that_of_ledoit_and_wolf():
    encodings_VH = skewed(40, 12).double()
    centred_VH = encodings_VH - encodings_VH.mean(dim=0)
    covariance_HH = centred_VH.T @ centred_VH / 40
    variance = covariance_HH.trace() / 12
    spread = (covariance_HH - variance * torch.eye(12)).square().sum()
    errors = [(torch.outer(row, row) - covariance_HH).square().sum() for row in centred_VH]
    share = min(1.0, float(sum(errors) / 40**2 / spread))
    shrunk_HH = (1 - share) * covariance_HH + share * variance * torch.eye(12)
    map_HH = whitening_map(covariance_HH, float(centred_VH.square().sum(1).square().mean()), 40)
    product_HH = map_HH @ shrunk_HH @ map_HH
    assert 0.0 < share < 1.0
    torch.testing.assert_close(product_HH / product_HH[0, 0], torch.eye(12).double(), atol=1e-6, rtol=0)


def test_items_without_text_stay_at_zero_and_out_of_the_statistics():
    encodings_VH = skewed(300, 8)
    sparse_VH = torch.zeros(400, 8)
    sparse_VH[::4] = 0
    rows = torch.arange(400)[torch.arange(400) % 4 != 0]
    sparse_VH[rows] = encodings_VH
    whitened_VH = whiten_encodings(sparse_VH)
    torch.testing.assert_close(whitened_VH[rows], whiten_encodings(encodings_VH))
    assert not whitened_VH[::4].any()
    assert whitened_VH[rows].square().sum(dim=1).mean().sqrt() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("encodings_VH", [torch.zeros(3, 4), torch.ones(3, 4), torch.ones(1, 4)])
def test_encodings_without_variance_come_out_as_zeros(encodings_VH):
    assert not whiten_encodings(encodings_VH).any()
