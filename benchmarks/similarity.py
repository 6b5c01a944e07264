"""Similarity of two sets of vectors of the same items: CKA, shared neighbors, and intervals of both over items.

Shapes: N items, D and H columns of the two sets, R half-samples.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Fewest items of a half-sample: the unbiased estimate divides by their number less 3.
_FEWEST = 4
MIN_ITEMS = 2 * _FEWEST
# Ends of the 95 % interval.
_TAILS = (2.5, 97.5)
# Squared HSIC, of vectors of root mean square length 1, below which they are all the same but for rounding.
_NO_VARIANCE = 1e-20


def linear_cka(first_ND: Tensor, second_NH: Tensor, halves_RN: Tensor | None = None) -> Tensor:
    """Linear centered kernel alignment: 1 where one set is a rotation and scaling of the other, 0 where unrelated.

    CKA is that of Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited". HSIC in it is the
    unbiased estimate of Song et al. 2012, "Feature Selection via Dependence Maximization": the plain estimate is
    large for few items and many columns, whatever their vectors are.

    Args:
        first_ND: Vectors.
        second_NH: Other vectors of the same items.
        halves_RN: Items of each sample as 0 or 1, one row per value; None takes all items.

    Returns:
        Values from -1 to 1, float64 [R], [1] without halves; 0 where a set has no variance.
    """
    ones_RN = torch.ones(1, first_ND.shape[0], dtype=torch.float64) if halves_RN is None else halves_RN
    first_NN, second_NN = _gram(first_ND), _gram(second_NH)
    products_R = _hsic(first_NN, first_NN, ones_RN) * _hsic(second_NN, second_NN, ones_RN)
    shared_R = _hsic(first_NN, second_NN, ones_RN)
    return torch.where(products_R > _NO_VARIANCE, shared_R / products_R.clamp(min=_NO_VARIANCE).sqrt(), 0.0)


def _gram(vectors_ND: Tensor) -> Tensor:
    """Products of different items, [N, N], of vectors that are scaled to length 1 on average and centered.

    HSIC centers by itself; centering here as well keeps a large common part from costing precision.
    """
    vectors_ND = vectors_ND.double()
    length = vectors_ND.square().sum(1).mean().sqrt().clamp(min=1e-30)
    centered_ND = (vectors_ND - vectors_ND.mean(0)) / length
    return (centered_ND @ centered_ND.T).fill_diagonal_(0)


def _hsic(first_NN: Tensor, second_NN: Tensor, ones_RN: Tensor) -> Tensor:
    """Unbiased HSIC of the items of each row, [R]: the kernels have zero diagonals."""
    size_R = ones_RN.sum(1)
    first_RN, second_RN = ones_RN @ first_NN, ones_RN @ second_NN
    both_R = ((ones_RN @ (first_NN * second_NN)) * ones_RN).sum(1)
    sums_R = (first_RN * ones_RN).sum(1) * (second_RN * ones_RN).sum(1) / ((size_R - 1) * (size_R - 2))
    cross_R = 2 * (first_RN * second_RN * ones_RN).sum(1) / (size_R - 2)
    return (both_R + sums_R - cross_R) / (size_R * (size_R - 3))


def shared_neighbors(first_ND: Tensor, second_NH: Tensor, k: int) -> Tensor:
    """Share of an item's nearest neighbors by cosine that are its nearest in both sets, float64 [N].

    Args:
        first_ND: Vectors.
        second_NH: Other vectors of the same items.
        k: Neighbors; an item is none of its own. By chance k / (N - 1) of them are shared.
    """
    both_NN = _nearest(first_ND, k) & _nearest(second_NH, k)
    return both_NN.sum(1).double() / k


def _nearest(vectors_ND: Tensor, k: int) -> Tensor:
    """Whether a column's item is among the nearest of a row's, [N, N]."""
    units_ND = functional.normalize(vectors_ND.double(), dim=1)
    cosines_NN = (units_ND @ units_ND.T).fill_diagonal_(-torch.inf)
    nearest_NN = torch.zeros_like(cosines_NN, dtype=torch.bool)
    return nearest_NN.scatter_(1, cosines_NN.topk(k, dim=1).indices, True)


def half_samples(count: int, resamples: int, seed: int) -> Tensor:
    """Random halves of the items, in place of the bootstrap's samples with repeats.

    A mean varies as much between halves drawn without repeats as the bootstrap says (Efron 1982, "The Jackknife, the
    Bootstrap and Other Resampling Plans", on half-sampling). Repeated items would be their own neighbors, which
    would overstate the similarity.

    Args:
        count: Items, `MIN_ITEMS` or more.
        resamples: Halves R.
        seed: Of the draws.

    Returns:
        1 where an item is in a half, else 0, float64 [R, N].
    """
    order_RN = np.random.default_rng(seed).random((resamples, count)).argsort(axis=1)
    halves_RN = torch.zeros(resamples, count, dtype=torch.float64)
    return halves_RN.scatter_(1, torch.from_numpy(order_RN[:, : count // 2]), 1.0)


def interval(values_R: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of a quantity from its values over half-samples."""
    low, high = np.percentile(values_R, _TAILS)
    return float(low), float(high)
