"""What the standard sites hold, on every tiny family and on blocks that add their branches in other ways."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.modeling import read_output, write_output
from streamline_hooks.recording import BLOCK_SITES, MODEL_SITES, RecordingConfig
from streamline_hooks.testing import assert_restores, causal_model_types, tiny_inputs
from streamline_hooks.testing import tiny_model as tiny_of_type
from tests.tiny_models import BLOCKS, FAMILIES, Nudge, left_padded, tiny_model, tokens

INNER = [site for site in BLOCK_SITES if not site.startswith("block.")]
CONTRIBUTIONS = ["block.input", "block.output", "attention.output", "mlp.output"]
KINDS = ["granite", "granitemoehybrid", "falcon_h1", "gemma2", "gptj", "falcon", "mixtral", "bloom", "olmo2", "jamba"]
"""Multiplier, sum of two modules, two mixers, norm after a branch, parallel branches, experts, addition inside."""


def model_of(kind: str) -> nn.Module:
    if kind in FAMILIES:
        return tiny_model(kind)
    if kind not in causal_model_types():
        pytest.skip(f"this Transformers has no {kind}")
    return tiny_of_type(kind, blocks=3, **({"residual_multiplier": 0.22} if kind == "granite" else {}))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", [*FAMILIES, *KINDS])
@torch.no_grad()
def test_contributions_sum_to_the_output(kind: str) -> None:
    model = model_of(kind)
    with HiddenStateRecorder(model, [0, -1], sites=CONTRIBUTIONS) as record:
        record(**tiny_inputs(model, tokens=9) if kind not in FAMILIES else left_padded(3, 9))
    for k in record.blocks:
        before, after, attention, mlp = (record[site][k][0] for site in CONTRIBUTIONS)  # type: ignore[call-overload]
        assert relative(before + attention + mlp, after) < 1e-5
        assert min(relative(before + attention, after), relative(before + mlp, after)) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_contribution_is_what_a_zeroed_branch_lacks(family: str) -> None:
    """A norm after the branch or a wrong block would show: the surgeon zeroes the output projection."""
    model = tiny_model(family)
    with HiddenStateRecorder(model, [2], sites=CONTRIBUTIONS) as record:
        record(input_ids=tokens(2, 9))
        whole = record["block.output"][2][0]
        with LayerSurgeon(model) as surgeon:
            surgeon.zero_branch(2, "mlp")
            record(input_ids=tokens(2, 9))
    torch.testing.assert_close(whole - record["block.output"][2][1], record["mlp.output"][2][0], atol=1e-4, rtol=1e-4)
    assert not record["mlp.output"][2][1].any()


HEADS = {
    "llama": "self_attn.o_proj", "opt": "self_attn.out_proj", "gpt2": "attn.c_proj", "gpt_neox": "attention.dense",
    "qwen3": "self_attn.o_proj", "gemma3": "self_attn.o_proj",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_heads_through_the_output_projection_are_the_contribution(family: str) -> None:
    model = tiny_model(family)
    with HiddenStateRecorder(model, [1], sites=["attention.heads", "attention.output"]) as record:
        record(**left_padded(2, 9))
    heads, block = record["attention.heads"][1][0], find_stack(model)[1]
    assert heads.shape == (2, 9, 4, 8)
    projected = block.get_submodule(HEADS[family])(heads.flatten(2))
    if family == "gemma3":
        projected = block.post_attention_layernorm(projected)
    torch.testing.assert_close(projected, record["attention.output"][1][0])


@torch.no_grad()
def test_heads_are_not_shuffled() -> None:
    """With the values of one head zeroed, exactly that head is zero."""
    model = copy.deepcopy(tiny_model("gpt2"))
    attention = model.transformer.h[1].attn.c_attn
    attention.weight[:, 64 + 16 : 64 + 24] = attention.bias[64 + 16 : 64 + 24] = 0  # the values of head 2
    with HiddenStateRecorder(model, [1], sites=["attention.heads"]) as record:
        record(input_ids=tokens(2, 9))
    assert [bool(head.any()) for head in record["attention.heads"][1][0].unbind(2)] == [True, True, False, True]


@torch.no_grad()
def test_inputs_of_the_branches_are_normed_states() -> None:
    model = tiny_model("llama")
    with HiddenStateRecorder(model, [1], sites=[*CONTRIBUTIONS, "attention.input", "mlp.input"]) as record:
        record(input_ids=tokens(2, 9))
    block, before = find_stack(model)[1], record["block.input"][1][0]
    torch.testing.assert_close(record["attention.input"][1][0], block.input_layernorm(before))
    middle = before + record["attention.output"][1][0]
    torch.testing.assert_close(record["mlp.input"][1][0], block.post_attention_layernorm(middle))
    torch.testing.assert_close(block.mlp(record["mlp.input"][1][0]), record["mlp.output"][1][0])


@torch.no_grad()
def test_flattened_tokens_get_their_axes() -> None:
    model = tiny_model("opt")
    with HiddenStateRecorder(model, [1], sites=["mlp.input", "mlp.output"], tokens="last") as record:
        record(**left_padded(3, 9))
    assert record["mlp.input"][1][0].shape == record["mlp.output"][1][0].shape == (3, 32)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sites_of_the_model(family: str) -> None:
    model = tiny_model(family)
    with HiddenStateRecorder(model, [-1], sites=MODEL_SITES) as record:
        output = model(tokens(2, 9), output_hidden_states=True)
    assert torch.equal(record["embeddings"][0], model.get_input_embeddings()(tokens(2, 9)))
    assert torch.equal(record["final_norm"][0], output.hidden_states[-1])
    assert torch.equal(record["logits"][0], output.logits)


def test_generate_records_prefill_and_steps() -> None:
    model = tiny_model("gemma3")
    with HiddenStateRecorder(model, [1], sites=[*INNER, *MODEL_SITES]) as record:
        model.generate(**left_padded(2, 7), max_new_tokens=3, do_sample=False, eos_token_id=None)
    for site in INNER:
        assert [state.shape[1] for state in record[site][1]] == [7, 1, 1]  # type: ignore[call-overload]
    assert [state.shape[1] for state in record["final_norm"]] == [7, 1, 1]


@torch.no_grad()
def test_the_same_states_with_other_sites() -> None:
    """Finding the sites and checking them changes no state, and an open recorder sees a splice."""
    model = tiny_model("gpt_neox")
    with HiddenStateRecorder(model) as plain:
        model(tokens(2, 9))
    with LayerSurgeon(model) as surgeon, HiddenStateRecorder(model, sites=BLOCK_SITES) as record:
        model(tokens(2, 9))
        surgeon.insert(BLOCKS, Nudge())
        model(tokens(2, 9))
    for k in range(BLOCKS):
        assert torch.equal(record.inputs[k][0], plain.inputs[k][0])
        assert torch.equal(record.outputs[k][0], plain.outputs[k][0])
    assert not torch.equal(record.outputs[BLOCKS - 1][1], plain.outputs[BLOCKS - 1][0])
    assert torch.equal(record["mlp.output"][BLOCKS - 1][1], record["mlp.output"][BLOCKS - 1][0])


def test_contributions_have_gradients() -> None:
    model = tiny_model("llama")
    config = RecordingConfig(detach=False, retain_grad=True)
    with HiddenStateRecorder(model, [1], sites=["attention.output", "block.output"], config=config) as record:
        model(tokens(2, 9)).logits.square().mean().backward()
    assert record["attention.output"][1][0].grad is not None and record["block.output"][1][0].grad is not None


@pytest.mark.parametrize("kind", ["llama", "granitemoehybrid"])
def test_sites_restore(kind: str) -> None:
    model = model_of(kind)
    assert_restores(model, lambda model: HiddenStateRecorder(model, sites=[*BLOCK_SITES[:4], "mlp.output"]))


class _Dropped(nn.Module):
    """A block whose attention is dropped at random between its submodule and the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + nn.functional.dropout(self.attn(normed, normed, normed)[0], 0.5, self.training)
        return x + self.down(self.up(self.norm2(x)).relu())


