"""What the sites of blocks hold that normalize the state after each branch, or that have an unused cross-attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import HiddenStateRecorder, UnsupportedSurgery, find_stack
from streamline_hooks.modeling import BlockSites, block_sites_in, observe_blocks, write_output
from streamline_hooks.recording import Add, Intervention, Patch, Scale, Zero
from streamline_hooks.testing import assert_restores, causal_model_types, tiny_inputs, tiny_model

CONTRIBUTIONS = ["block.input", "attention.output", "mlp.output", "block.output"]
MIDDLE = {"bert": "attention.output.LayerNorm", "bart": "self_attn_layer_norm", "openai-gpt": "ln_1"}
"""The norm after the attention, by type."""


def model_of(kind: str) -> nn.Module:
    if kind not in causal_model_types():
        pytest.skip(f"this Transformers has no {kind}")
    return tiny_model(kind, blocks=4 if kind == "qwen4_exp_text" else 3)  # its fourth block has attention


@pytest.mark.parametrize("kind", MIDDLE)
@torch.no_grad()
def test_contributions_are_the_changes_of_the_state(kind: str) -> None:
    model, middles = model_of(kind), list[Tensor]()
    with HiddenStateRecorder(model, sites=CONTRIBUTIONS) as record:
        handles = [
            block.get_submodule(MIDDLE[kind]).register_forward_hook(lambda m, args, output: middles.append(output))
            for block in find_stack(model).blocks
        ]
        model(**tiny_inputs(model, tokens=9, left_padding=True))
    for handle in handles:
        handle.remove()
    for k, middle in enumerate(middles):
        before, attention, mlp, after = (record[site][k][0] for site in CONTRIBUTIONS)
        assert torch.equal(attention, middle - before)
        torch.testing.assert_close(mlp, after - middle, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(before + attention + mlp, after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MIDDLE)
@torch.no_grad()
def test_a_changed_contribution_changes_the_state_between_the_branches(kind: str) -> None:
    model = model_of(kind)
    block, inputs = find_stack(model)[1], tiny_inputs(model, tokens=9)
    added = torch.randn(32)

    def replace_middle(module: nn.Module, args: Any, output: Any) -> Any:
        return write_output(output, states[0] + added)

    states: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda m, args, kwargs: states.append(args[0]), with_kwargs=True),
        block.get_submodule(MIDDLE[kind]).register_forward_hook(replace_middle),
    ]
    expected = model(**inputs).logits
    for handle in handles:
        handle.remove()
    with Intervention(model, {("attention.output", 1): [Zero(), Add(added)]}):
        torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("kind", [*MIDDLE, "qwen4_exp_text"])  # qwen4: several streams, which are mixed between
@torch.no_grad()
def test_without_both_contributions_a_block_returns_its_input(kind: str) -> None:
    model = model_of(kind)
    edits = {("attention.output", 1): Zero(), ("mlp.output", 1): Zero()}
    with Intervention(model, edits), HiddenStateRecorder(model, [1], sites=CONTRIBUTIONS) as record:
        model(**tiny_inputs(model, tokens=9))
    before, attention, mlp, after = (record[site][1][0] for site in CONTRIBUTIONS)
    assert not attention.any()
    torch.testing.assert_close(mlp, torch.zeros_like(mlp), atol=1e-6, rtol=0)
    torch.testing.assert_close(after, before)


@torch.no_grad()
def test_the_state_between_the_branches_is_read_where_a_submodule_receives_it() -> None:
    model = model_of("qwen4_exp_text")
    block, inputs, middles = find_stack(model)[1], tiny_inputs(model, tokens=9), list[Tensor]()
    handle = block.mlp_hyper_connection.register_forward_pre_hook(lambda module, args: middles.append(args[0]))
    with HiddenStateRecorder(model, [1], sites=CONTRIBUTIONS) as record:
        model(**inputs)
    before, attention, mlp, after = (record[site][1][0] for site in CONTRIBUTIONS)
    assert torch.equal(attention, middles[-1] - before)
    torch.testing.assert_close(mlp, after - middles[-1], atol=1e-5, rtol=1e-5)
    added = torch.randn(before.shape[-1])
    with Intervention(model, {("attention.output", 1): Add(added)}):
        changed = model(**inputs).logits
    handle.remove()
    shift = block.mlp_hyper_connection.register_forward_pre_hook(lambda module, args: (args[0] + added, *args[1:]))
    torch.testing.assert_close(model(**inputs).logits, changed)
    shift.remove()


@torch.no_grad()
def test_inputs_and_heads_are_those_of_the_modules() -> None:
    model = model_of("bert")
    sites: Any = ["attention.input", "attention.heads", "mlp.input", *CONTRIBUTIONS]
    with HiddenStateRecorder(model, [1], sites=sites) as record:
        model(**tiny_inputs(model, tokens=9))
    block, states = find_stack(model)[1], {site: record[site][1][0] for site in sites}
    before, heads, middle = states["block.input"], states["attention.heads"], states["mlp.input"]
    assert torch.equal(states["attention.input"], before) and heads.shape == (2, 9, 4, 8)
    torch.testing.assert_close(block.attention.output(heads.flatten(2), before), middle)
    torch.testing.assert_close(before + states["attention.output"], middle)
    torch.testing.assert_close(block.output(block.intermediate(middle), middle), states["block.output"])


@torch.no_grad()
def test_a_patched_contribution_is_recorded_and_scaled_by_one_nothing_changes() -> None:
    model = model_of("bert")
    inputs, other = tiny_inputs(model, tokens=9), tiny_inputs(model, tokens=9, seed=1)
    with HiddenStateRecorder(model, [1], sites=["attention.output"]) as source:
        model(**other)
    patch = Patch(source["attention.output"][1])
    with Intervention(model, {("attention.output", 1): patch}):
        with HiddenStateRecorder(model, [1], sites=CONTRIBUTIONS) as record:
            model(**inputs)
    torch.testing.assert_close(record["attention.output"][1][0], source["attention.output"][1][0])
    before, attention, mlp, after = (record[site][1][0] for site in CONTRIBUTIONS)
    torch.testing.assert_close(before + attention + mlp, after, atol=1e-5, rtol=1e-5)
    plain = model(**inputs).logits
    with Intervention(model, {("attention.output", 1): Scale(1.0), ("mlp.output", 1): Scale(1.0)}):
        assert torch.equal(model(**inputs).logits, plain)


def test_sites_of_post_norm_blocks_restore_and_have_gradients() -> None:
    model = model_of("bert")
    assert_restores(model, lambda model: HiddenStateRecorder(model, sites=["attention.output", "mlp.output"]))
    vector = torch.zeros(32, requires_grad=True)
    with Intervention(model, {("attention.output", 1): Add(vector)}):
        model(**tiny_inputs(model, tokens=9)).logits.square().mean().backward()
    assert vector.grad is not None and bool(vector.grad.any())


class _Block(nn.Module):
    """A block with norms after its sums, which `change` alters."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.change = change
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        if change == "no norm":
            self.norm1 = nn.Tanh()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        attention = self.attn(x, x, x, need_weights=False)[0]
        middle = self.norm1(x + attention) if self.change != "twice" else self.norm1(x + attention + x.roll(1, 1))
        mlp = self.down(self.up(middle).relu())
        if self.change == "reads the input":
            mlp = self.down(self.up(middle + x).relu())
        if self.change == "mixes twice":
            mlp = mlp + mlp.roll(1, 1)
        return self.norm2(middle + mlp + (x if self.change == "skips" else 0))


