"""A map folded into one branch of a block: what is computed, what comes back, what is saved, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.modeling import BRANCHES, read_output, write_output
from streamline_hooks.surgery import fold
from streamline_hooks.testing import tiny_inputs
from streamline_hooks.testing import tiny_model as tiny
from tests.surgery.test_surgeon import fingerprint, logits
from tests.surgery.test_zeroed_branches import MODULES as ZEROED_MODULES
from tests.tiny_models import BLOCKS, WIDTH, tiny_model

# The modules whose output is what a branch adds, known here by name.
MODULES = {**{name: own for name, own in ZEROED_MODULES.items() if name != "gemma2"}, "gptj": ("attn", "mlp")}
FAMILIES = ("llama", "opt", "gpt2", "gpt_neox", "qwen3")
families = st.sampled_from(FAMILIES)
branches = st.sampled_from(BRANCHES)
blocks = st.integers(0, BLOCKS - 1)


def a_map(features: int = WIDTH, seed: int = 0, size: float = 0.5) -> torch.Tensor:
    """Not symmetric, and not near to the identity."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return torch.eye(features, dtype=torch.float64) + size * noise / features**0.5


def times(map_: torch.Tensor) -> Callable[..., object]:
    """A hook that multiplies a map onto what a module returns."""

    def hook(module: nn.Module, args: object, output: object) -> object:
        added = read_output(output)
        return write_output(output, added @ map_.to(added))

    return hook


def width(model: nn.Module) -> int:
    return int(model.config.get_text_config().hidden_size)


@pytest.mark.sample(8)
@pytest.mark.parametrize("model_type", MODULES)
@pytest.mark.parametrize("branch", BRANCHES)
def test_folded_equals_the_unfolded_map(model_type: str, branch: str) -> None:
    model = tiny(model_type, blocks=3)
    if "experts" not in str(model):  # whose kernels take no float64
        model.double()
    own = find_stack(model)[1].get_submodule(MODULES[model_type][BRANCHES.index(branch)])
    map_ = a_map(width(model))
    for left_padding in (False, True):
        batch = tiny_inputs(model, left_padding=left_padding)
        handle = own.register_forward_hook(times(map_))
        expected = logits(model, batch)
        handle.remove()
        with LayerSurgeon(model) as surgeon:
            surgeon.fold(1, map_, branch)
            torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)  # norms are in float32
        assert not torch.allclose(logits(model, batch), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "qwen2_moe"])
def test_folding_keeps_the_precision(model_type: str, dtype: torch.dtype) -> None:
    """Each weight is the exact product, rounded once."""
    model = tiny(model_type, blocks=3).to(dtype)
    before = {n: p.detach().clone() for n, p in find_stack(model)[1].named_parameters()}
    map_ = a_map(width(model), size=0.05)  # near the identity, where a wrong axis would hardly show
    with LayerSurgeon(model) as surgeon:
        for branch in BRANCHES:
            surgeon.fold(1, map_, branch)
        changed = {n: p for n, p in find_stack(model)[1].named_parameters() if not torch.equal(p, before[n])}
        assert changed and all(p.dtype == dtype for p in changed.values())
        for name, parameter in changed.items():
            axis = 1 if model_type == "gpt2" and parameter.ndim == 2 else max(parameter.ndim - 2, 0)
            wide = before[name].double().movedim(axis, -1) @ map_
            assert torch.equal(parameter, wide.movedim(-1, axis).to(dtype)), name


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_that_no_token_chose_are_folded_too(model_type: str) -> None:
    model = tiny(model_type, blocks=3)
    block, map_ = find_stack(model)[1], a_map(width(tiny(model_type, blocks=3)))
    before = {n: p.detach().clone() for n, p in block.named_parameters()}
    with LayerSurgeon(model) as surgeon:
        surgeon.fold(1, map_)
        after = {n: p.detach().clone() for n, p in block.named_parameters()}
    folded = {n for n in before if "down_proj" in n or "w2" in n}
    assert folded and {n for n in before if not torch.equal(before[n], after[n])} == folded
    for name in folded:
        expected = before[name].double().movedim(-2, -1) @ map_
        torch.testing.assert_close(after[name].double().movedim(-2, -1), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=10)
