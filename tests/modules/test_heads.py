"""Heads: what their scores are made of, where they start, and that each of their weights learns."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmgr_rec.config import HeadConfig
from llmgr_rec.modules.heads import LinearHead, TiedHead

D1, D2, B, C = 16, 48, 32, 60


def inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        # Hidden states of real language models are far from unit size.
        "hidden": draw(B, D2) * 30 + 5,
        "recommender_queries": functional.normalize(draw(B, D1), dim=1) / 0.07,
        "item_rows": functional.normalize(draw(C, D1), dim=1),
        "rows": draw(C, D1) * 0.1,
        "text": draw(C, D2) * 7,
        "ids": torch.randperm(C, generator=generator),
    }


def tied(text: bool, residual: bool) -> TiedHead:
    return TiedHead(HeadConfig(item_text=text, residual=residual, separate_loss=False), D1, D2, C)


def linear(residual: bool) -> LinearHead:
    return LinearHead(HeadConfig(name="linear", residual=residual, separate_loss=False), D1, D2, C)


def scores(head: TiedHead | LinearHead, x: dict[str, Tensor]) -> Tensor:
    return (
        head.queries(x["hidden"], x["recommender_queries"])
        @ head.items(x["item_rows"], x["rows"], head.standardize(x["text"]), x["ids"]).T
    )


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_tied_scores_are_the_sum_of_their_parts(text: bool, residual: bool) -> None:
    torch.manual_seed(0)
    head, x = tied(text, residual), inputs()
    queries = standardized(x["hidden"]) @ head.query.weight.T + head.query.bias
    items = functional.normalize(x["rows"], dim=1)
    if text:
        items = items + standardized(x["text"]) @ head.text.weight.T
    expected = head.log_scale.exp() * queries @ items.T
    if residual:
        expected = expected + x["recommender_queries"] @ x["item_rows"].T
    torch.testing.assert_close(scores(head, x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_linear_scores_are_the_sum_of_their_parts(residual: bool) -> None:
    torch.manual_seed(0)
    head, x = linear(residual), inputs()
    torch.nn.init.normal_(head.bias_V)
    expected = standardized(x["hidden"]) @ head.weight_VH[x["ids"]].T + head.bias_V[x["ids"]]
    if residual:
        expected = expected + x["recommender_queries"] @ x["item_rows"].T
    torch.testing.assert_close(scores(head, x), expected, rtol=0, atol=1e-5)


def test_linear_head_without_ids_takes_the_whole_catalog() -> None:
    head, x = linear(True), inputs()
    whole = head.items(x["item_rows"], x["rows"], None, None)
    torch.testing.assert_close(whole, head.items(x["item_rows"], x["rows"], None, torch.arange(C)))


@pytest.mark.parametrize("kind", ["tied", "linear"])
def test_a_residual_head_starts_from_the_recommenders_ranking(kind: str) -> None:
    torch.manual_seed(0)
    head = tied(True, True) if kind == "tied" else linear(True)
    x = inputs()
    recommender = x["recommender_queries"] @ x["item_rows"].T
    added = scores(head, x) - recommender
    assert 0.02 < added.std() < 0.3
    assert torch.corrcoef(torch.stack([scores(head, x).flatten(), recommender.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("kind", ["tied", "linear"])
@pytest.mark.parametrize("residual", [False, True])
def test_every_weight_gets_gradient(kind: str, residual: bool) -> None:
    head = tied(True, residual) if kind == "tied" else linear(residual)
    functional.cross_entropy(scores(head, inputs()), torch.arange(B)).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["tied", "linear"])
def test_a_head_learns_beside_a_recommender_that_is_wrong(kind: str) -> None:
    torch.manual_seed(0)
    head = tied(True, True) if kind == "tied" else linear(True)
    x, targets = inputs(), torch.arange(B)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        functional.cross_entropy(scores(head, x), targets).backward()
        optimizer.step()
    hits = (scores(head, x).argmax(1) == targets).float().mean()
    assert hits > 0.9


def test_a_tied_head_with_text_asks_for_text() -> None:
    head, x = tied(True, False), inputs()
    with pytest.raises(ValueError, match="text"):
        head.items(x["item_rows"], x["rows"], None, x["ids"])


def test_tied_head_has_no_weight_for_an_item() -> None:
    assert all(C not in parameter.shape for parameter in tied(True, True).parameters())


def test_half_precision_hidden_states_are_accepted() -> None:
    head, x = tied(True, True), inputs()
    x["hidden"], x["text"] = x["hidden"].bfloat16(), x["text"].bfloat16()
    assert scores(head, x).dtype == torch.float32
