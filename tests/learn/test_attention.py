import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from forgetcast.learn.attention import LONGEST, PlainAttention


def drawn(seed: int, tokens: int, dtype: torch.dtype, heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = (torch.randn(3, heads, tokens, 8, generator=generator) for _ in range(3))
    return [part.to(dtype).requires_grad_() for part in parts]


def answered(parts: list[torch.Tensor], plain: bool, **options) -> list[torch.Tensor]:
    """The output and its gradients."""
    if plain:
        with PlainAttention():
            found = scaled_dot_product_attention(*parts, **options)
    else:
        found = scaled_dot_product_attention(*parts, **options)
    weights = torch.linspace(-1, 1, found.numel()).view_as(found).to(found)
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), parts)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 40), scale=st.one_of(st.none(), st.floats(0.1, 2.0)))
def test_bfloat16_is_as_exact_as_the_fused_kernel(seed, tokens, scale):
    parts = drawn(seed, tokens, torch.bfloat16)
    exact = answered([part.detach().double().requires_grad_() for part in parts], plain=False, scale=scale)
    for one, fused, truth in zip(
        answered(parts, True, scale=scale), answered(parts, False, scale=scale), exact, strict=True
    ):
        assert one.dtype == torch.bfloat16
        size = truth.norm()
        assert (one.double() - truth).norm() <= max(3 * (fused.double() - truth).norm(), 0.02 * size)


def test_it_is_another_way_in_bfloat16_and_no_other_in_float32():
    parts = drawn(0, 30, torch.bfloat16)
    assert not torch.equal(answered(parts, True)[0], answered(parts, False)[0])
    parts = drawn(0, 30, torch.float32)
    for one, other in zip(answered(parts, True), answered(parts, False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"attn_mask": torch.arange(30) < 20},
        {"attn_mask": torch.zeros(30, 30, dtype=torch.bfloat16)},
        {"is_causal": True, "scale": 0.3},
    ],
    ids=["causal", "mask", "bias", "causal and scaled"],
)
def test_masks_go_to_the_fused_kernel(options):
    parts = drawn(1, 30, torch.bfloat16)
    if "attn_mask" in options and options["attn_mask"].ndim == 1:
        options = {"attn_mask": options["attn_mask"].expand(30, 30)}
    for one, other in zip(answered(parts, True, **options), answered(parts, False, **options), strict=True):
        assert torch.equal(one, other)


def test_long_texts_go_to_the_fused_kernel():
    parts = drawn(2, LONGEST + 1, torch.bfloat16, heads=1)
    assert torch.equal(answered(parts, True)[0], answered(parts, False)[0])


def test_without_a_gradient_the_fused_kernel_is_the_faster():
    parts = drawn(3, 30, torch.bfloat16)
    still = [part.detach() for part in parts]
    fused = scaled_dot_product_attention(*still)
    with PlainAttention():
        assert torch.equal(scaled_dot_product_attention(*still), fused)
        with torch.no_grad():
            assert torch.equal(scaled_dot_product_attention(*parts), fused)


@pytest.mark.parametrize("shape", [(30, 8), (5, 30, 8), (2, 3, 2, 30, 8)], ids=["no batch", "three", "five"])
def test_any_batch(shape):
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    with PlainAttention():
        found = scaled_dot_product_attention(query, key[..., :20, :], value[..., :20, :4])
    exact = scaled_dot_product_attention(query.double(), key[..., :20, :].double(), value[..., :20, :4].double())
    assert found.shape == exact.shape
    assert (found.double() - exact).norm() < 0.02 * exact.norm()


def test_batches_that_broadcast_go_to_the_fused_kernel():
    query, key, value = drawn(4, 30, torch.bfloat16)
    shared = [key[:1], value[:1]]
    with PlainAttention():
        found = scaled_dot_product_attention(query, *shared)
    assert torch.equal(found, scaled_dot_product_attention(query, *shared))


def test_other_functions_are_left_alone():
    with PlainAttention():
        assert torch.equal(torch.softmax(torch.zeros(2), 0), torch.full((2,), 0.5))
