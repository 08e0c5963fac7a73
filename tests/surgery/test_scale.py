"""The state multiplied at one place, through what the blocks behind it add."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.modeling import read_input, read_output, write_input, write_output
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import fold
from streamline_hooks.surgery import surgeon as surgeon_module
from streamline_hooks.testing import tiny_inputs
from streamline_hooks.testing import tiny_model as tiny
from tests.surgery.test_surgeon import fingerprint, logits
from tests.tiny_models import BLOCKS, Nudge, left_padded, tiny_config, tiny_model

FAMILIES = ("llama", "opt", "gpt2", "gpt_neox", "qwen3")
families = st.sampled_from(FAMILIES)
factors = st.sampled_from([0.6, 0.97, 1.04, 1.7, 3.1])
places = st.integers(0, BLOCKS)


def multiplied(model: nn.Module, k: int, factor: float, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The logits with the state that comes to a block, by its present number, multiplied."""
    stack = find_stack(model)
    if k < len(stack):
        handle = stack[k].register_forward_pre_hook(
            lambda m, args, kw: write_input(args, kw, read_input(args, kw) * factor), with_kwargs=True
        )
    else:
        handle = stack[-1].register_forward_hook(lambda m, args, out: write_output(out, read_output(out) * factor))
    try:
        return logits(model, batch)
    finally:
        handle.remove()


@settings(max_examples=20)
@given(families, places, factors, st.booleans())
def test_it_equals_the_state_multiplied(family: str, k: int, factor: float, padded: bool) -> None:
    model = tiny_model(family).double()
    batch = left_padded(3, 9) if padded else None
    expected = multiplied(model, k, factor, batch)
    with LayerSurgeon(model) as surgeon:
        surgeon.scale(k, factor)
        got = logits(model, batch)
    real = slice(None) if batch is None else batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-3, atol=1e-3)  # as far as an eps is felt
    if k < BLOCKS:
        assert not torch.allclose(logits(model, batch)[real], expected[real], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "phi", "gptj", "bamba", "granite", "cohere", "falcon"])
def test_further_architectures(model_type: str, dtype: torch.dtype) -> None:
    model = tiny(model_type, blocks=3).to(dtype)
    batch = tiny_inputs(model, left_padding=True)
    real = batch["attention_mask"].bool()
    expected = multiplied(model, 1, 2.0, batch)  # which no precision rounds
    with LayerSurgeon(model) as surgeon:
        surgeon.scale(1, 2.0)
        got = logits(model, batch)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert (got - expected)[real].abs().max() <= tolerance * expected[real].abs().max()


def test_nothing_before_the_place_is_touched() -> None:
    model = type(tiny_model("llama"))(tiny_config("llama", tie_word_embeddings=True)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    before = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    with LayerSurgeon(model) as surgeon:
        surgeon.scale(3, 1.5)
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n][1])}
        assert changed == {
            f"model.layers.{k}.{n}.weight" for k in (3, 4, 5) for n in ("self_attn.o_proj", "mlp.down_proj")
        }
        assert all(id(p) == before[n][0] for n, p in model.named_parameters() if n not in changed)
        assert surgeon.plan.folded == {k: ("attention", "mlp") for k in (3, 4, 5)}
        for name in changed:
            torch.testing.assert_close(model.get_parameter(name), before[name][1] / 1.5)
    assert model.lm_head.weight is embedding


@settings(max_examples=8)
@given(families, st.integers(0, BLOCKS - 2), factors)
def test_behind_a_removed_window(family: str, start: int, factor: float) -> None:
    model = tiny_model(family).double()
    window = range(start, min(start + 2, BLOCKS - 1))
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(window)
        expected = multiplied(model, start, factor)
        surgeon.scale(window.stop, factor)
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


@settings(max_examples=8)
@given(families, places, places, factors, factors)
def test_two_places_compose(family: str, j: int, k: int, first: float, second: float) -> None:
    model = tiny_model(family).double()
    with LayerSurgeon(model) as surgeon:
        surgeon.scale(j, first)
        surgeon.scale(k, second)
        expected = logits(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.scale(k, second)
        surgeon.scale(j, first)
        torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)


def test_a_zeroed_branch_and_a_linear_splice_go_along() -> None:
    model = tiny_model("llama").double()
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(3, "attention")
        surgeon.insert(4, LinearReplacement.from_map(0.1 * torch.randn(32, 32)))
        expected = multiplied(model, 2, 1.3)
        surgeon.scale(2, 1.3)
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
        assert surgeon.plan.zeroed == {3: ("attention",)}
        assert surgeon.plan.folded[3] == ("mlp",) and surgeon.plan.folded[4] == ("attention", "mlp")


