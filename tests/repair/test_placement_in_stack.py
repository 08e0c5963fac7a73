"""Every kind put into a model: what is trained, what it sees, how it generates, and what a checkpoint gives back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, find_stack
from streamline_hooks.cli import parse_replacement
from streamline_hooks.modeling import BlockCall
from streamline_hooks.repair import WindowReplacement, fit_windows, insert_replacement
from streamline_hooks.repair.inherited_blocks import InheritedBlocks, inherit_blocks, inherit_without_attention
from streamline_hooks.replacements import LinearReplacement
from tests.repair.replacement_modules import FIT, HELD_OUT, KINDS, SLOTS
from tests.surgery.test_surgeon import fingerprint
from tests.tiny_models import FAMILIES, Nudge, left_padded, tiny_model, tokens

WINDOW = range(2, 5)


def fitted(model: nn.Module, kind: str) -> WindowReplacement:
    (repair,) = fit_windows(model, [WINDOW], parse_replacement(kind), FIT, HELD_OUT)
    return repair.replacement_module


def logits(model: nn.Module, batch: Any = None) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, 9) if batch is None else batch).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_goes_in_and_out_to_the_bit(family: str, kind: str) -> None:
    model = tiny_model(family)
    replacement_module = fitted(model, kind)
    before, whole = fingerprint(model), logits(model)
    with LayerSurgeon(model) as surgeon:
        trained = insert_replacement(surgeon, WINDOW, replacement_module)
        slots = SLOTS.get(kind, 0)
        assert len(surgeon.plan.slots) == len(find_stack(model)) == 3 + slots
        assert surgeon.plan.removed == (2, 3, 4)
        inside = {id(module) for module in model.modules()}
        assert all(id(module) in inside for module in trained)
        assert bool(trained) == (kind not in ("none", "folded", "scale"))
        changed = logits(model)
    assert fingerprint(model) == before and torch.equal(logits(model), whole)
    assert not torch.allclose(changed, whole, atol=1e-2)


def test_several_inherited_blocks_take_a_block_each_and_the_last_the_rest() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        two = inherit_blocks(find_stack(model), range(1, 5), 2)
        assert isinstance(two, InheritedBlocks)
        assert insert_replacement(surgeon, range(1, 5), two) == list(two)
        assert [slot.source for slot in surgeon.plan.slots] == [0, None, None, 5]
        assert list(find_stack(model).blocks) == [surgeon.stack[0], *two, surgeon.stack[5]]


def test_windows_beside_one_another_keep_their_order() -> None:
    model = tiny_model("gemma3")  # whose blocks differ by their number
    stack = find_stack(model)
    left, right = inherit_blocks(stack, range(0, 3), 2), inherit_blocks(stack, range(3, 6), 2)
    with LayerSurgeon(model) as surgeon:
        insert_replacement(surgeon, range(3, 6), right)
        insert_replacement(surgeon, range(0, 3), left)
        assert list(find_stack(model).blocks) == [*left, *right]  # type: ignore[misc]
        assert model.config.layer_types == [
            "sliding_attention",
            "full_attention",
            "full_attention",
            "sliding_attention",
        ]


def test_a_zeroed_attention_is_not_trained() -> None:
    model = tiny_model("llama")
    block = inherit_without_attention(find_stack(model), WINDOW)
    with LayerSurgeon(model) as surgeon:
        trained = insert_replacement(surgeon, WINDOW, block)
        parameters = {id(p) for module in trained for p in module.parameters()}
        own = {name: id(p) for name, p in block.named_parameters()}
        assert parameters == set(own.values()) - {own["self_attn.o_proj.weight"]}
        optimizer = torch.optim.AdamW([p for module in trained for p in module.parameters()], lr=0.1)
        for _ in range(2):
            model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
            optimizer.step()
        assert not block.self_attn.o_proj.weight.any()
        assert not torch.equal(block.mlp.down_proj.weight, surgeon.stack[2].mlp.down_proj.weight)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.free, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)


def test_frozen_parts_of_a_module_are_not_among_what_is_trained() -> None:
    model, halves = tiny_model("llama"), Halves()
    whole = Halves()
    whole.scale = nn.Parameter(torch.ones(4))
    for module, wanted in ((halves, [halves.free]), (whole, [whole]), (nn.Identity(), [])):
        with LayerSurgeon(model, probe=False) as surgeon:
            assert insert_replacement(surgeon, WINDOW, module) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_causal(kind: str) -> None:
    """Changing token t never changes what is said before t."""
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        insert_replacement(surgeon, WINDOW, fitted_once(kind))
        ids = tokens(2, 12)
        whole = logits(model, ids)
        for t in (1, 5, 11):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 7) % 50 + 3
            other = logits(model, changed)
            assert torch.equal(other[:, :t], whole[:, :t])
            assert not torch.allclose(other[:, t], whole[:, t], atol=1e-4)


def fitted_once(kind: str) -> WindowReplacement:
    return fitted(tiny_model("llama"), kind)


def test_a_module_that_looks_ahead_is_seen_as_such() -> None:
    """The check above can fail."""

    class Mean(nn.Module):
        def forward(self, state: torch.Tensor) -> torch.Tensor:
            return state + state.mean(dim=1, keepdim=True)

    model, ids = tiny_model("llama"), tokens(1, 8)
    with LayerSurgeon(model) as surgeon:
        insert_replacement(surgeon, WINDOW, Mean())
        changed = ids.clone()
        changed[:, 5] += 1
        assert not torch.equal(logits(model, ids)[:, :5], logits(model, changed)[:, :5])


@pytest.mark.parametrize("kind", SLOTS)
def test_gradients_of_blocks_are_those_of_finite_differences(kind: str) -> None:
    """In an architecture whose arithmetic stays in float64."""
    model = tiny_model("opt", torch.float64)
    replacement_module = fitted(model, kind)
    blocks = list(replacement_module) if isinstance(replacement_module, InheritedBlocks) else [replacement_module]
    state = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    calls = [BlockCall(block, (state,), {}, state) for block in blocks]
    small = [name for name, p in blocks[-1].named_parameters() if p.requires_grad and p.numel() < 50]  # type: ignore[union-attr]
    assert ("self_attn.out_proj.bias" in small) == (kind != "silenced") and "fc2.bias" in small

    def run(state: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        for call in calls[:-1]:
            state = functional_call(call.block, {}, (state,))
            state = state[0] if isinstance(state, tuple) else state
        made = functional_call(calls[-1].block, dict(zip(small, values, strict=True)), (state,))
        return made[0] if isinstance(made, tuple) else made

    values = [blocks[-1].get_parameter(name).detach().requires_grad_() for name in small]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(run, (state, *values))


@pytest.mark.sample(16)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_back_from_a_checkpoint_and_generates_with_a_cache(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    with LayerSurgeon(model) as surgeon:
        if family == "gemma3" and kind in ("folded", "scale"):  # a norm follows each branch
            with pytest.raises(UnsupportedSurgery):
                insert_replacement(surgeon, WINDOW, fitted(model, kind))
            return
        insert_replacement(surgeon, WINDOW, fitted(model, kind))
        surgeon.commit(kind=kind)
    model.save_pretrained(tmp_path)
    plain = type(tiny_model(family))
    spliced = kind.partition(":")[0] in ("linear", "mlp", "swiglu")
    if spliced:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:  # a plain checkpoint of its architecture
        said = json.loads((tmp_path / "config.json").read_text())
        assert (said["model_type"], said["architectures"]) == (plain.config_class.model_type, [plain.__name__])
        loaded = plain.from_pretrained(tmp_path)
        assert type(loaded) is plain
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.streamline_hooks["history"][0]["kind"] == kind
    batch, options = left_padded(2, 7), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with_cache, without = (loaded.generate(**batch, **options, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)


def test_a_splice_of_an_earlier_surgery_stays_before_what_is_put_in() -> None:
    model, nudge = tiny_model("llama"), Nudge()
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(2, nudge)
        surgeon.insert(5, LinearReplacement(32))
        surgeon.commit()
    block = inherit_blocks(find_stack(model), WINDOW)
    with LayerSurgeon(model) as surgeon:
        insert_replacement(surgeon, WINDOW, block)
        assert list(find_stack(model)[2].spliced_before) == [nudge]
        assert len(find_stack(model)[3].spliced_before) == 1
