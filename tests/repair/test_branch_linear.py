"""A linear map in the place of one branch: least squares, and the block computed by hand with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.modeling import BRANCHES, read_input, read_output, write_output
from streamline_hooks.repair.branch_linear import BranchLinear, fit_branch_linear, replace_branches
from streamline_hooks.testing import tiny_model as tiny
from tests.surgery.test_surgeon import fingerprint, logits
from tests.tiny_models import BLOCKS, WIDTH, Nudge, left_padded, tiny_model, tokens

# What each branch adds, and the norm before each, by names known here.
NAMES = {
    "llama": (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")),
    "qwen3": (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")),
    "gpt2": (("attn", "ln_1"), ("mlp", "ln_2")),
    "opt": (("self_attn", "self_attn_layer_norm"), ("fc2", "final_layer_norm")),
}
families = st.sampled_from(list(NAMES))
halves = st.tuples(st.integers(0, BLOCKS - 1), st.sampled_from(BRANCHES))


def a_map(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)


@contextmanager
def by_hand(model: nn.Module, maps: dict[tuple[int, str], torch.Tensor]) -> Iterator[None]:
    """In the place of what a branch adds: the state before its norm, times a map."""
    names, stack = NAMES[model.config.model_type], find_stack(model)
    with ExitStack() as exits:
        for (k, branch), map_ in maps.items():
            own, norm = (stack[k].get_submodule(name) for name in names[BRANCHES.index(branch)])
            kept: dict[str, torch.Tensor] = {}

            def enter(m, args, kwargs, kept=kept):
                kept.update(state=read_input(args, kwargs).clone())

            def leave(m, args, out, kept=kept, map_=map_):
                return write_output(out, (kept["state"] @ map_.to(kept["state"])).reshape(read_output(out).shape))

            exits.callback(norm.register_forward_pre_hook(enter, with_kwargs=True).remove)
            exits.callback(own.register_forward_hook(leave).remove)
        yield


def fitted_of(maps: dict[tuple[int, str], torch.Tensor]) -> list[BranchLinear]:
    return [BranchLinear(k, b, b == "attention", map_, 0.0, 0.0, 0.0) for (k, b), map_ in maps.items()]


@settings(max_examples=16)
@given(families, st.lists(halves, min_size=1, max_size=6, unique=True), st.booleans())
def test_it_is_the_block_with_the_branch_computed_by_hand(
    family: str, wanted: Sequence[tuple[int, str]], padded: bool
) -> None:
    """In whatever order: neighboring maps stand at one place, and must run in the blocks' own order."""
    model = tiny_model(family).double()
    before = fingerprint(model)
    maps = {half: a_map(seed) for seed, half in enumerate(wanted)}
    batch = left_padded(3, 9) if padded else None
    with by_hand(model, maps):
        expected = logits(model, batch)
    with LayerSurgeon(model) as surgeon:
        modules = replace_branches(surgeon, fitted_of(maps))
        got = logits(model, batch)
        assert [torch.equal(m.projection.weight, maps[half].T) for half, m in zip(maps, modules, strict=True)]
        assert sum(map(len, surgeon.plan.zeroed.values())) == len(surgeon.plan.splices) == len(maps)
    real = slice(None) if batch is None else batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)
    assert fingerprint(model) == before


