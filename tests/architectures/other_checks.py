"""What must hold for a model that is no causal language model: each check is passed, or refused for a named reason."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from streamline_hooks import LayerSurgeon, LinearReplacement, find_stack, fit_windows, load, read_plans, save
from streamline_hooks.hidden_state import read_input, read_output, write_output
from streamline_hooks.repair import FoldedConfig, LinearConfig
from tests.other_models import OTHERS, answer, made

WIDTH = 32
# What a branch adds, where it ends: the first of these that a block has, whatever the version.
ENDS = {
    "attention": (
        "attention.o_proj", "attention.output.dense", "self_attn.out_proj", "self_attn.o_proj", "attn.proj", "attn.Wo",
        "layer.0.SelfAttention.o",
    ),
    "mlp": ("mlp.fc2", "output.dense", "mlp.down_proj", "fc2", "mlp.Wo", "layer.1.DenseReluDense.wo"),
}  # fmt: skip


def identity_changes_nothing(name: str) -> None:
    """To the bit."""
    model = made(name)
    before = answer(model, name)
    with LayerSurgeon(model, OTHERS[name].path(model)) as surgeon:
        surgeon.insert(2, nn.Identity())
        assert torch.equal(answer(model, name), before)
    assert torch.equal(answer(model, name), before)


def removal_is_the_block_bypassed(name: str) -> None:
    """So is a module in its place; and everything comes back."""
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


def committed_is_loaded(name: str) -> None:
    """Plain where blocks only went, and with what stands in their place."""
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
    """More tokens than features are not there, so that the map that was fitted is exact, and it is put in its place."""
    model, case = made(name), OTHERS[name]
    window = range(case.removed[0], case.removed[-1] + 1)
    (repair,) = fit_windows(model, [window], LinearConfig(), [case.batch], [case.batch], stack=case.path(model))
    assert repair.repaired_error < 0.2 * repair.removal_error
    before = answer(model, name)
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove(window)
        removed = (answer(model, name) - before).norm()
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.replace(window, repair.stand_in)
        assert (answer(model, name) - before).norm() < removed


def decodes_with_a_cache(name: str) -> None:
    """Without a block as with it."""
    model, case = made(name), OTHERS[name]
    require_same_with_a_cache(model, name)
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove([1])
        require_same_with_a_cache(model, name)


def generates_beside_a_decoder(name: str) -> None:
    """An encoder that became shorter: inside the context, committed, and loaded."""
    model, case = made(name), OTHERS[name]
    require_same_with_a_cache(model, name)
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove(case.removed)
        require_same_with_a_cache(model, name)
        surgeon.commit()
    require_same_with_a_cache(model, name)
    require_same_with_a_cache(saved_and_loaded(model, name), name)


def silent_is_without_what_the_branch_adds(name: str) -> None:
    model = made(name)
    stack = find_stack(model, OTHERS[name].path(model))
    before, weights = answer(model, name), {key: value.clone() for key, value in model.state_dict().items()}
    for branch in ENDS:
        with LayerSurgeon(model, stack.path) as surgeon:
            surgeon.silence(1, branch)
            got = answer(model, name)
        with adding(stack[1], branch, torch.zeros_like):
            expected = answer(model, name)
        assert torch.equal(got, expected) and not torch.equal(got, before)
    require_restored(model, name, before, weights)


def folded_is_with_a_map_of_what_the_branch_adds(name: str) -> None:
    """A plain checkpoint keeps it."""
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
    "removal": removal_is_the_block_bypassed,
    "closed form": closed_form_repairs,
    "saved": committed_is_loaded,
    "cache": decodes_with_a_cache,
    "generate": generates_beside_a_decoder,
    "silence": silent_is_without_what_the_branch_adds,
    "fold": folded_is_with_a_map_of_what_the_branch_adds,
}

_BEHIND = "every output projection at zero"
_TWICE = "adds more than twice"
_SCALED = "more than a sum"
REFUSED: dict[str, dict[str, str]] = {
    **{
        name: {"silence": _BEHIND, "fold": _BEHIND}
        for name in (
            "swinv2", "bert", "bert classifier", "distilbert", "xlm-roberta", "mpnet", "bart encoder", "bart decoder",
            "bart decoder without a mask", "wav2vec2",
        )
    },
    **{
        name: {"silence": _TWICE, "fold": _TWICE}
        for name in ("t5 decoder", "t5 decoder without a mask", "whisper decoder")
    },
    **{name: {"fold": _SCALED} for name in ("dinov2", "beit", "data2vec", "gemma3 text")},
}  # fmt: skip
"""What is refused, and a part of why; every other check is passed."""


def checks_of(name: str) -> list[str]:
    """The checks that say something of a case."""
    asked = {"cache": OTHERS[name].decodes, "generate": OTHERS[name].encodes}
    return [check for check in CHECKS if asked.get(check, True)]


def require_restored(model: Any, name: str, before: Tensor, weights: dict[str, Tensor]) -> None:
    """Raise unless a model is as it was to the bit."""
    assert torch.equal(answer(model, name), before)
    now = model.state_dict()
    assert list(now) == list(weights) and all(torch.equal(value, weights[key]) for key, value in now.items())


def saved_and_loaded(model: Any, name: str) -> Any:
    """What comes back from a checkpoint, which says the same."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, f"{folder}/saved")
        loaded = load(f"{folder}/saved").eval()
    assert torch.equal(answer(loaded, name), answer(model, name))
    return loaded


def require_same_with_a_cache(model: Any, name: str) -> None:
    """Raise unless greedy decoding sees the same logits with a cache and without."""
    first: dict[str, Any] = {
        key: value[: len(value) // 2] for key, value in OTHERS[name].batch.items() if "decoder" not in key
    }
    if model.config.is_encoder_decoder:
        first["decoder_start_token_id"] = 2
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    said = []
    for use_cache in (True, False):
        # Whisper's own way to generate cuts sounds into pieces.
        made_ = transformers.GenerationMixin.generate(
            model, **first, **asked, use_cache=use_cache, output_logits=True, return_dict_in_generate=True
        )
        said.append(torch.stack(made_.logits))
    assert len(said[0]) == 5
    torch.testing.assert_close(*said, rtol=1e-3, atol=1e-3)


@contextmanager
def bypassed(block: nn.Module, module: nn.Module | None) -> Iterator[None]:
    """Throw away what a block makes of its state, and take what a module makes of it, or the state itself."""
    kept: list[Tensor] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        kept[:] = [read_input(args, kwargs).clone()]

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        return write_output(output, kept[0] if module is None else module(kept[0]))

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def adding(block: nn.Module, branch: str, changed: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a branch of a block add something else than it does."""
    modules = dict(block.named_modules())
    end = next(modules[path] for path in ENDS[branch] if path in modules)
    handle = end.register_forward_hook(lambda _, args, output: write_output(output, changed(read_output(output))))
    try:
        yield
    finally:
        handle.remove()
