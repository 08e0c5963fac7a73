"""A block's two residual branches: found by running it, proven, or refused with what did not hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import UnsupportedSurgery, find_stack
from streamline_hooks.modeling import branches_of
from streamline_hooks.modeling.block_call import BlockCall, observe_calls
from streamline_hooks.modeling.branches import BRANCHES, Branches, find_branches
from streamline_hooks.testing import causal_model_types, tiny_inputs, tiny_model

WIDTH = 16
ATTENTION_FIRST = {
    "bamba": ("mamba.out_proj.weight", "feed_forward.down_proj.weight"),
    "bloom": ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight"),
    "gemma2": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "gemma3_text": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "gpt2": ("attn.c_proj.weight", "mlp.c_proj.weight"),
    "granite": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "lfm2": ("conv.out_proj.weight", "feed_forward.w2.weight"),
    "llama": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "olmo2": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "opt": ("self_attn.out_proj.weight", "fc2.weight"),
}
PARALLEL = {
    "cohere": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "falcon": ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight"),
    "gpt_neox": ("attention.dense.weight", "mlp.dense_4h_to_h.weight"),
    "phi": ("self_attn.dense.weight", "mlp.fc2.weight"),
}
REFUSED = {
    "bert": "all output projections at zero",
    "deepseek_v4": "(batch, tokens, streams, features)",
    "gemma4_text": "the result of mlp.down_proj.weight",
    "mamba": "mixes tokens, so it has no mlp branch",
    "nemotron_h": "no mlp branch",
    "whisper": "encoder_attn.k_proj.weight was not used",
}


def found_in(model_type: str, k: int = 0, **overrides: object) -> Branches:
    if model_type not in causal_model_types():
        pytest.skip(f"this version of Transformers has no {model_type}")
    model = tiny_model(model_type, blocks=4, **overrides)
    found = branches_of(find_stack(model), [k])[k]
    if isinstance(found, UnsupportedSurgery):
        raise found
    return found


@pytest.mark.parametrize("model_type", [*ATTENTION_FIRST, *PARALLEL])
def test_branches_of_the_usual_kinds(model_type: str) -> None:
    found = found_in(model_type)
    attention, mlp = {**ATTENTION_FIRST, **PARALLEL}[model_type]
    assert found.first == ("attention" if model_type in ATTENTION_FIRST else None)
    assert attention in found.writers["attention"] and mlp in found.writers["mlp"]
    weights = [name for own in found.writers.values() for name in own if name.endswith("weight")]
    assert sorted(weights) == sorted([attention, mlp])
    assert set(found.sites) == ({"attention"} if found.first else set(BRANCHES))


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_block_that_does_something_else_is_refused_with_what(model_type: str) -> None:
    with pytest.raises(UnsupportedSurgery) as error:
        found_in(model_type)
    assert REFUSED[model_type] in str(error.value)


def test_opt_with_its_norms_behind_is_refused() -> None:
    with pytest.raises(UnsupportedSurgery, match=r"OPTDecoderLayer.*a norm on the residual stream"):
        found_in("opt", do_layer_norm_before=False)


def test_biases_belong_to_the_projection() -> None:
    assert found_in("gpt2").writers["mlp"] == ("mlp.c_proj.bias", "mlp.c_proj.weight")
    assert found_in("gpt_oss").writers["mlp"] == ("mlp.experts.down_proj", "mlp.experts.down_proj_bias")


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "granitemoehybrid", "jamba"])
def test_every_expert_and_the_shared_one_but_no_router(model_type: str) -> None:
    model = tiny_model(model_type, blocks=4)
    block = find_stack(model)[1]
    found = branches_of(find_stack(model), [1])[1]
    assert isinstance(found, Branches)
    down = [n for n, _ in block.named_parameters() if any(name in n for name in ("down_proj", "output_linear", ".w2."))]
    assert sorted(found.writers["mlp"]) == sorted(down)


# Blocks made here, whose branches are known


class Mixing(nn.Module):
    """Each token is given the mean of those up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        counts = torch.arange(1, state.shape[1] + 1)[:, None]
        return self.out(self.value(state).cumsum(dim=1) / counts)