@settings(max_examples=12)
@given(families, halves, st.integers(0, 5))
def test_the_map_is_weighted_least_squares(family: str, half: tuple[int, str], seed: int) -> None:
    model = tiny_model(family).double()
    fit, held_out = tokens(6, 11, seed), tokens(3, 11, seed + 10)
    (fitted,) = fit_branch_linear(model, [half], [fit], [held_out])
    assert (fitted.block, fitted.branch, fitted.is_first) == (*half, half[1] == "attention")
    kept: list[tuple[torch.Tensor, ...]] = []
    own, norm = (find_stack(model)[half[0]].get_submodule(n) for n in NAMES[family][BRANCHES.index(half[1])])
    entered: list[torch.Tensor] = []
    handles = [
        norm.register_forward_hook(lambda m, args, out: entered.append(args[0])),
        own.register_forward_hook(lambda m, args, out: kept.append((entered.pop(), read_output(out)))),
    ]
    for ids in (fit, held_out):
        logits(model, {"input_ids": ids})
    for handle in handles:
        handle.remove()
    x, added = (torch.cat([s.reshape(-1, WIDTH) for s in states]).numpy() for states in zip(*kept, strict=True))
    w = 1 / np.linalg.norm(x + added, axis=-1, keepdims=True)
    penalty = np.sqrt(fitted.ridge * np.square(x * w).sum() / WIDTH) * np.eye(WIDTH)
    expected = np.linalg.lstsq(np.vstack([x * w, penalty]), np.vstack([added * w, 0 * penalty]), rcond=None)[0]
    np.testing.assert_allclose(fitted.map.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_it_comes_nearer_than_zeros() -> None:
    model = tiny_model("llama")
    fit, held_out = [tokens(40, 12)], [tokens(10, 12, seed=1)]
    wanted = [(4, "mlp"), (2, "attention"), (-1, "mlp")]
    fitted = fit_branch_linear(model, wanted, fit, held_out)
    assert [(f.block, f.branch) for f in fitted] == [(4, "mlp"), (2, "attention"), (5, "mlp")]
    assert all(one.held_out_error < one.removal_error for one in fitted)


def test_other_operations_may_follow() -> None:
    model, map_ = tiny_model("llama").double(), a_map(0)
    with LayerSurgeon(model) as surgeon:
        replace_branches(surgeon, fitted_of({(2, "mlp"): map_}))
        surgeon.replace([3], Nudge())
        surgeon.insert(3, Nudge(seed=1))
        got = logits(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([3], Nudge())
        surgeon.insert(3, Nudge(seed=1))
        with by_hand(model, {(2, "mlp"): map_}):
            torch.testing.assert_close(got, logits(model), rtol=1e-5, atol=1e-5)


def test_a_cache_and_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("llama")
    batch = left_padded(2, 7)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with LayerSurgeon(model) as surgeon:
        replace_branches(surgeon, fitted_of({(2, "attention"): a_map(0), (5, "mlp"): a_map(1)}))
        with_cache = model.generate(**batch, **options, use_cache=True)
        assert torch.equal(with_cache, model.generate(**batch, **options, use_cache=False))
        surgeon.commit()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


# Saying no


@pytest.mark.parametrize("model_type", ["gpt_neox", "phi", "falcon"])
def test_parallel_branches_are_refused(model_type: str) -> None:
    model = tiny(model_type, blocks=3)
    with pytest.raises(UnsupportedSurgery, match=r"block 1.*MLP"):
        fit_branch_linear(model, [(1, "attention")], [tokens(2, 6)], [tokens(2, 6)])


@pytest.mark.parametrize("before", ["splice", "slot", "window before", "another call"])
def test_a_map_that_would_not_be_the_first_behind_its_block_is_refused(before: str) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        if before == "splice":
            surgeon.insert(3, Nudge())
        elif before == "slot":
            surgeon.insert(3, surgeon.stack[0])
        elif before == "window before":
            surgeon.insert(3, Nudge())
            surgeon.remove([3])
        else:
            replace_branches(surgeon, fitted_of({(3, "attention"): a_map(0)}))
        plan = surgeon.plan
        with pytest.raises(StreamlineError, match=r"already.*block 2 .*mlp"):
            replace_branches(surgeon, fitted_of({(2, "mlp"): a_map(1)}))
        assert surgeon.plan == plan
        replace_branches(surgeon, fitted_of({(2, "attention"): a_map(1)}))  # before the block


def test_a_stand_in_of_a_later_window_is_no_hindrance() -> None:
    model, map_ = tiny_model("llama").double(), a_map(0)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([3], Nudge())
        with by_hand(model, {(2, "mlp"): map_}):
            expected = logits(model)
        replace_branches(surgeon, fitted_of({(2, "mlp"): map_}))
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_meant() -> None:
    model, batches = tiny_model("llama"), [tokens(2, 6)]
    for wanted, text in [
        ([], r"blocks=\[\] is empty"),
        ([(9, "mlp")], r"block 9.*6 blocks"),
    ]:
        with pytest.raises(StreamlineError, match=text):
            fit_branch_linear(model, wanted, batches, batches)
