"""Blocks merged by their channels: what each goes on adding, whatever they are called, and what cannot be merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from streamline_hooks import UnsupportedSurgery, find_stack
from streamline_hooks.block_call import BlockCall
from streamline_hooks.branches import BRANCHES, Branch
from streamline_hooks.replacements import concatenated, inherit
from streamline_hooks.replacements.channels import find_channels
from streamline_hooks.replacements.concatenated import concatenate
from streamline_hooks.surgery.silence import branches_in, called
from tests.tiny_models import tiny_config, tiny_model, tokens

WINDOW = range(2, 5)
MERGED = [(family, branch) for family in ("llama", "opt", "gpt2", "gpt_neox") for branch in BRANCHES] + [
    ("qwen3", "mlp")
]


def merged(model: nn.Module, needs: dict[Branch, Tensor], window: range = WINDOW) -> Any:
    """The window's blocks merged by what is needed of them."""
    stack = find_stack(model)
    made = inherit(stack, window)
    with called(stack, window) as calls:
        several: list[Any] = [calls[k] for k in window]
        found: list[Any] = [branches_in(call) for call in several]
        pairs = list(zip(several, found, strict=True))
        channels = {branch: [find_channels(stack, call, one, branch) for call, one in pairs] for branch in needs}
        concatenate(made, several, found, channels, needs)
    return made


def units(model: nn.Module, branch: Branch) -> int:
    stack = find_stack(model)
    with called(stack, WINDOW) as calls:
        call: Any = calls[WINDOW.start]
        branches: Any = branches_in(call)
        return find_channels(stack, call, branches, branch).count


def some(model: nn.Module, branch: Branch, seed: int = 0) -> Tensor:
    return torch.rand(len(WINDOW), units(model, branch), generator=torch.Generator().manual_seed(seed))


def test_an_mlp_adds_what_the_formula_says() -> None:
    """Σ over the chosen channels of w·silu(g·x̂)(u·x̂), each with the norm of its own block."""
    model: Any = tiny_model("llama")
    need = some(model, "mlp")
    found = merged(model, {"mlp": need})
    x, wanted = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 5, 32)
    chosen = {divmod(int(i), 48) for i in need.flatten().topk(48).indices}
    assert len({k for k, _ in chosen}) == 3
    for place, k in enumerate(WINDOW):
        block = model.model.layers[k]
        h = block.post_attention_layernorm(x)
        inner = nn.functional.silu(block.mlp.gate_proj(h)) * block.mlp.up_proj(h)
        mine = [unit for of, unit in chosen if of == place]
        wanted += inner[..., mine] @ block.mlp.down_proj.weight[:, mine].T
    torch.testing.assert_close(found.mlp(found.post_attention_layernorm(x)), wanted, rtol=1e-4, atol=1e-5)
    first = model.model.layers[2]
    assert torch.equal(found.self_attn.q_proj.weight, first.self_attn.q_proj.weight), "the other branch was changed"
    assert torch.equal(found.post_attention_layernorm.weight, first.post_attention_layernorm.weight)


