"""Change a model to a layout, and undo each change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from streamline_hooks.core import (
    ComputedWeights,
    StreamlineError,
    forget_compiled_graphs,
    offload_hooks,
    renumber_device_map,
)
from streamline_hooks.modeling import BlockStack, copy_capture_hooks, next_hook_id, remove_capture_hooks
from streamline_hooks.surgery.config_copies import ConfigCopies
from streamline_hooks.surgery.layer_indices import (
    INDEX_NAMES,
    KEY_SHARING,
    config_for_blocks,
    configs_of_stack,
    find_config_copies,
    find_index_attributes,
    renumber_tied_weights,
)
from streamline_hooks.surgery.layout import NewSlot, Placed, block_names
from streamline_hooks.surgery.placement import TrainWithRemoved, match_block, move_to_device_of
from streamline_hooks.surgery.save_guard import SaveGuard, transformers_ancestors
from streamline_hooks.surgery.special_weights import QUANTIZATION_CONFIG, QuantizerSettings, find_per_layer_weights
from streamline_hooks.surgery.splice import AFTER, BEFORE, SplicePosition, set_splices, snapshot_splices, spliced
from streamline_hooks.surgery.zeroed_branches import offloaded_values

ORIGIN = "_streamline_hooks_origin"
COPIED_FROM = "_streamline_hooks_copied_from"
RECORD = "_streamline_hooks"
_MISSING = object()
_NONE: Mapping[int, Mapping[str, nn.Parameter]] = MappingProxyType({})


class OriginalBlock:
    """Weak references to the block that a block was copied from, and its container; a pickle loses them."""

    def __init__(self, block: nn.Module | None = None, container: nn.Module | None = None) -> None:
        self._block, self._container = (None if module is None else ref(module) for module in (block, container))

    def index_in(self, stack: BlockStack) -> int | None:
        """Return the index of the original, or None if it belongs to another model. Raise if it was removed."""
        if self._block is None or self._container is None or self._container() is not stack.container:
            return None
        original = self._block()
        for k, block in enumerate(stack.blocks):
            if block is original:
                return k
        raise StreamlineError(
            "The inserted block was copied from a block that was removed meanwhile, so its per-layer settings are "
            "unknown. Expected a copy of a present block. Copy or fit it again."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> OriginalBlock:
        return self

    def __reduce__(self) -> tuple[type[OriginalBlock], tuple[()]]:
        return OriginalBlock, ()


class Edits:
    """Change a stack to a layout, and restore it.

    Each change first appends its undo function to a list, so that `revert` works after an interruption at any point.
    `configs` replace the configurations of the model between the first layout and `close`. Blocks carry their index
    under `token`, which identifies the original of a copied block.
    """

    def __init__(self, configs: ConfigCopies, token: str) -> None:
        self.configs, stack = configs, configs.inside
        self.stack = stack
        self.indices = find_index_attributes(stack.blocks)
        self._token = token
        self._origins: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._undoing: list[Callable[[], None]] = []
        self._present: tuple[nn.Module, ...] = tuple(stack.blocks)
        self._first_hook = next_hook_id()
        self._earlier = {
            id(m) for block in stack.blocks for position in (BEFORE, AFTER) for m in spliced(block, position)
        }

    def finalize(self) -> None:
        """Keep the changes, and drop the references to removed blocks."""
        state = vars(self.stack.container)
        train = state.get("train")
        if isinstance(train, TrainWithRemoved):
            state.pop("train")
            if train.earlier is not None:
                state["train"] = train.earlier
        self._undoing.clear()

    def refuse_saving(self) -> None:
        """Make ``save_pretrained`` raise until the changes are undone."""
        for owner in transformers_ancestors(self.stack):
            self._set(owner, "save_pretrained", SaveGuard(owner))

    def register_commit_undo(self, model: nn.Module) -> int:
        """Register the undo of a commit's changes to class, configuration, hooks and record; return its position."""
        state, config = vars(model), vars(model).get("config")
        model_class, config_class, hooks = type(model), type(config), dict(model._load_state_dict_pre_hooks)
        values, record = dict(getattr(config, "__dict__", {})), {k: v for k, v in state.items() if k == RECORD}

        def restore() -> None:
            model.__class__ = model_class
            if type(config) is not config_class:
                config.__class__ = config_class
            if hasattr(config, "__dict__"):
                vars(config).clear()
                vars(config).update(values)
            model._load_state_dict_pre_hooks.clear()
            model._load_state_dict_pre_hooks.update(hooks)
            state.pop(RECORD, None)
            state.update(record)

        self._undoing.append(restore)
        return len(self._undoing) - 1

    def close(self) -> None:
        """Undo all changes, and remove the capture hooks that were installed meanwhile."""
        self.revert()
        remove_capture_hooks(self.stack.model, self._first_hook)

    def apply_layout(
        self,
        slots: list[NewSlot],
        at_end: list[Placed],
        replacement_modules: Mapping[int, Mapping[str, nn.Parameter]] = _NONE,
    ) -> None:
        """Change the unmodified model to the result of `StackLayout.arrange`.

        `replacement_modules` are new output projections, by the old index of the block and the parameter's path in it.
        """
        container = self.stack.container
        remove_capture_hooks(self.stack.model, self._first_hook)
        original = [(name, module) for name, module in container._modules.items() if module is not None]

        def restore() -> None:
            container._modules.clear()
            container._modules.update(original)

        sources = [self.source(slot.module) for slot in slots]  # before the blocks are renumbered
        self._undoing.append(restore)
        container._modules.clear()
        names = block_names(original, [slot.module for slot in slots])
        container._modules.update({name: slot.module for name, slot in zip(names, slots, strict=True)})
        # New blocks are matched to the nearest block in the current model: removed blocks do not follow model.to().
        known = [k for k, slot in enumerate(slots) if slot.module in self.stack.blocks or slot.module in self._present]
        for k, slot in enumerate(slots):
            if k not in known:
                nearest = min(known, key=lambda other: abs(other - k), default=None)
                match_block(slot.module, self._present[0] if nearest is None else slots[nearest].module)
        for k, slot in enumerate(slots):
            for index in self.indices:
                holder = index.holder(slot.module)
                if holder is not None:
                    self._set(holder, index.name, index.of(k))
            self._splice(slot.module, BEFORE, slot.before)
            self._splice(slot.module, AFTER, at_end if k == len(slots) - 1 else [])
            if slot.module in self.stack.blocks:
                for path, replacement_module in replacement_modules.get(
                    self.stack.blocks.index(slot.module), {}
                ).items():
                    owner, _, name = path.rpartition(".")
                    self._exchange(slot.module.get_submodule(owner), name, replacement_module)
            else:
                self._own_configs(slot.module)
                self._undoing += [h.remove for h in copy_capture_hooks(self.stack.blocks[0], slot.module)]
        self.shorten_config(sources)
        self._follow_alignment_heads()
        for config, settings in QuantizerSettings(self.stack).renumbered(sources):
            if not self.configs.is_original(config):
                self._set(config, QUANTIZATION_CONFIG, settings)
        self._follow_device_map([name for name, _ in original], names, sources)
        self.refuse_saving()
        self._present = tuple(slot.module for slot in slots)
        removed = [block for block in self.stack.blocks if block not in self._present]
        if removed:
            self._set(container, "train", TrainWithRemoved(container, removed))

    def _splice(self, block: nn.Module, position: SplicePosition, placed: list[Placed]) -> None:
        modules = [module for module, _, _ in placed]
        if list(spliced(block, position)) == modules:
            return
        for module in modules:
            if id(module) in self._earlier:  # casting it to the block's dtype would lose precision
                self._undoing.append(move_to_device_of(module, block))
            else:
                match_block(module, block)
            self._own_configs(module)
        self._undoing.append(snapshot_splices(block, position))
        set_splices(block, position, modules)
        forget_compiled_graphs()

    def _own_configs(self, module: nn.Module) -> None:
        """Replace each configuration of a new module that another model may share by a copy."""
        for part, name, config in list(self.configs.foreign_configs(module)):
            self._set(part, name, config)

    def shorten_config(self, sources: Sequence[int | None]) -> None:
        """Set the block count and the per-block lists of the configurations to those of the new blocks."""
        config, count = self.stack.config, self.stack.count_attribute
        if config is None or count is None:
            return
        for described_config in self._descriptions():
            values = config_for_blocks(described_config, count, len(self.stack), sources, self.stack.stage)
            new = {name: value for name, value in values.items() if vars(described_config).get(name, _MISSING) != value}
            if described_config is config and new:
                self._follow_outside_the_config(new, [0 if source is None else source for source in sources])
            for name, value in new.items():
                self._set(described_config, name, value)
        self._follow_key_sharing()

    def _descriptions(self) -> list[Any]:
        return [config for config in configs_of_stack(self.stack) if not self.configs.is_original(config)]

    def _copies(
        self, old: Mapping[str, Any], new: Mapping[str, Any], sources: Sequence[int]
    ) -> Iterator[tuple[nn.Module, str, Any]]:
        return find_config_copies(self.stack, old, new, sources)

    def _follow_key_sharing(self) -> None:
        """Stop blocks from storing keys that no later block reads any more (Gemma 3n, Gemma 4)."""
        modes = getattr(self.stack.config, KEY_SHARING, None) or []
        for block, mode in zip(self.stack.container.children(), modes, strict=False):
            for module in block.modules():
                if vars(module).get("store_full_length_kv", mode == "store") != (mode == "store"):
                    self._set(module, "store_full_length_kv", mode == "store")

    def _follow_alignment_heads(self) -> None:
        """Renumber Whisper's (block, head) pairs for word timestamps. Without pairs, Whisper refuses timestamps."""
        if self.stack.count_attribute != "decoder_layers":
            return
        position = {id(block): k for k, block in enumerate(self.stack.container.children())}
        new = [position.get(id(block)) for block in self.stack.blocks]
        configs = {id(own): own for owner in self.stack.ancestors if (own := getattr(owner, "generation_config", None))}
        for settings in configs.values():
            heads = vars(settings).get("alignment_heads")
            if heads:
                kept = [[new[block], head] for block, head in heads if new[block] is not None]
                self._set(settings, "alignment_heads", kept or _MISSING)

    def _follow_outside_the_config(self, new: dict[str, Any], sources: list[int]) -> None:
        """Update per-block content outside the blocks: copied values, tied paths and sliced weights."""
        old = {name: value for name, value in vars(self.stack.config).items() if name in new}
        for module, name, value in [*self._copies(old, new, sources), *renumber_tied_weights(self.stack, sources)]:
            self._set(module, name, value)
        length = len(self.stack)
        if sources == list(range(length)):
            return
        for weight in find_per_layer_weights(self.stack):
            size = getattr(weight.module, weight.size)
            self._set(weight.module, weight.size, size // length * len(sources))
            for name, parameter in weight.chosen(length, sources).items():
                self._exchange(weight.module, name, parameter)

    def _follow_device_map(self, old: list[str], new: list[str], sources: Sequence[int | None]) -> None:
        blocks = [
            (name, None if source is None else old[source], block)
            for name, source, block in zip(new, sources, self.stack.container.children(), strict=True)
        ]
        for depth, owner in enumerate(self.stack.ancestors):
            device_map = vars(owner).get("hf_device_map")
            if device_map is not None:
                path = ".".join(self.stack.path.split(".")[depth:])
                self._set(owner, "hf_device_map", renumber_device_map(device_map, path, old, blocks))

    def source(self, module: nn.Module) -> int | None:
        """Return the old index of the block whose per-layer settings a block has: itself or its original."""
        mark = vars(module).get(ORIGIN, {}).get(self._token)
        if mark is not None:
            return int(mark)
        original = vars(module).get(COPIED_FROM)
        if original is not None and (index := original.index_in(self.stack)) is not None:
            return int(index)
        origin = self._origins.get(module)
        if origin is None:  # a copy from before the surgery; its index is read only once, because it is renumbered
            holders = [(i, i.holder(module)) for i in self.indices]
            values = {(getattr(h, i.name) - i.first) / i.stride for i, h in holders if h is not None}
            origin = int(values.pop()) if len(values) == 1 else -1
            self._origins[module] = origin
        return origin if 0 <= origin < len(self.stack) else None

    def indices_used_in_forward(self, is_correct: Callable[[], bool]) -> list[str]:
        """Return the index attributes whose old values make the current model pass `is_correct`."""
        names = list(dict.fromkeys(index.name for index in self.indices))
        computing = [name for name in names if self._with_old_indices([name], is_correct)]
        if computing or not self._with_old_indices(names, is_correct):
            return computing
        return [name for name in names if name not in INDEX_NAMES] or names

    def _with_old_indices(self, names: Sequence[str], is_correct: Callable[[], bool]) -> bool:
        undo_count = len(self._undoing)
        for block in self.stack.container.children():
            number = self.source(block)
            for index in self.indices:
                holder = index.holder(block)
                if index.name in names and number is not None and holder is not None:
                    self._set(holder, index.name, index.of(number))
        try:
            return is_correct()
        finally:
            self.revert(undo_count)

    def _exchange(self, owner: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Replace a parameter. Either parameter follows a ``model.to(...)`` that happened while it was replaced.

        The values of an offloaded parameter are replaced in the map from which accelerate loads them.
        """
        parameters: Any = owner._parameters
        original = parameters[name]
        hook = next((hook for part, hook in offload_hooks(owner) if part is owner), None)
        if original.is_meta and hook is not None:
            self._set(hook, "weights_map", ComputedWeights(hook.weights_map, name, offloaded_values(parameter)))
            return

        def restore() -> None:
            _move_parameter(original, parameters[name])
            parameters[name] = original

        self._undoing.append(restore)
        _move_parameter(parameter, original)
        parameters[name] = parameter

    def _set(self, target: Any, name: str, value: Any) -> None:
        values = vars(target)
        original = values.get(name, _MISSING)

        def restore() -> None:
            if original is _MISSING:
                values.pop(name, None)
            else:
                values[name] = original

        self._undoing.append(restore)
        if value is _MISSING:
            values.pop(name, None)
        else:
            values[name] = value

    def revert(self, to: int = 0) -> None:
        """Undo all changes after the first `to`. Undo functions can run twice, in case of an interruption."""
        while len(self._undoing) > to:
            self._undoing[-1]()
            self._undoing.pop()


def _move_parameter(parameter: nn.Parameter, reference: nn.Parameter) -> None:
    """Give a parameter the device, dtype and ``requires_grad`` of another parameter."""
    if (parameter.device, parameter.dtype) != (reference.device, reference.dtype):
        parameter.data = parameter.data.to(device=reference.device, dtype=reference.dtype)
    if parameter.requires_grad != reference.requires_grad:
        parameter.requires_grad = reference.requires_grad
