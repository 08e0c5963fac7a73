"""Checks for models that are not causal language models: each passes, or is refused for a listed reason."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from streamline_hooks import LayerSurgeon, find_stack, fit_windows, load, save
from streamline_hooks.checkpoint import read_plans
from streamline_hooks.modeling import read_input, read_output, write_output
from streamline_hooks.repair import FoldedConfig, LinearConfig
from streamline_hooks.replacements import LinearReplacement
from tests.other_models import OTHERS, answer, made

WIDTH = 32
# Last module of each branch: the first of these paths that a block has. Versions of Transformers differ.
ENDS = {
    "attention": (
        "attention.o_proj", "attention.output.dense", "self_attn.out_proj", "self_attn.o_proj", "attn.proj", "attn.Wo",
        "layer.0.SelfAttention.o",
    ),
    "mlp": ("mlp.fc2", "output.dense", "mlp.down_proj", "fc2", "mlp.Wo", "layer.1.DenseReluDense.wo"),
}  # fmt: skip


def identity_changes_nothing(name: str) -> None:
    """Check that inserting an identity leaves the outputs unchanged bit for bit."""
    model = made(name)
    before = answer(model, name)
    with LayerSurgeon(model, OTHERS[name].path(model)) as surgeon:
        surgeon.insert(2, nn.Identity())
        assert torch.equal(answer(model, name), before)
    assert torch.equal(answer(model, name), before)


def removal_equals_bypass(name: str) -> None:
    """Check removal and replacement of a block against a bypass by hooks, and that the model is restored."""
    model = made(name)
    stack = find_stack(model, OTHERS[name].path(model))
    before, weights = answer(model, name), {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    nudge = LinearReplacement.from_map(0.1 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)))
    for module in (None, nudge):
        with bypassed(stack[1], module):
            expected = answer(model, name)
        assert not torch.allclose(expected, before, atol=1e-3)
        with LayerSurgeon(model, stack.path) as surgeon:
            surgeon.replace([1], module)
            torch.testing.assert_close(answer(model, name), expected, rtol=1e-4, atol=1e-5)
    require_restored(model, name, before, weights)
    assert model.config.to_dict() == config


def commit_is_restored_from_checkpoint(name: str) -> None:
    """Check that committed removals and replacements are loaded from a checkpoint."""
    for repaired in (False, True):
        model, case = made(name), OTHERS[name]
        length = len(find_stack(model, case.path(model)))
        with LayerSurgeon(model, case.path(model)) as surgeon:
            if repaired:
                map_ = 0.1 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))
                surgeon.replace(case.removed, LinearReplacement.from_map(map_))
            else:
                surgeon.remove(case.removed)
            surgeon.commit()
        loaded = saved_and_loaded(model, name)
        assert len(find_stack(loaded, case.path(loaded))) == length - len(case.removed)
        assert read_plans(loaded)[0].removed == case.removed
        assert type(loaded).__name__ == ("Streamlined" if repaired else "") + type(made(name)).__name__


def closed_form_repairs(name: str) -> None:
    """Check that a fitted linear map reduces the error of a removal.

    The batch has fewer tokens than features, so the fit is exact.
    """
    model, case = made(name), OTHERS[name]
    window = range(case.removed[0], case.removed[-1] + 1)
    (repair,) = fit_windows(model, [window], LinearConfig(), [case.batch], [case.batch], stack=case.path(model))
    assert repair.repaired_error < 0.2 * repair.removal_error
    before = answer(model, name)
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove(window)
        removed = (answer(model, name) - before).norm()
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.replace(window, repair.replacement_module)
        assert (answer(model, name) - before).norm() < removed


def decodes_with_a_cache(name: str) -> None:
    """Check decoding with a cache, with and without a block."""
    model, case = made(name), OTHERS[name]
    require_same_with_a_cache(model, name)
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove([1])
        require_same_with_a_cache(model, name)


def generates_with_a_shorter_encoder(name: str) -> None:
    """Check decoding with a shortened encoder: inside the context, committed, and loaded."""
    model, case = made(name), OTHERS[name]
    require_same_with_a_cache(model, name)
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove(case.removed)
        require_same_with_a_cache(model, name)
        surgeon.commit()
    require_same_with_a_cache(model, name)
    require_same_with_a_cache(saved_and_loaded(model, name), name)


def zeroed_branch_adds_nothing(name: str) -> None:
    """Check a zeroed branch against a branch whose output is replaced by zeros."""
    model = made(name)
    stack = find_stack(model, OTHERS[name].path(model))
    before, weights = answer(model, name), {key: value.clone() for key, value in model.state_dict().items()}
    for branch in ENDS:
        with LayerSurgeon(model, stack.path) as surgeon:
            surgeon.zero_branch(1, branch)
            got = answer(model, name)
        with adding(stack[1], branch, torch.zeros_like):
            expected = answer(model, name)
        assert torch.equal(got, expected) and not torch.equal(got, before)
    require_restored(model, name, before, weights)


def folded_branch_applies_the_map(name: str) -> None:
    """Check a folded branch against a branch whose output is multiplied by the map, also from a checkpoint."""
    model = made(name)
    stack = find_stack(model, OTHERS[name].path(model))
    before, weights = answer(model, name), {key: value.clone() for key, value in model.state_dict().items()}
    map_ = torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    for branch in ENDS:
        with LayerSurgeon(model, stack.path) as surgeon:
            surgeon.fold(1, map_, branch)
            got = answer(model, name)
        with adding(stack[1], branch, lambda added: added @ map_):
            torch.testing.assert_close(got, answer(model, name), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, before, atol=1e-3)
    require_restored(model, name, before, weights)
    batch = [OTHERS[name].batch]
    (repair,) = fit_windows(model, [range(2, 3)], FoldedConfig(), batch, batch, stack=stack.path)
    assert repair.repaired_error <= repair.removal_error
    with LayerSurgeon(model, stack.path) as surgeon:
        surgeon.fold(1, map_)
        surgeon.commit()
    assert type(saved_and_loaded(model, name)) is type(model)


CHECKS: dict[str, Callable[[str], None]] = {
    "identity": identity_changes_nothing,
    "removal": removal_equals_bypass,
    "closed form": closed_form_repairs,
    "saved": commit_is_restored_from_checkpoint,
    "cache": decodes_with_a_cache,
    "generate": generates_with_a_shorter_encoder,
    "zero_branch": zeroed_branch_adds_nothing,
    "fold": folded_branch_applies_the_map,
}

_BEHIND = "all output projections at zero"
_TWICE = "more than twice"
_SCALED = "more than a sum"
REFUSED: dict[str, dict[str, str]] = {
    **{
        name: {"zero_branch": _BEHIND, "fold": _BEHIND}
        for name in (
            "swinv2", "bert", "bert classifier", "distilbert", "xlm-roberta", "mpnet", "bart encoder", "bart decoder",
            "bart decoder without a mask", "wav2vec2",
        )
    },
    **{
        name: {"zero_branch": _TWICE, "fold": _TWICE}
        for name in ("t5 decoder", "t5 decoder without a mask", "whisper decoder")
    },
    **{name: {"fold": _SCALED} for name in ("dinov2", "beit", "data2vec", "gemma3 text")},
}  # fmt: skip
"""Refused checks, with a part of the message. All other checks pass."""


def checks_of(name: str) -> list[str]:
    """Return the checks that apply to a case."""
    conditions = {"cache": OTHERS[name].decodes, "generate": OTHERS[name].encodes}
    return [check for check in CHECKS if conditions.get(check, True)]


def require_restored(model: Any, name: str, before: Tensor, weights: dict[str, Tensor]) -> None:
    """Raise unless the outputs and the state dict of a model are restored bit for bit."""
    assert torch.equal(answer(model, name), before)
    now = model.state_dict()
    assert list(now) == list(weights) and all(torch.equal(value, weights[key]) for key, value in now.items())


def saved_and_loaded(model: Any, name: str) -> Any:
    """Save and load a model, and return it if its outputs are unchanged."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, f"{folder}/saved")
        loaded = load(f"{folder}/saved").eval()
    assert torch.equal(answer(loaded, name), answer(model, name))
    return loaded