@pytest.mark.parametrize(("family", "branch"), MERGED)
@given(seed=st.integers(0, 1000))
@settings(max_examples=4)
def test_each_unit_goes_on_adding_what_it_did(family: str, branch: Branch, seed: int) -> None:
    """On another text, and a longer one, than what it was shown on: one unit alone at a time, in its own block."""
    model = tiny_model(family)
    stack, need = find_stack(model), some(model, branch, seed)
    found = merged(model, {branch: need})
    with called(stack, WINDOW, tokens(2, 17, seed=seed)) as calls:
        own: list[Any] = [calls[k] for k in WINDOW]
        writers = branches_in(own[0]).writers  # type: ignore[union-attr]
        silent = {
            n: torch.zeros_like(own[0].block.get_parameter(n)) for b in BRANCHES if b != branch for n in writers[b]
        }
        channels = find_channels(stack, own[0], branches_in(own[0]), branch)  # type: ignore[arg-type]
        state = own[0].state
        wanted = torch.zeros_like(state)
        for place, call in enumerate(own):
            mine = [
                int(i) % channels.count
                for i in need.flatten().topk(channels.count).indices
                if i // channels.count == place
            ]
            block = copy.deepcopy(call.block)
            columns, gone = channels.columns(block), torch.ones(channels.count, dtype=torch.bool)
            gone[mine] = False
            with torch.no_grad():
                channels.matrix(block)[:, columns[gone].flatten()] = 0.0
            wanted += BlockCall(block, call.args, call.kwargs, call.output).run(state, silent) - state
        added = BlockCall(found, own[0].args, own[0].kwargs, own[0].output).run(state, silent) - state
    torch.testing.assert_close(added, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox"])
def test_the_first_blocks_own_units_are_the_first_block(family: str) -> None:
    model = tiny_model(family)
    need: dict[Branch, Tensor] = {branch: torch.zeros(3, units(model, branch)) for branch in BRANCHES}
    for branch in BRANCHES:
        need[branch][0] = 1.0
    found, first = merged(model, need), find_stack(model)[2]
    for name, parameter in first.named_parameters():
        if "bias" not in name:  # those of the layers that write are the sum of all blocks'
            torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


def test_gate_and_up_in_one_layer() -> None:
    """Whose rows are two layers on each other, and not two rows for each channel."""
    import transformers

    config = transformers.Phi3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, pad_token_id=0
    )
    torch.manual_seed(0)
    model: Any = transformers.Phi3ForCausalLM(config).eval()
    need = some(model, "mlp")
    found = merged(model, {"mlp": need})
    place, unit = divmod(int(need.flatten().argmax()), 48)
    slot = [divmod(int(i), 48) for i in sorted(need.flatten().topk(48).indices.tolist())].index((place, unit))
    source = model.model.layers[WINDOW[place]].mlp.gate_up_proj.weight
    torch.testing.assert_close(found.mlp.gate_up_proj.weight[[slot, 48 + slot]], source[[unit, 48 + unit]])


def test_a_norm_that_is_not_multiplied_in_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    need = some(model, "mlp")
    plain = (torch.ones(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64))
    monkeypatch.setattr(concatenated.ChannelMerge, "norm_of", lambda self, k: plain)
    with pytest.raises(UnsupportedSurgery, match="does not add"):
        merged(model, {"mlp": need})


