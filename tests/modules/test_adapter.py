import torch

from llmgr_rec.modules.adapter import ProjectionAdapter


def make():
    torch.manual_seed(0)
    return ProjectionAdapter(d1=4, d2=6, embedding_norm=2.5)


def test_soft_tokens_stand_at_their_places_and_others_stay():
    adapter = make()
    tokens_XH, graph_CD, nodes_MD = torch.randn(6, 6), torch.randn(2, 4), torch.randn(3, 4)
    soft_rows = [0, 2, -1, 4, 3, 1]
    result = adapter(tokens_XH, torch.tensor(soft_rows), graph_CD, nodes_MD)
    soft_SH = adapter.project(graph_CD, nodes_MD)
    for place, soft in enumerate(soft_rows):
        assert torch.equal(result[place], tokens_XH[place] if soft < 0 else soft_SH[soft])


def test_graph_and_nodes_have_their_own_projection():
    adapter = make()
    same = torch.randn(1, 4)
    soft_SH = adapter.project(same, same)
    assert not torch.allclose(soft_SH[0], soft_SH[1])


def test_soft_tokens_have_the_embedding_norm_at_any_input_size():
    adapter = make()
    for size in (1e-3, 1e3):
        norms = adapter.project(size * torch.randn(2, 4), size * torch.randn(5, 4)).norm(dim=1)
        torch.testing.assert_close(norms, torch.full((7,), 2.5))


def test_gain_scales_and_zero_vectors_stay_zero():
    adapter = make()
    with torch.no_grad():
        adapter.log_gain_2.copy_(torch.tensor([0.0, 2.0]))
    soft_SH = adapter.project(torch.randn(1, 4), torch.cat([torch.randn(1, 4), torch.zeros(1, 4)]))
    torch.testing.assert_close(soft_SH.norm(dim=1), torch.tensor([2.5, 2.5 * torch.e**2, 0.0]))


def test_every_parameter_and_input_gets_gradient():
    adapter = make()
    graph_CD, nodes_MD = torch.randn(2, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    result = adapter(torch.zeros(4, 6), torch.tensor([0, 2, 1, -1]), graph_CD, nodes_MD)
    (result * torch.randn_like(result)).sum().backward()
    for tensor in (graph_CD, nodes_MD, *adapter.parameters()):
        assert tensor.grad.abs().sum() > 0


def test_result_has_the_type_of_the_token_embeddings():
    tokens_XH = torch.zeros(2, 6, dtype=torch.bfloat16)
    result = make()(tokens_XH, torch.tensor([0, -1]), torch.ones(1, 4), torch.ones(0, 4))
    assert result.dtype == torch.bfloat16