def require_same_with_a_cache(model: Any, name: str) -> None:
    """Raise unless greedy decoding has the same logits with and without a cache."""
    first: dict[str, Any] = {
        key: value[: len(value) // 2] for key, value in OTHERS[name].batch.items() if "decoder" not in key
    }
    if model.config.is_encoder_decoder:
        first["decoder_start_token_id"] = 2
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    logits = []
    for use_cache in (True, False):
        # Whisper overrides generate and splits the audio into segments.
        output = transformers.GenerationMixin.generate(
            model, **first, **settings, use_cache=use_cache, output_logits=True, return_dict_in_generate=True
        )
        logits.append(torch.stack(output.logits))
    assert len(logits[0]) == 5
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@contextmanager
def bypassed(block: nn.Module, module: nn.Module | None) -> Iterator[None]:
    """Replace the output of a block by that of a module on the same input, or by the input."""
    states: list[Tensor] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        states[:] = [read_input(args, kwargs).clone()]

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        return write_output(output, states[0] if module is None else module(states[0]))

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def adding(block: nn.Module, branch: str, changed: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the tensor that a branch of a block adds."""
    modules = dict(block.named_modules())
    end = next(modules[path] for path in ENDS[branch] if path in modules)
    handle = end.register_forward_hook(lambda _, args, output: write_output(output, changed(read_output(output))))
    try:
        yield
    finally:
        handle.remove()
