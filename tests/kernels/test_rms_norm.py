import pytest
import torch

from llmgr_rec.kernels.rms_norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_result_and_gradient_are_those_of_torch(dtype):
    torch.manual_seed(0)
    inputs_XH, direction_XH = (torch.randn(7, 16, dtype=torch.float64) for _ in range(2))
    weight_H = torch.rand(16, dtype=torch.float64) + 0.5
    found = []
    for function, used in ((rms_norm, dtype), (lambda x, w, e: torch.rms_norm(x, (16,), w, e), torch.float64)):
        leaf = inputs_XH.to(used).requires_grad_()
        result = function(leaf, weight_H.to(used), 1e-5)
        assert result.dtype == used
        (gradient,) = torch.autograd.grad((result * direction_XH.to(used)).sum(), leaf)
        found.append((result.detach().double(), gradient.double()))
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=tolerance)