def dropped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), nn.Sequential(*(_Dropped() for _ in range(3)))).eval()


@torch.no_grad()
def test_contributions_that_do_not_sum_are_refused() -> None:
    model, x = dropped(), torch.randn(2, 5, 16)
    with HiddenStateRecorder(model, sites=CONTRIBUTIONS, stack="1", probe=x) as record:
        model(x)
    assert len(record["mlp.output"][2]) == 1
    model.train()
    with HiddenStateRecorder(model, sites=CONTRIBUTIONS, stack="1", probe=x):
        with pytest.raises(UnsupportedSurgery, match="contributions of block 0 do not sum.*evaluation mode"):
            model(x)
    with pytest.raises(StreamlineError, match="no probe inputs are known.*Pass a batch"):
        HiddenStateRecorder(dropped(), sites=CONTRIBUTIONS, stack="1").__enter__()


@torch.no_grad()
def test_a_hook_that_changes_a_contribution_later_is_noticed() -> None:
    model = tiny_model("llama")
    with HiddenStateRecorder(model, [1], sites=["attention.output"]):
        handle = model.model.layers[1].self_attn.register_forward_hook(
            lambda module, args, output: write_output(output, 2 * read_output(output))
        )
        with pytest.raises(UnsupportedSurgery, match="do not sum"):
            model(tokens(2, 9))
        handle.remove()
        model(tokens(2, 9))


def test_sites_that_a_model_lacks_are_refused() -> None:
    refusals: list[tuple[str, str, dict[str, Any]]] = [
        ("xlnet", "attention.output", {}), ("mamba", "mlp.output", {}), ("jamba", "attention.heads", {})
    ]  # fmt: skip
    for kind, site, options in refusals:
        model = tiny_of_type(kind, blocks=2, **options)
        before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        with pytest.raises(UnsupportedSurgery, match=f"{site} of block 0 cannot be read: .*Expected"):
            HiddenStateRecorder(model, [0], sites=[site]).__enter__()
        assert before == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    if "nanochat" in causal_model_types():  # its norm is also applied to the embeddings
        with pytest.raises(UnsupportedSurgery, match="final_norm of NanoChatForCausalLM cannot be read"):
            HiddenStateRecorder(tiny_of_type("nanochat", blocks=2), sites=["final_norm"]).__enter__()
    with pytest.raises(StreamlineError, match="site='mlp.output' is not recorded. Expected one of block.input"):
        HiddenStateRecorder(tiny_model("llama"))["mlp.output"]