def test_rows_that_are_laid_out_otherwise_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value of GPT-2 are three layers on each other."""
    monkeypatch.setattr(concatenated, "HALVES", (1,))
    model = tiny_model("gpt2")
    with pytest.raises(UnsupportedSurgery, match="laid out otherwise"):
        merged(model, {"attention": some(model, "attention")})


REFUSED = [
    ("qwen3", "attention", r"does not add.*norm on what it adds"),
    ("gemma3", "attention", r"self_attn\.\w+.*merged:channels=mlp"),
    ("gemma3", "mlp", r"does not add.*merged:channels=attention"),
]


@pytest.mark.parametrize(("family", "branch", "said"), REFUSED)
def test_what_channels_do_not_add_up_in_is_refused(family: str, branch: Branch, said: str) -> None:
    model = tiny_model(family)
    with pytest.raises(UnsupportedSurgery, match=rf"{branch} of.*{said}"):
        merged(model, {branch: some(model, branch)})


def test_experts_are_refused() -> None:
    import transformers

    config = transformers.MixtralConfig(
        **{**tiny_config("llama").to_diff_dict(), "num_local_experts": 4, "model_type": "mixtral"}
    )
    model = transformers.MixtralForCausalLM(config).eval()
    with pytest.raises(UnsupportedSurgery, match=r"MixtralDecoderLayer .*(experts|no linear layer)"):
        units(model, "mlp")


def test_blocks_that_are_not_built_alike_are_refused() -> None:
    model: Any = tiny_model("llama")
    need = some(model, "mlp")
    mlp = model.model.layers[3].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 40), nn.Linear(32, 40), nn.Linear(40, 32)
    with pytest.raises(UnsupportedSurgery, match="not built alike"):
        merged(model, {"mlp": need})


def test_norms_that_shift_need_a_bias() -> None:
    model: Any = tiny_model("gpt_neox")
    need = some(model, "mlp")
    for layer in model.gpt_neox.layers:
        layer.mlp.dense_h_to_4h.bias = None
    with pytest.raises(UnsupportedSurgery, match=r"norms shift.*mlp\.dense_h_to_4h.*no bias"):
        merged(model, {"mlp": need})


def test_heads_whose_places_count_are_refused() -> None:
    """The slope of an ALiBi head is that of its number: in another place it looks elsewhere."""
    import transformers

    config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=6, n_head=4)
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    need = torch.zeros(3, 4)
    need[1, :2] = need[2, :2] = 1.0  # two heads would move up
    with pytest.raises(UnsupportedSurgery, match="a position that differs"):
        merged(model, {"attention": need})


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("family", "branch"), [("gpt2", "attention"), ("gpt2", "mlp"), ("gpt_neox", "mlp"), ("opt", "attention")]
)
def test_half_precision_merges_what_a_wide_one_does(family: str, branch: Branch, dtype: torch.dtype) -> None:
    """Shifts of norms are small beside what bfloat16 rounds, and are not to be lost."""
    wide = tiny_model(family)
    for name, parameter in wide.named_parameters():
        if "norm" in name or ".ln_" in name:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data.add_(0.3 * noise)
    wide.to(dtype).float()  # the very values that the narrow one has
    narrow, need = copy.deepcopy(wide).to(dtype), some(wide, branch)
    found, wanted = merged(narrow, {branch: need}), merged(wide, {branch: need})
    for name, parameter in found.named_parameters():
        assert parameter.dtype == dtype
        torch.testing.assert_close(parameter, wanted.get_parameter(name).to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("family", "branch", "said"), REFUSED)
def test_half_precision_is_no_leave(family: str, branch: Branch, said: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    with pytest.raises(UnsupportedSurgery, match=said):
        merged(model, {branch: some(model, branch)})


def test_large_states_in_half_precision() -> None:
    """Whose squares are beyond it."""
    model: Any = tiny_model("llama").to(torch.float16)
    model.model.embed_tokens.weight.data.mul_(2000.0)
    assert merged(model, {"mlp": some(model, "mlp")}).mlp.up_proj.weight.dtype == torch.float16


def test_mlps_behind_unlike_mixers() -> None:
    """A convolution here and an attention there: each block's own other branch is silent."""
    import transformers

    config = transformers.Lfm2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv", "full_attention"], pad_token_id=0,
        block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.Lfm2ForCausalLM(config).eval()
    need = torch.zeros(2, 48)
    need[0, :20] = need[1, 20:] = 1.0
    found = merged(model, {"mlp": need}, range(1, 3))
    layers = model.model.layers
    x, wanted = torch.randn(2, 5, 32), torch.zeros(2, 5, 32)
    for layer, mine in ((layers[1], slice(0, 20)), (layers[2], slice(20, 48))):
        h, mlp = layer.ffn_norm(x), layer.feed_forward
        wanted += (nn.functional.silu(mlp.w1(h)) * mlp.w3(h))[..., mine] @ mlp.w2.weight[:, mine].T
    torch.testing.assert_close(found.feed_forward(found.ffn_norm(x)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["up_proj", "down_proj"])
def test_a_bias_in_one_block_alone_is_refused(path: str) -> None:
    model: Any = tiny_model("llama")
    need = some(model, "mlp")
    layer = getattr(model.model.layers[2].mlp, path)
    layer.bias = nn.Parameter(torch.ones(layer.out_features))
    with pytest.raises(UnsupportedSurgery, match="not built alike"):
        merged(model, {"mlp": need})


def test_a_model_that_is_being_trained_is_merged_without_its_dropout() -> None:
    model = tiny_model("gpt2")
    need = some(model, "mlp")
    wanted = merged(model, {"mlp": need}).state_dict()
    found = merged(model.train(), {"mlp": need})
    assert model.training and all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())


def test_what_is_spliced_beside_a_block_is_no_part_of_it() -> None:
    from streamline_hooks import LayerSurgeon, LinearReplacement

    model = tiny_model("llama")
    need = some(model, "attention")
    wanted = merged(model, {"attention": need}).state_dict()
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(3, LinearReplacement(32))
        found = merged(model, {"attention": need})
        for name, value in wanted.items():
            torch.testing.assert_close(found.state_dict()[name], value)


def test_a_norm_that_is_nearly_silent_in_the_first_block() -> None:
    model: Any = tiny_model("gpt_neox")
    need = some(model, "mlp")
    model.gpt_neox.layers[2].post_attention_layernorm.weight.data[5] = 1e-5
    assert merged(model, {"mlp": need}) is not None


def test_windows_of_another_length_are_another_kind_of_attention() -> None:
    import transformers

    config = transformers.MistralConfig(
        **{**tiny_config("llama").to_diff_dict(), "model_type": "mistral", "sliding_window": 4}
    )
    model: Any = transformers.MistralForCausalLM(config).eval()
    need = some(model, "attention")
    model.model.layers[3].self_attn.sliding_window = 12  # longer than what is tried
    with pytest.raises(UnsupportedSurgery, match=r"self_attn\.sliding_window"):
        merged(model, {"attention": need})
