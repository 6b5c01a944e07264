"""CKA and shared neighbors: what they must say of sets whose likeness is known, and intervals that hold it."""

from itertools import permutations

import numpy as np
import pytest
import torch

from benchmarks.similarity import half_samples, interval, linear_cka, shared_neighbors


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_rotation_scale_and_shift_of_all_leave_sets_alike(seed):
    vectors_ND = draw(40, 6, seed=seed) + 3
    into_DH = torch.linalg.qr(draw(9, 9, seed=seed + 50)).Q[:6]
    turned_NH = 7.5 * vectors_ND @ into_DH
    assert linear_cka(vectors_ND, turned_NH + draw(9, seed=1)).item() == pytest.approx(1)
    assert shared_neighbors(vectors_ND, turned_NH, 5).eq(1).all()
    assert shared_neighbors(vectors_ND, vectors_ND, 5).eq(1).all()
    assert linear_cka(vectors_ND, -turned_NH).item() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(5))
def test_both_are_symmetric_and_within_their_bounds(seed):
    first_ND, second_NH = draw(30, 4, seed=seed), draw(30, 8, seed=seed + 20)
    second_NH[:, :4] += first_ND
    cka = linear_cka(first_ND, second_NH)
    assert 0.1 < cka < 1
    assert torch.allclose(cka, linear_cka(second_NH, first_ND))
    share_N = shared_neighbors(first_ND, second_NH, 6)
    assert 0.2 < share_N.mean() < 1
    assert torch.equal(share_N, shared_neighbors(second_NH, first_ND, 6))


def test_rows_in_random_order_are_alike_by_chance_only():
    vectors_ND = draw(200, 16)
    ckas, shares = [], []
    for seed in range(20):
        order_N = torch.from_numpy(np.random.default_rng(seed).permutation(200))
        ckas.append(linear_cka(vectors_ND, vectors_ND[order_N]).item())
        shares.append(shared_neighbors(vectors_ND, vectors_ND[order_N], 10).mean().item())
    assert np.mean(ckas) == pytest.approx(0, abs=0.01)
    assert np.mean(shares) == pytest.approx(10 / 199, abs=0.005)


def test_few_items_and_many_columns_are_not_alike_for_that():
    ckas = [linear_cka(draw(20, 300, seed=seed), draw(20, 300, seed=99 - seed)).item() for seed in range(20)]
    assert np.mean(ckas) == pytest.approx(0, abs=0.1)


def test_cka_is_built_from_the_definition_of_unbiased_hsic():
    first_ND, second_NH = draw(6, 3), draw(6, 2, seed=1)
    second_NH += first_ND[:, :2]

    def hsic(one_NN, other_NN):
        terms = [
            one_NN[i, j] * (other_NN[i, j] + other_NN[q, r] - 2 * other_NN[i, q])
            for i, j, q, r in permutations(range(6), 4)
        ]
        return torch.stack(terms).mean()

    one_NN, other_NN = first_ND @ first_ND.T, second_NH @ second_NH.T
    expected = hsic(one_NN, other_NN) / (hsic(one_NN, one_NN) * hsic(other_NN, other_NN)).sqrt()
    assert linear_cka(first_ND, second_NH).item() == pytest.approx(expected.item())


def test_cka_of_halves_is_that_of_their_items_alone():
    first_ND, second_NH = draw(30, 4) + 5, draw(30, 8, seed=1)
    second_NH[:, :4] += first_ND
    halves_RN = half_samples(30, 7, seed=0)
    alone = [linear_cka(first_ND[half_N > 0], second_NH[half_N > 0]).item() for half_N in halves_RN]
    np.testing.assert_allclose(linear_cka(first_ND, second_NH, halves_RN), alone)


def test_vectors_all_the_same_are_like_nothing():
    same_ND = torch.full((20, 3), 1.7)
    assert linear_cka(same_ND, draw(20, 3)).item() == 0
    assert linear_cka(draw(20, 3), torch.zeros(20, 3)).item() == 0


def test_halves_hold_half_of_the_items_and_differ():
    halves_RN = half_samples(21, 50, seed=0)
    assert halves_RN.sum(1).eq(10).all()
    assert len(halves_RN.unique(dim=0)) == 50
    assert torch.equal(halves_RN, half_samples(21, 50, seed=0))


def test_an_interval_of_a_mean_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    halves_RN = half_samples(200, 500, seed=0)
    inside = 0
    for _ in range(200):
        means_R = halves_RN @ torch.from_numpy(rng.normal(0.3, 1, 200)) / halves_RN.sum(1)
        low, high = interval(means_R.numpy())
        inside += low <= 0.3 <= high
    assert 180 <= inside <= 199


def test_an_interval_of_cka_holds_that_of_very_many_items():
    mix_DH = draw(4, 8, seed=5)

    def sets(count, seed):
        first_ND = draw(count, 4, seed=seed)
        return first_ND, first_ND @ mix_DH + draw(count, 8, seed=seed + 1)

    truth = linear_cka(*sets(3000, seed=1000)).item()
    halves_RN = half_samples(150, 300, seed=0)
    inside = 0
    for seed in range(0, 100, 2):
        low, high = interval(linear_cka(*sets(150, seed), halves_RN).numpy())
        inside += low <= truth <= high
    assert 42 <= inside <= 50