@pytest.mark.parametrize("change", ["", "no norm", "twice", "reads the input", "mixes twice", "skips"])
@torch.no_grad()
def test_other_blocks_with_norms_are_refused(change: str) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Identity(), nn.Sequential(*(_Block(change) for _ in range(2)))).eval(),
        torch.randn(2, 5, 16),
    )
    with observe_blocks(find_stack(model, "1"), [0], x) as calls:
        sites = block_sites_in(calls[0])
    if not change:
        assert isinstance(sites, BlockSites) and sites.post_norm and sites.branches["attention"].output == "norm1"
        return
    assert isinstance(sites, UnsupportedSurgery)
    with pytest.raises(UnsupportedSurgery, match="attention.output of block 0 cannot be read"):
        HiddenStateRecorder(model, [0], sites=["attention.output"], stack="1", probe=x).__enter__()


@pytest.mark.parametrize("kind", ["bart", "mbart"])
@pytest.mark.parametrize("site", ["attention.output", "mlp.output", "mlp.input", "attention.heads"])
@torch.no_grad()
def test_a_call_that_runs_the_cross_attention_is_refused(kind: str, site: Any) -> None:
    model = model_of(kind)
    inputs, states = tiny_inputs(model, tokens=9), torch.randn(2, 4, 32)
    with HiddenStateRecorder(model, [1], sites=[site]) as record:
        model(**inputs)
        with pytest.raises(UnsupportedSurgery, match=f"{site} of block 1 cannot be .* it runs encoder_attn"):
            model(**inputs, encoder_hidden_states=states)
    assert record[site][1][0].isfinite().all()
    model(**inputs, encoder_hidden_states=states)
    with Intervention(model, {(site, 1): Scale(0.5)}):
        model(**inputs)
        with pytest.raises(UnsupportedSurgery, match="it runs encoder_attn"):
            model(**inputs, encoder_hidden_states=states)


class _PreNorm(nn.Module):
    """A block with norms before its branches, which may use a child in other ways than by a call."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down, self.extra = nn.Linear(16, 32), nn.Linear(32, 16), nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        if self.use == "weight":
            x = x + nn.functional.linear(x, self.extra[0].weight)
        if self.use == "item":
            x = x + self.extra[0](x)
        return x + self.down(self.up(self.norm2(x)).relu())


def pre_norm(use: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), nn.Sequential(_PreNorm(use), _PreNorm(use))).eval()


@torch.no_grad()
def test_a_child_that_is_used_without_a_call_is_part_of_the_block() -> None:
    with observe_blocks(find_stack(pre_norm("weight"), "1"), [0], torch.randn(2, 5, 16)) as calls:
        assert isinstance(block_sites_in(calls[0]), UnsupportedSurgery)


@torch.no_grad()
def test_a_call_that_runs_an_item_of_an_uncalled_list_is_refused() -> None:
    model, x = pre_norm(""), torch.randn(2, 5, 16)
    with HiddenStateRecorder(model, sites=CONTRIBUTIONS, stack="1", probe=x) as record:
        model(x)
        model[1][1].use = "item"  # type: ignore[index,union-attr]
        with pytest.raises(UnsupportedSurgery, match="of block 1 cannot be read.* it runs extra of _PreNorm"):
            model(x)
    assert len(record["mlp.output"][1]) == 1


@torch.no_grad()
def test_embeddings_of_several_codebooks_are_refused() -> None:
    model = model_of("musicgen")
    with pytest.raises(UnsupportedSurgery, match="embeddings of .*: its input embeddings are a ModuleList"):
        HiddenStateRecorder(model, sites=["embeddings"]).__enter__()
    with HiddenStateRecorder(model, [0], sites=CONTRIBUTIONS) as record:
        model(**tiny_inputs(model, tokens=9))
    assert record["mlp.output"][0][0].isfinite().all()