@given(families, blocks, branches, st.integers(0, 3))
def test_folding_twice_composes(family: str, k: int, branch: str, seed: int) -> None:
    model = tiny_model(family).double()
    first, second = a_map(seed=seed), a_map(seed=seed + 10)
    with LayerSurgeon(model) as surgeon:
        surgeon.fold(k, first @ second, branch)
        expected = logits(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.fold(k, first, branch)
        surgeon.fold(k, second, branch)
        torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-7)
        assert surgeon.plan.folded == {k: (branch,)}


@pytest.mark.parametrize("order", [("zero_branch", "fold"), ("fold", "zero_branch")])
def test_a_zeroed_branch_stays_zero(order: tuple[str, str]) -> None:
    model = tiny_model("gpt2")
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(2, "mlp")
        expected = logits(model)
    with LayerSurgeon(model) as surgeon:
        for operation in order:
            surgeon.zero_branch(2, "mlp") if operation == "zero_branch" else surgeon.fold(2, a_map())
        assert torch.equal(logits(model), expected)
        assert surgeon.plan.zeroed == {2: ("mlp",)} and surgeon.plan.folded == {}


def test_no_parameter_is_new_and_what_is_trained_stays_so() -> None:
    model = tiny_model("llama")
    model.requires_grad_(False)
    projection = find_stack(model)[1].mlp.down_proj
    projection.weight.requires_grad_(True)
    before = [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()]
    with LayerSurgeon(model) as surgeon:
        surgeon.fold(1, a_map())
        surgeon.fold(1, a_map(), "attention")
        assert [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()] == before
        folded = projection.weight
        surgeon.remove([4])
        assert projection.weight is folded  # an optimizer goes on knowing it


# The check must be able to fail


def test_a_map_on_the_wrong_axis_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    monkeypatch.setattr(fold, "output_axis", lambda *given: 1)  # of a square matrix, which either axis fits
    with LayerSurgeon(model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match=r"attention branch of block 2.*rounding of"):
            surgeon.fold(2, a_map(), "attention")
        assert surgeon.plan.folded == {}
        surgeon.fold(2, torch.eye(WIDTH), "attention")  # to which axes are the same
    assert fingerprint(model) == before


def test_a_bias_that_is_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    every = fold.BranchProbe.groups
    weights = lambda self: [paths for paths in every(self) if "bias" not in paths[0]]  # noqa: E731
    monkeypatch.setattr(fold.BranchProbe, "groups", weights)
    with (
        LayerSurgeon(model) as surgeon,
        pytest.raises(UnsupportedSurgery, match=r"with the map multiplied .* differs by"),
    ):
        surgeon.fold(2, a_map())


def test_an_overflow_is_refused() -> None:
    model = tiny_model("llama", torch.float16)
    with LayerSurgeon(model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match=r"mlp.down_proj.weight.*torch.float16"):
            surgeon.fold(2, 1e6 * torch.eye(WIDTH))
        assert surgeon.plan.folded == {}


class Ending(nn.Module):
    """A plain pre-norm block, with something between its MLP and the residual stream."""

    def __init__(self, ending: Callable[[torch.Tensor], torch.Tensor], width: int = 16) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        self.norm, self.ending = nn.LayerNorm(width), ending

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        normed = self.norm(state)
        state = state + self.attention(normed, normed, normed, need_weights=False)[0]
        return state + self.ending(self.mlp(state))


