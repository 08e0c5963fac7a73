"""|gradient × weight| against the plain backward of the whole loss, and what it leaves behind: nothing."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import StreamlineError, find_stack
from streamline_hooks.data import packed_batches
from streamline_hooks.selection.scoring import score_windows
from streamline_hooks.selection.taylor import block_saliency
from tests.tiny_models import BLOCKS, FAMILIES, padded, shuffled_batches, tiny_model, tokens

WINDOWS = [range(0, 2), range(1, 4), range(3, BLOCKS)]


def reference(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[float]:
    """From one backward of the loss of all sequences, each run alone by the model's own loss."""
    model.eval().zero_grad()
    rows = [ids[mask.bool()] for ids, mask in zip(*batch.values(), strict=True)]
    count = sum(len(ids) - 1 for ids in rows)
    sum(model(ids[None], labels=ids[None]).loss * (len(ids) - 1) / count for ids in rows if len(ids) > 1).backward()
    found = []
    for block in find_stack(model).blocks:
        pairs = [
            (p.detach().double().numpy(), p.grad.double().numpy()) for p in block.parameters() if p.grad is not None
        ]
        found.append(float(sum(np.abs(p * g).sum() for p, g in pairs)))
    model.zero_grad()
    return found


@given(
    st.sampled_from(FAMILIES),
    st.lists(st.integers(1, 7), min_size=1, max_size=4).filter(lambda lengths: max(lengths) > 1),
    st.integers(1, 4),
    st.sampled_from(["left", "right"]),
    st.randoms(),
)
def test_it_equals_the_whole_losss_gradient(
    family: str, lengths: list[int], size: int, side: str, random: Random
) -> None:
    """Whatever the batches; in training mode, with dropout, as in evaluation."""
    model, batch = tiny_model(family, torch.float64), padded(lengths, side)
    saliency = reference(model, batch)
    model.train()
    got = score_windows("taylor", WINDOWS, model=model, batches=shuffled_batches(batch, size, random))
    assert model.training
    assert got == pytest.approx([-sum(saliency[k] for k in w) for w in WINDOWS], rel=1e-5)


def test_packed_rows_are_their_documents() -> None:
    """No first token of a document is predicted from another document's last."""
    model = tiny_model("llama", torch.float64)
    packed = packed_batches([[range(3, 9), range(10, 15)], [range(20, 27), range(5, 9)]], batch_size=2)
    alone = [torch.arange(a, b)[None] for a, b in ((3, 9), (10, 15), (20, 27), (5, 9))]
    found, expected = (score_windows("taylor", WINDOWS, model=model, batches=text) for text in (packed, alone))
    assert found == pytest.approx(expected, rel=1e-6)


def test_nothing_is_left_behind() -> None:
    """Neither gradients nor flags: those of a training that has been interrupted are as they were."""
    model = tiny_model("llama")
    batches = [padded([6, 4], "left"), padded([5], "right")]
    expected = block_saliency(model, batches, range(BLOCKS))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for number, p in enumerate(model.parameters()):
        p.requires_grad_(number % 3 > 0)
        if number % 3 == 1:
            p.grad = torch.full_like(p, float(number))
    before = [(p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    assert block_saliency(model, batches, range(BLOCKS)) == expected  # frozen or not, a weight counts
    for p, (required, gradient, values) in zip(model.parameters(), before, strict=True):
        assert p.requires_grad == required and p.grad is gradient
        assert values is None or torch.equal(p.grad, values)
        assert not p._post_accumulate_grad_hooks


def test_nothing_is_left_behind_by_an_error() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)

    def fail(*given: object) -> None:
        raise KeyboardInterrupt

    model.model.layers[3].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        block_saliency(model, [tokens(1, 4)], [1])
    assert not model.model.embed_tokens.weight.requires_grad and model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.lm_head.weight.grad.sum() == model.lm_head.weight.numel()


def test_where_gradients_are_off() -> None:
    model, batches = tiny_model("llama"), [tokens(2, 5)]
    expected = block_saliency(model, batches, [2])
    with torch.no_grad():
        assert block_saliency(model, batches, [2]) == expected
    with torch.inference_mode():
        assert block_saliency(model, batches, [2]) == expected


def test_only_these_blocks_are_differentiated() -> None:
    """The backward ends at the first of them, and no other gradient is kept."""
    model, reached = tiny_model("llama"), []
    for k, block in enumerate(model.model.layers):
        block.mlp.register_full_backward_hook(lambda m, a, o, k=k: reached.append(k))
    block_saliency(model, [tokens(2, 5)], [2, 4])
    assert sorted(reached) == [2, 3, 4, 5]


def test_a_long_text_of_half_precision_is_summed_wide() -> None:
    """In bfloat16 a sum stops growing at 256 equal parts."""
    model = tiny_model("llama", torch.bfloat16)
    one, many = (block_saliency(model, [tokens(1, 3)] * count, [BLOCKS - 1]) for count in (1, 320))
    assert many == pytest.approx(one, rel=1e-4)


def test_float16_is_refused_because_small_gradients_become_zero() -> None:
    model = tiny_model("llama", torch.float16)
    with pytest.raises(StreamlineError, match=r"weights are float16.*small gradients.*model.bfloat16"):
        block_saliency(model, [tokens(1, 5)], [1])
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.float16), pytest.raises(StreamlineError, match=r"autocast is float16"):
        block_saliency(model, [tokens(1, 5)], [1])


def test_what_has_no_gradient_says_so() -> None:
    model = tiny_model("llama")
    model.model.layers[3].register_forward_pre_hook(lambda m, a: (a[0].detach(), *a[1:]))
    with pytest.raises(StreamlineError, match=r"block 1.*LlamaForCausalLM"):
        block_saliency(model, [tokens(1, 5)], [1, 4])
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight = nn.Parameter(torch.ones(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(StreamlineError, match=r"mlp.up_proj.weight.*block 2.*torch.int8"):
        block_saliency(model, [tokens(1, 5)], [2])
    with pytest.raises(StreamlineError, match="block 3 is offloaded"):
        block_saliency(tiny_model("llama").to("meta"), [tokens(1, 5)], [3])
    with pytest.raises(StreamlineError, match=r"no predicted token.*two real tokens"):
        block_saliency(tiny_model("llama"), [padded([1, 1], "left")], [3])


def test_nan_is_named() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(StreamlineError, match=r"loss of batch 0 is nan"):
        block_saliency(model, [tokens(1, 5)], [1])
    model = tiny_model("llama")
    model.model.layers[2].register_full_backward_hook(lambda m, a, o: tuple(g * torch.nan for g in a if g is not None))
    with pytest.raises(StreamlineError, match=r"block 1.*not finite"):
        block_saliency(model, [tokens(1, 5)], [1, 2, 3])


def test_tokens_without_a_label_are_not_predicted() -> None:
    model, ids = tiny_model("llama"), tokens(2, 12)
    labels = ids.clone()
    labels[:, :8] = -100
    expected = []
    model.eval().zero_grad()
    model(ids, labels=labels).loss.backward()
    for k in (2, 3):
        expected.append(sum(float((p.detach() * p.grad).abs().sum()) for p in find_stack(model)[k].parameters()))
    found = block_saliency(model, [{"input_ids": ids, "labels": labels}], [2, 3])
    assert list(found.values()) == pytest.approx(expected, rel=1e-4)