class Experts(nn.ModuleList):
    """Each token goes to one expert, chosen by the sign of its first feature: the third is never chosen."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH, bias=False)) for _ in range(experts)
        )

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        made = torch.zeros_like(state)
        for expert, chosen in zip(self, (state[..., 0] >= 0, state[..., 0] < 0), strict=False):
            made[chosen] = expert(state[chosen])
        return made


class Block(nn.Module):
    """z = m + c M(n(m)), m = x + c A(n(x)); the ways in which it is not that are named."""

    def __init__(self, way: str = "", multiplier: float = 1.0, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.way, self.multiplier = way, multiplier
        self.norm, self.other_norm, self.last_norm = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.mixing = Mixing()
        self.mlp = mlp or nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.forget = 0

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        first, second = (self.mlp, self.mixing) if self.way == "mlp first" else (self.mixing, self.mlp)
        if self.way == "parallel":
            return state + self.multiplier * self.mixing(self.norm(state)) + self.mlp(self.other_norm(state))
        between = state + self.multiplier * first(self.norm(state))
        if self.way == "norm of the branch":
            return between + self.last_norm(second(self.other_norm(between)))
        if self.way == "reads both":
            return between + second(self.other_norm(between) + 0.1 * state)
        if self.way == "scaled stream":
            return 0.9 * between + second(self.other_norm(between))
        if self.way == "remembers":
            self.forget += 1
            return between + self.forget * second(self.other_norm(between))
        return between + self.multiplier * second(self.other_norm(between))


def call_of(block: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> BlockCall:
    generator = torch.Generator().manual_seed(seed)
    for parameter in block.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
    state = torch.randn(2, 6, WIDTH, generator=generator).to(dtype)
    block = block.to(dtype).eval()
    with torch.no_grad():
        return BlockCall(block, (state,), {}, block(state))


@settings(max_examples=40)
@given(
    st.sampled_from(["", "parallel", "mlp first"]),
    st.sampled_from([1.0, 0.22, 3.0]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_zeroing_leaves_the_branch_out(way: str, multiplier: float, dtype: torch.dtype, seed: int) -> None:
    call = call_of(Block(way, multiplier), seed, dtype)
    found = find_branches(call)
    assert found.first == {"": "attention", "parallel": None, "mlp first": "mlp"}[way]
    block, x = call.block, call.state

    def left_out(branch: str) -> torch.Tensor:
        """The block with a branch replaced by nothing, by the modules that it is known to have."""
        own = block.mixing if branch == "attention" else block.mlp
        handle = own.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        try:
            return block(x)
        finally:
            handle.remove()

    with torch.no_grad():
        for branch in BRANCHES:
            zeros = {name: torch.zeros_like(block.get_parameter(name)) for name in found.writers[branch]}
            assert torch.equal(call.run(x, zeros), left_out(branch))


@pytest.mark.parametrize("nothing", [1e-30, 0.0])
def test_branches_that_do_next_to_nothing_are_told_apart(nothing: float) -> None:
    """Planted redundancy: projections of nearly zero must not hide which branch is which."""
    for way, first in {"": "attention", "parallel": None, "mlp first": "mlp"}.items():
        call = call_of(Block(way))
        expected = find_branches(call)
        for name in (n for own in expected.writers.values() for n in own):
            call.block.get_parameter(name).data.mul_(nothing)
        with torch.no_grad():
            call = BlockCall(call.block, call.args, call.kwargs, call.block(call.state))
        found = find_branches(call)
        assert found.first == first and found.writers == expected.writers


def test_an_expert_that_no_token_chose_is_zeroed_too() -> None:
    found = find_branches(call_of(Block(mlp=Experts())))
    assert found.writers["mlp"] == ("mlp.0.2.weight", "mlp.1.2.weight", "mlp.2.2.weight")


def test_a_part_that_was_not_run_is_named() -> None:
    block = Block()
    block.sometimes = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(UnsupportedSurgery, match=r"sometimes.weight was not used"):
        find_branches(call_of(block))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Block("norm of the branch"), "all output projections at zero"),  # its bias is added all the same
        (lambda: Block("scaled stream"), "all output projections at zero"),
        (lambda: Block("reads both"), "not the sum"),
        (lambda: Block("remembers"), "differs between two runs"),
        (lambda: Block(mlp=Mixing()), "no mlp branch"),
        (lambda: Block(mlp=nn.Identity()), "all output projections at zero"),
    ],
)
def test_what_is_not_two_branches_is_refused(make: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(UnsupportedSurgery, match=rf"two residual branches.*{text}"):
        find_branches(call_of(make()))


def test_nothing_of_the_block_is_changed() -> None:
    call = call_of(Block())
    before = [(n, id(p), p.clone(), p.requires_grad, p.grad) for n, p in call.block.named_parameters()]
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in call.block.modules()]
    find_branches(call)
    after = [(n, id(p), p, p.requires_grad, p.grad) for n, p in call.block.named_parameters()]
    for (name, identity, value, *rest), (name_, identity_, value_, *rest_) in zip(before, after, strict=True):
        assert (name, identity, rest) == (name_, identity_, rest_) and torch.equal(value, value_)
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in call.block.modules()]


def test_frozen_parameters_are_no_obstacle() -> None:
    call = call_of(Block())
    call.block.requires_grad_(False)
    assert find_branches(call).first == "attention"


def test_a_single_token_shows_nothing() -> None:
    block = Block().eval()
    state = torch.randn(2, 1, WIDTH)
    with pytest.raises(UnsupportedSurgery, match="at least two tokens"):
        find_branches(BlockCall(block, (state,), {}, block(state).detach()))


def test_an_offloaded_block_is_refused() -> None:
    call = call_of(Block())
    call.block.to("meta")
    with pytest.raises(UnsupportedSurgery, match=r"parameters.*offloaded"):
        find_branches(call)


def test_a_block_that_is_called_twice_is_refused() -> None:
    block = Block().eval()
    error = observe_calls({7: block}, lambda: block(block(torch.randn(1, 4, WIDTH))))[7]
    assert isinstance(error, UnsupportedSurgery) and "Block 7 was called 2 times in one forward; expected once" in str(
        error
    )
    assert not block._forward_hooks and not block._forward_pre_hooks


def test_a_cache_that_is_handed_in_is_not_filled() -> None:
    """Some models make one whatever they are told, and a block would see its own keys again."""
    assert found_in("granitemoe_swa", 2).first == "attention"


def test_pytorchs_own_encoder() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, norm_first=True, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    found = branches_of(find_stack(model), [1], {"src": torch.randn(2, 5, WIDTH)})[1]
    assert isinstance(found, Branches)
    assert found.writers["attention"] == ("self_attn.out_proj.bias", "self_attn.out_proj.weight")
    assert found.writers["mlp"] == ("linear2.bias", "linear2.weight")


def test_padding_does_not_matter_to_what_is_found() -> None:
    model = tiny_model("qwen3", blocks=2)
    batch = tiny_inputs(model, left_padding=True)
    assert branches_of(find_stack(model), [0], batch) == branches_of(find_stack(model), [0])
