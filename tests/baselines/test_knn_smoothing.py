"""kNN smoothing of cold items: the shares of the neighbors, and how much they count."""

import torch

from llmgr_rec.baselines.knn_smoothing import neighbor_weights, smooth_rows


def test_neighbors_share_by_their_squared_cosines():
    cosines_UN = torch.tensor([[0.8, 0.4, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 0.0]])
    expected_UN = torch.tensor([[0.8, 0.2, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(neighbor_weights(cosines_UN), expected_UN)


def test_rows_are_smoothed_the_more_the_fewer_clicks_an_item_has():
    generator = torch.Generator().manual_seed(1)
    rows_UC, near_UNC = torch.randn(6, 8, generator=generator), torch.randn(6, 2, 8, generator=generator)
    weights_UN = torch.tensor([[0.25, 0.75]] * 4 + [[0.0, 0.0]] * 2)
    count_U = torch.tensor([0, 1, 6, 10**9, 1, 0])
    smoothed_UC = smooth_rows(rows_UC, near_UNC, weights_UN, count_U, 2.0)
    mean_UC = 0.25 * near_UNC[:, 0] + 0.75 * near_UNC[:, 1]
    torch.testing.assert_close(smoothed_UC[0], mean_UC[0])
    torch.testing.assert_close(smoothed_UC[1], (rows_UC[1] + 2 * mean_UC[1]) / 3)
    torch.testing.assert_close(smoothed_UC[2], (6 * rows_UC[2] + 2 * mean_UC[2]) / 8)
    torch.testing.assert_close(smoothed_UC[3], rows_UC[3])
    assert torch.equal(smoothed_UC[4], rows_UC[4]), "no neighbors"
    assert not smoothed_UC[5].any(), "neither neighbors nor clicks"
