"""A layer norm over some channels, however much of its call a graph leaves out."""

import pytest
import torch

from pysolve.nn.cut.norms import norm_over

D, KEPT = 6, torch.tensor([0, 2, 5])


@pytest.mark.parametrize("left_out", [0, 1, 2, 3])
def test_what_is_left_out_is_the_default(left_out):
    torch.manual_seed(0)
    x, weight = torch.randn(4, D), torch.randn(D)
    bias = None if left_out > 1 else torch.randn(D)
    args = (x, (D,), weight, bias, 1e-5, True)
    masked = torch.zeros_like(x).index_copy(-1, KEPT, x.index_select(-1, KEPT))
    masked -= masked.sum(-1, keepdim=True) / len(KEPT) * torch.zeros(D).index_fill(0, KEPT, 1)
    variance = masked.square().mean(-1, keepdim=True)
    wanted = masked / (variance + 1e-5).sqrt() * weight + (0 if bias is None else bias)
    made = norm_over(KEPT, args[: len(args) - left_out])
    torch.testing.assert_close(made[:, KEPT], wanted[:, KEPT])
    assert not made[:, [1, 3, 4]].any()