def test_a_factor_of_one_changes_nothing() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.scale(2, 1.0)
        assert surgeon.plan.folded == {}


def test_a_plain_pytorch_model_needs_a_batch() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True, dropout=0.0)
    batch = {"src": torch.randn(2, 5, 16)}
    for norm in (nn.LayerNorm(16), None):
        model = nn.TransformerEncoder(layer, 3, norm=norm, enable_nested_tensor=False).eval()
        with LayerSurgeon(model) as surgeon:
            if norm is None:
                with pytest.raises(UnsupportedSurgery, match="without a norm"):
                    surgeon.scale(1, 1.5, batch=batch)
            else:
                surgeon.scale(1, 1.5, batch=batch)


# Saying no, and that the check can fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.02, 0.98, 3.0])
def test_a_head_that_reads_the_state_without_a_norm_is_refused(dtype: torch.dtype, factor: float) -> None:
    """Also in a precision in which a factor so near to 1 would hardly show."""
    model = tiny_model("llama", dtype)
    model.model.norm = nn.Identity()
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon:
        for k in (2, BLOCKS):
            with pytest.raises(UnsupportedSurgery, match=r"without a norm.*eps"):
                surgeon.scale(k, factor)
        assert surgeon.plan.folded == {}
    assert fingerprint(model) == before


def test_an_eps_that_is_felt_is_refused() -> None:
    model = tiny_model("llama")
    model.model.norm.variance_epsilon = 1.0
    with LayerSurgeon(model) as surgeon, pytest.raises(UnsupportedSurgery, match="other logits.*eps is not negligible"):
        surgeon.scale(2, 1.5)


def test_a_block_that_is_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        surgeon_module,
        "divided",
        lambda held, factor: fold.divided({where: own for where, own in held.items() if where[0] != 4}, factor),
    )
    model = tiny_model("llama")
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon, pytest.raises(UnsupportedSurgery, match="other logits"):
        surgeon.scale(2, 1.5)
    assert fingerprint(model) == before


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
def test_a_norm_behind_a_branch_is_refused(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(model_type, blocks=3)
    with LayerSurgeon(model) as surgeon:
        text = r"before block 1 .*halving.*attention branch of block 1.*a norm follows"
        with pytest.raises(UnsupportedSurgery, match=text):
            surgeon.scale(1, 1.5)
        monkeypatch.setattr(fold.BranchProbe, "equal", lambda *given: True)  # the logits show it too
        with pytest.raises(UnsupportedSurgery, match="other logits"):
            surgeon.scale(1, 1.5)


def test_a_norm_on_the_residual_stream_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("opt", do_layer_norm_before=False)).eval()
    with LayerSurgeon(model) as surgeon, pytest.raises(UnsupportedSurgery, match=r"block 2.*OPTDec"):
        surgeon.scale(2, 1.5)


def test_a_splice_that_is_not_linear_is_refused() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(4, nn.Tanh())
        with pytest.raises(UnsupportedSurgery, match="other logits"):
            surgeon.scale(2, 1.5)
        surgeon.scale(4, 1.5)  # behind it


def test_a_block_put_in_behind_is_refused() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(4, surgeon.stack[0])
        with pytest.raises(UnsupportedSurgery, match=r"new block was inserted.*Scale first"):
            surgeon.scale(3, 1.5)
        expected = multiplied(model, 5, 1.5)  # block 4 by its present number
        surgeon.scale(4, 1.5)
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_meant() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        for factor in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(StreamlineError, match=f"{factor}"):
                surgeon.scale(2, factor)
        for k, factor in ((True, 1.5), ("2", 1.5), (2.5, 1.5), (2, "1.5"), (2, True)):
            with pytest.raises(StreamlineError, match=rf"scale.*({k!r}|{factor!r}).*Expected.*Pass"):
                surgeon.scale(k, factor)  # type: ignore[arg-type]
        with pytest.raises(StreamlineError, match=r"scale\(7.*6 blocks"):
            surgeon.scale(7, 1.5)
        surgeon.replace(range(1, 4), Nudge())
        with pytest.raises(StreamlineError, match=r"block 2.*blocks 1 to 3.*1 or 4"):
            surgeon.scale(2, 1.5)
