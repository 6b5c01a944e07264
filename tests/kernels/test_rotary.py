import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llmgr_rec.kernels.rotary import rotate


def test_result_and_gradient_are_those_of_transformers():
    torch.manual_seed(0)
    angles_YE = torch.randn(5, 4, dtype=torch.float64).repeat(1, 2)
    cos_YE, sin_YE = angles_YE.cos(), angles_YE.sin()
    heads_YhE = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(5, 3, 8, dtype=torch.float64)
    expected = apply_rotary_pos_emb(heads_YhE, heads_YhE, cos_YE, sin_YE, unsqueeze_dim=1)[0]
    found = rotate(heads_YhE, cos_YE, sin_YE)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((result * direction).sum(), heads_YhE)[0] for result in (found, expected)]
    torch.testing.assert_close(*gradients)