ENDINGS: dict[str, tuple[bool, Callable[[torch.Tensor], torch.Tensor]]] = {
    "nothing": (True, lambda added: added),
    "one factor": (True, lambda added: 0.22 * added),
    "a norm without weights": (False, lambda added: nn.functional.rms_norm(added, added.shape[-1:])),
    "a factor a feature": (False, lambda added: added * torch.linspace(0.5, 1.5, 16).to(added)),
    "a clamp": (False, lambda added: added.clamp(-1.0, 1.0)),
    "only the sign": (False, lambda added: added.relu()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_comes_behind_the_projections_decides(ending: str, dtype: torch.dtype) -> None:
    linear, module = ENDINGS[ending]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Sequential(*(Ending(module) for _ in range(3)))).to(dtype).eval()
    batch = {"input": torch.randn(2, 6, 16, dtype=dtype)}
    with LayerSurgeon(model) as surgeon:
        if linear:
            surgeon.fold(1, a_map(16), batch=batch)
        else:
            with pytest.raises(UnsupportedSurgery, match=r"mlp branch of block 1 .*more than a sum"):
                surgeon.fold(1, a_map(16), batch=batch)


@pytest.mark.parametrize("feature", range(8))
def test_a_factor_on_one_feature_comes_behind_the_projections_whichever_it_is(feature: int) -> None:
    scales = torch.ones(8)
    scales[feature] = 2.0
    model = nn.Sequential(nn.Identity(), nn.Sequential(*(Ending(lambda added: added * scales, 8) for _ in range(3))))
    with LayerSurgeon(model.eval()) as surgeon, pytest.raises(UnsupportedSurgery, match="more than a sum"):
        surgeon.fold(1, a_map(8), batch={"input": torch.randn(2, 6, 8)})


def test_a_factor_for_each_of_two_features_is_refused() -> None:
    """A probe map that does not exchange the features would commute with the factors."""
    scales = torch.tensor([0.5, 1.5])
    model = nn.Sequential(nn.Identity(), nn.Sequential(*(Ending(lambda added: added * scales, 2) for _ in range(3))))
    with LayerSurgeon(model.eval()) as surgeon, pytest.raises(UnsupportedSurgery, match="more than a sum"):
        surgeon.fold(1, a_map(2), batch={"input": torch.randn(2, 6, 2)})


# Saying no


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_norm_behind_the_branch_is_refused(model_type: str, branch: str) -> None:
    model = tiny(model_type, blocks=3)
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon:
        text = rf"{branch} branch of block 1.*weight.*more than a sum.*a norm, as in Gemma"
        with pytest.raises(UnsupportedSurgery, match=text) as error:
            surgeon.fold(1, a_map(width(model)), branch)
        assert error.value.cause == "fold"
    assert fingerprint(model) == before


def test_a_norm_on_the_residual_stream_is_refused() -> None:
    from tests.tiny_models import tiny_config

    model = AutoModelForCausalLM.from_config(tiny_config("opt", do_layer_norm_before=False)).eval()
    with LayerSurgeon(model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match=r"OPTDecoderLayer .*a norm on the residual stream") as error:
            surgeon.fold(1, a_map())
        assert error.value.cause == "branches"


@pytest.mark.parametrize(
    ("k", "map_", "branch", "text"),
    [
        (6, a_map(), "mlp", r"fold\(6, ...\).*does not exist.*\[0, 1, 2, 4, 5\]"),
        (1, a_map(), "ffn", r"'ffn' is unknown.*attention, mlp"),
        (1, a_map(WIDTH + 1), "mlp", r"\(33, 33\).*block 1.*32 features"),
        (1, a_map()[:3], "mlp", r"\(3, 32\).*\(features, features\)"),
        (1, a_map() * float("nan"), "mlp", "NaN or infinite"),
        (3, a_map(), "mlp", r"fold\(3, ...\).*removed"),
    ],
)
def test_what_is_not_there_cannot_be_folded(k: int, map_: torch.Tensor, branch: str, text: str) -> None:
    with LayerSurgeon(tiny_model("llama")) as surgeon:
        surgeon.remove([3])
        with pytest.raises(StreamlineError, match=text):
            surgeon.fold(k, map_, branch)
