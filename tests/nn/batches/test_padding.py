"""What stands in padding changes nothing: no sum, no choice, no refit, no divergence, no loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import pysolve as ps
from pysolve.nn.batches.padding import mask_of_rows, output_mask, token_masks
from pysolve.nn.divergence import kl_divergence, mean_divergence


class Masked(nn.Module):
    """Predicts tokens from all real ones."""

    def __init__(self, width=12, flat=False):
        super().__init__()
        self.flat = flat
        self.words = nn.Embedding(11, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2, self.head = nn.Linear(width, 24), nn.Linear(24, width), nn.Linear(width, 11)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids)
        mask = attention_mask[:, None, :].bool()
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=mask))
        rows = x.flatten(0, 1) if self.flat else x
        return {"logits": self.head(x + self.fc2(F.relu(self.fc1(rows))).view(x.shape))}


def padded(filling, count=12, length=9):
    """Batches of random lengths whose padding is ``filling``."""
    random = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        ids = torch.randint(11, (16, length), generator=random)
        lengths = torch.randint(2, length + 1, (16, 1), generator=random)
        mask = (torch.arange(length) < lengths).long()
        batches.append({"input_ids": torch.where(mask > 0, ids, filling), "attention_mask": mask})
    return batches


def model(flat=False):
    torch.manual_seed(0)
    found = Masked(flat=flat).eval()
    nn.init.normal_(found.head.weight, std=1.5)
    return found


CALLS = {
    "compress": lambda net, data: ps.compress(net, data, target={"macs": 0.6}, latency=False),
    "low rank": lambda net, data: ps.low_rank(
        net, data, target={"params": 0.8}, layout="factored", latency=False
    ),
    "codes": lambda net, data: ps.quantize(net, data, scheme="codebook", bits=3, latency=False),
    "weights": lambda net, data: ps.prune(net, data, amount=0.5, layout="dense", latency=False),
}


@pytest.mark.parametrize(("name", "flat"), [*((name, False) for name in CALLS), ("compress", True)])
def test_what_stands_in_padding_changes_no_result(name, flat):
    one, other = (CALLS[name](model(flat), padded(filling)) for filling in (0, 7))
    batch = padded(0)[0]
    real = batch["attention_mask"].bool()
    a, b = (result.model(**batch)["logits"][real] for result in (one, other))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert one.report.divergence == pytest.approx(other.report.divergence, rel=1e-3)


def test_distillation_compares_real_tokens_alone():
    found = []
    for filling in (0, 7):
        student = ps.compress(model(), padded(0), keep=0.5, refit="none", latency=False).model
        torch.manual_seed(0)
        ps.distill(student, model(), padded(filling), loss="kl", epochs=1, lr=1e-3)
        found.append(student)
    batch = padded(0)[0]
    real = batch["attention_mask"].bool()
    a, b = (student(**batch)["logits"][real] for student in found)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 10**6), st.booleans())
def test_the_divergence_is_the_mean_over_real_tokens(seed, classes):
    random = torch.Generator().manual_seed(seed)
    batches, firsts, seconds, terms = [], [], [], []
    for _ in range(3):
        p, q = torch.randn(2, 4, 5, 3, generator=random, dtype=torch.float64)
        mask = (torch.rand(4, 5, generator=random) < 0.6).long()
        mask[0, 0] = 1
        batches.append({"input_ids": torch.zeros(4, 5), "attention_mask": mask})
        firsts.append({"logits": p} if classes else {"hidden": p})
        seconds.append({"logits": q} if classes else {"hidden": q})
        real = mask.bool()
        log_p, log_q = (one[real].log_softmax(-1) for one in (p, q))
        terms.append((log_p.exp() * (log_p - log_q)).sum(-1))
    found = mean_divergence(firsts, iter(seconds), batches, kl_divergence)
    if classes:
        assert found == pytest.approx(torch.cat(terms).mean().item(), rel=1e-9)
    else:
        assert found > 0


def test_masks_that_tell_nothing_of_tokens_are_none():
    ones = torch.ones(2, 5)
    assert token_masks({"input_ids": ones}) == {}
    assert token_masks(ones) == {}
    assert output_mask({"attention_mask": -1e9 * ones}) is None
    assert output_mask({"attention_mask": ones[None]}) is None
    assert [*token_masks({"attention_mask": ones})] == [(2, 5)]
    assert mask_of_rows({(2, 5): ones > 0}, (5, 2)) is None
    assert mask_of_rows({(2, 5): ones > 0, (5, 2): ones.T > 0}, (10,)) is None
    decoded = {"attention_mask": ones, "decoder_input_ids": torch.ones(2, 3)}
    assert token_masks(decoded) == {}
    assert output_mask(decoded) is None
    both = {**decoded, "decoder_attention_mask": torch.ones(2, 3)}
    assert [*token_masks(both)] == [(2, 5), (2, 3)]
    assert output_mask(both).shape == (2, 3)
    assert token_masks({**both, "decoder_attention_mask": ones}) == {}
