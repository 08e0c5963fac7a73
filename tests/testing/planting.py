"""How faults are planted: in a model, its surgery, its replacement, its checkpoint."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, recording
from streamline_hooks.replacements import LinearReplacement, registry
from streamline_hooks.surgery import edits, spliced_model
from streamline_hooks.testing import tiny_model
from tests.testing.wrong_replacements import WIDTH, AlmostIdentity

BLOCKS = 4
Patch = pytest.MonkeyPatch


@dataclass
class Subject:
    """What the assertions are called on: a model, the replacement that is in it, a change of the user's own."""

    model: Any
    module: nn.Module | None = None
    change: Callable[[nn.Module], AbstractContextManager[Any]] | None = None


@functools.cache
def original(model_type: str) -> nn.Module:
    return tiny_model(model_type, blocks=BLOCKS)


def plain(model_type: str = "llama") -> Subject:
    return Subject(copy.deepcopy(original(model_type)))


def with_replacement(patch: Patch, module: nn.Module) -> Subject:
    """A model in which a module stands in the place of block 1, committed, so that it can be saved."""
    patch.setitem(registry.REGISTERED, type(module).kind, type(module))  # type: ignore[attr-defined]
    subject = plain()
    with LayerSurgeon(subject.model, probe=False) as surgeon:
        surgeon.replace([1], module)
        surgeon.commit()
    return Subject(subject.model, module)


def repaired(patch: Patch) -> Subject:
    generator = torch.Generator().manual_seed(3)
    return with_replacement(patch, LinearReplacement.from_map(0.1 * torch.randn(WIDTH, WIDTH, generator=generator)))


# Surgery that leaves something behind


def leaves(then: Callable[[Any], object], first: Callable[[Any], object] | None = None) -> Callable[[Patch], Subject]:
    """A surgeon that does something to the model after it has put everything back; first the model is made ready."""

    def plant(patch: Patch) -> Subject:
        restore = LayerSurgeon.__exit__

        def leave(self: LayerSurgeon, *given: Any) -> None:
            restore(self, *given)
            then(self.model)

        patch.setattr(LayerSurgeon, "__exit__", leave)
        subject = plain()
        if first is not None:
            first(subject.model)
        return subject

    return plant


def nothing(*given: Any) -> None:
    """A hook without effect."""


