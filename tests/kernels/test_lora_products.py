import pytest
import torch
from torch.nn import functional

from llmgr_rec.kernels.lora_products import LoraProduct, lora_products

INPUT, OUTPUTS, RANKS, SCALES = 6, (5, 3), (2, 4), (1.5, 0.5)


def reference(inputs_XI, dropped_XI, products):
    """Each layer in turn."""
    return tuple(
        functional.linear(inputs_XI, product.weight_OI, product.bias_O)
        + product.scale * (dropped_XI @ product.a_RI.T @ product.b_OR.T)
        for product in products
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_results_and_gradients_are_those_of_each_layer(count, dropout, bias):
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    products = [
        LoraProduct(
            draw(output, INPUT),
            draw(output) if bias else None,
            draw(rank, INPUT).requires_grad_(),
            draw(output, rank).requires_grad_(),
            scale,
        )
        for output, rank, scale in zip(OUTPUTS[:count], RANKS, SCALES, strict=False)
    ]
    inputs_XI, mask_XI = draw(7, INPUT).requires_grad_(), (draw(7, INPUT) > 0) * 2.0
    directions = [draw(7, output) for output in OUTPUTS[:count]]
    leaves = [inputs_XI, *(matrix for product in products for matrix in (product.a_RI, product.b_OR))]

    def gradients(results):
        total = sum((result * direction).sum() for result, direction in zip(results, directions, strict=True))
        return torch.autograd.grad(total, leaves, retain_graph=True)

    dropped_XI = inputs_XI * mask_XI if dropout else inputs_XI
    found = lora_products(inputs_XI, dropped_XI if dropout else None, products)
    expected = reference(inputs_XI, dropped_XI, products)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found), gradients(expected))


def test_an_input_without_gradient_and_matrices_of_another_format():
    product = LoraProduct(
        torch.ones(3, 2, dtype=torch.bfloat16), None, torch.ones(1, 2).requires_grad_(), torch.ones(3, 1), 0.5
    )
    (result_XO,) = lora_products(torch.ones(4, 2, dtype=torch.bfloat16), None, [product])
    assert torch.equal(result_XO, torch.full((4, 3), 3.0, dtype=torch.bfloat16))
    result_XO.sum().backward()
    assert product.a_RI.grad.dtype == torch.float32
    assert torch.equal(product.a_RI.grad, torch.full((1, 2), 6.0))
