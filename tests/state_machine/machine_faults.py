"""Faults that the state machine must find. Each replaces a public function of the library."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import Edits, StackLayout, placement, splice
from streamline_hooks.surgery.layer_indices import IndexAttribute

Patch = pytest.MonkeyPatch


def last_block_keeps_its_number(patch: Patch) -> None:
    number = IndexAttribute.of
    patch.setattr(IndexAttribute, "of", lambda self, position: number(self, position) + (position == 2))


def splice_runs_one_block_later(patch: Patch) -> None:
    apply_layout = Edits.apply_layout

    def later(self: Edits, slots: list[Any], at_end: Any, *more: Any) -> None:
        for slot, following in pairwise(slots):
            if slot.before and not following.before:
                slot.before, following.before = [], slot.before
                break
        apply_layout(self, slots, at_end, *more)

    patch.setattr(Edits, "apply_layout", later)


def insertions_run_in_reverse_order(patch: Patch) -> None:
    def insert(self: StackLayout, k: int, module: nn.Module) -> None:
        self.inserted.setdefault(k, []).insert(0, module)

    patch.setattr(StackLayout, "insert", insert)


def after_closing(change: Callable[[LayerSurgeon, tuple[int, ...]], object]) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        leave = LayerSurgeon.__exit__

        def leave_and_change(self: LayerSurgeon, *given: Any) -> None:
            removed = self.plan.removed
            leave(self, *given)
            change(self, removed)

        patch.setattr(LayerSurgeon, "__exit__", leave_and_change)

    return plant


def mode_is_not_restored(surgeon: LayerSurgeon, removed: tuple[int, ...]) -> None:
    for k in removed[:1]:
        surgeon.stack[k].train(not surgeon.stack[k].training)


def parameter_is_another_object(surgeon: LayerSurgeon, removed: tuple[int, ...]) -> None:
    for k in removed[:1]:
        for module in surgeon.stack[k].modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def hook_is_left(surgeon: LayerSurgeon, removed: tuple[int, ...]) -> None:
    surgeon.stack[0].register_forward_hook(lambda *given: None)


def another_models_configuration_is_shortened(patch: Patch) -> None:
    """As it was when models shared their configuration object with the one that is operated on."""
    enter, apply = LayerSurgeon.__enter__, LayerSurgeon.remove

    def remember(self: LayerSurgeon) -> LayerSurgeon:
        vars(self)["shared"] = self.model.config
        return enter(self)

    def remove(self: LayerSurgeon, window: Any, **more: Any) -> None:
        apply(self, window, **more)
        vars(self)["shared"].num_hidden_layers -= len(list(window))

    patch.setattr(LayerSurgeon, "__enter__", remember)
    patch.setattr(LayerSurgeon, "remove", remove)


def copy_runs_the_originals_weights(patch: Patch) -> None:
    patch.setattr(LinearReplacement, "__deepcopy__", lambda self, memo: self, raising=False)


def removed_blocks_do_not_follow(patch: Patch) -> None:
    patch.setattr(placement.BlockStates, "follow", lambda self, stack, kept: None)


def splices_do_not_run_in_half_precision(patch: Patch) -> None:
    run = splice.run_splices

    def skipped(block: nn.Module, place: Any, state: torch.Tensor) -> torch.Tensor:
        return state if state.dtype == torch.bfloat16 else run(block, place, state)

    patch.setattr(splice, "run_splices", skipped)


FAULTS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "last block keeps its number": ("llama", last_block_keeps_its_number),
    "splice runs one block later": ("plain", splice_runs_one_block_later),
    "insertions run in reverse order": ("plain", insertions_run_in_reverse_order),
    "mode is not restored": ("plain", after_closing(mode_is_not_restored)),
    "parameter is another object": ("plain", after_closing(parameter_is_another_object)),
    "hook is left": ("plain", after_closing(hook_is_left)),
    "another model's configuration is shortened": ("llama", another_models_configuration_is_shortened),
    "copy runs the original's weights": ("plain", copy_runs_the_originals_weights),
    "removed blocks do not follow the model": ("plain", removed_blocks_do_not_follow),
    "splices do not run in half precision": ("plain", splices_do_not_run_in_half_precision),
}