def equal_copy(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight = nn.Parameter(attention.q_proj.weight.detach().clone())


def nudged(model: Any) -> None:
    with torch.no_grad():
        weight: Tensor = original("llama").get_parameter("model.layers.1.mlp.up_proj.weight")
        model.model.layers[1].mlp.up_proj.weight[3, 5] = weight[3, 5] + 1e-3


def with_gradients(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def with_a_plain_tensor(model: Any) -> None:
    model.model.norm.scale = torch.ones(3)


def doubles_the_gradients(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad.mul_(2)


def reordered(model: Any) -> None:
    block = model.model.layers[0]
    block._modules["self_attn"] = block._modules.pop("self_attn")


def leaves_a_hook_everywhere(patch: Patch) -> Subject:
    everywhere = torch.nn.modules.module._global_forward_hooks
    return leaves(lambda model: patch.setitem(everywhere, 10**9, nothing))(patch)


def setting(path: str, name: str, value: object) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(path) if path else model, name, value)


def count_not_put_back(model: Any) -> None:
    model.config.num_hidden_layers = BLOCKS - 1


# Changes of a user's own


@contextmanager
def swallowing(model: nn.Module) -> Iterator[None]:
    with suppress(Exception):
        yield


@contextmanager
def only_when_all_goes_well(model: Any) -> Iterator[None]:
    handle = model.model.layers[2].register_forward_hook(nothing)
    yield
    handle.remove()


def changes_by(change: Callable[[nn.Module], AbstractContextManager[Any]]) -> Callable[[Patch], Subject]:
    return lambda patch: Subject(plain().model, change=change)


# Surgery that is wrong


def swaps_two_blocks(patch: Patch) -> Subject:
    apply_layout = edits.Edits.apply_layout

    def swapped(self: edits.Edits, slots: list[Any], *rest: Any) -> None:
        shorter = len(slots) < len(self.stack)
        apply_layout(self, [*slots[:-2], slots[-1], slots[-2]] if shorter else slots, *rest)

    patch.setattr(edits.Edits, "apply_layout", swapped)
    return plain()


def never_renumbers(patch: Patch) -> Subject:
    patch.setattr(edits, "find_index_attributes", lambda blocks: [])
    return plain()


def never_shortens_the_config(patch: Patch) -> Subject:
    patch.setattr(edits.Edits, "shorten_config", lambda self, slots: None)
    return plain()


def inserts_something_else(patch: Patch) -> Subject:
    insert = LayerSurgeon.insert
    patch.setattr(LayerSurgeon, "insert", lambda self, k, module, **more: insert(self, k, AlmostIdentity(), **more))
    return plain()


# A recorder or an intervention that is wrong


def _recording(patch: Patch, change: Callable[[Any], Any]) -> Subject:
    """A recorder that returns something else than it recorded at the sites of the blocks."""
    get = HiddenStateRecorder.__getitem__

    def changed(self: HiddenStateRecorder, site: Any) -> Any:
        found = get(self, site)
        return found if isinstance(found, list) else change(found)

    patch.setattr(HiddenStateRecorder, "__getitem__", changed)
    return plain()


def one_token_late(patch: Patch) -> Subject:
    return _recording(patch, lambda found: {k: [state.roll(1, 1) for state in found[k]] for k in found})


def one_block_early(patch: Patch) -> Subject:
    return _recording(patch, lambda found: dict(zip(found, [*list(found.values())[1:], *found.values()], strict=False)))


def changes_what_it_records(patch: Patch) -> Subject:
    enter = HiddenStateRecorder.__enter__
    subject = plain()

    def entered(self: HiddenStateRecorder) -> HiddenStateRecorder:
        if "mlp.output" in self.sites and not subject.model.model.layers[2].mlp._forward_hooks:
            subject.model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: 2 * output)
        return enter(self)

    patch.setattr(HiddenStateRecorder, "__enter__", entered)
    return subject


def patches_nothing(patch: Patch) -> Subject:
    patch.setattr(recording.Patch, "change", lambda self, state, call: state)
    return plain()


# A replacement that is wrong


def replaced_by(kind: type[nn.Module]) -> Callable[[Patch], Subject]:
    return lambda patch: with_replacement(patch, kind())


# Models that are wrong


def with_forward(
    model_type: str, model_class: type[nn.Module], changed: Callable[[dict[str, Any]], None]
) -> Callable[[Patch], Subject]:
    """A class whose forward gets other arguments than it was called with."""

    def plant(patch: Patch) -> Subject:
        forward = model_class.forward

        @functools.wraps(forward)
        def wrong(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            changed(kwargs)
            return forward(self, *args, **kwargs)

        patch.setattr(model_class, "forward", wrong)
        return plain(model_type)

    return plant


def ignores_the_mask(given: dict[str, Any]) -> None:
    if given.get("attention_mask") is not None:
        given["attention_mask"] = torch.ones_like(given["attention_mask"])


def turns_the_mask_round(given: dict[str, Any]) -> None:
    mask = given.get("attention_mask")
    if mask is not None and not mask.all():
        given["attention_mask"] = 1 - mask


def counts_the_padding(given: dict[str, Any]) -> None:
    given["position_ids"] = None


def changed(change: Callable[[Any], object]) -> Callable[[Patch], Subject]:
    def plant(patch: Patch) -> Subject:
        subject = plain()
        change(subject.model)
        return subject

    return plant


def off_by_one_slot(model: Any) -> None:
    for block in model.model.layers:
        block.self_attn.layer_idx += 1


def other_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(1.5)


def a_table_in_memory(model: Any) -> None:
    model.model.register_buffer("table", torch.tensor([1, 2]), persistent=False)


# Checkpoints that are wrong


def loses_the_repair(patch: Patch) -> Subject:
    subject = repaired(patch)
    patch.setattr(spliced_model, "set_splices", lambda block, place, modules: None)
    return subject


def writes(change: Callable[[dict[str, Any]], None]) -> Callable[[Patch], Subject]:
    """A model whose config.json says something else than its configuration."""

    def plant(patch: Patch) -> Subject:
        subject = plain()
        save = type(subject.model).save_pretrained

        def wrong(self: Any, folder: str, *args: Any, **kwargs: Any) -> None:
            save(self, folder, *args, **kwargs)
            file = Path(folder) / "config.json"
            said = json.loads(file.read_text())
            change(said)
            file.write_text(json.dumps(said))

        patch.setattr(type(subject.model), "save_pretrained", wrong)
        return subject

    return plant


def one_block_less(said: dict[str, Any]) -> None:
    said["num_hidden_layers"] -= 1


def in_half_precision(said: dict[str, Any]) -> None:
    said.pop("torch_dtype", None)
    said["dtype"] = "float16"
