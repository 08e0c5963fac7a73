"""What a layout changes in a model, each change with its undoing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from streamline_hooks.offload import followed_device_map
from streamline_hooks.surgery.capture import forget_capture_hooks, lend_capture_hooks, next_hook_id
from streamline_hooks.surgery.copies import find_copies, renumbered_paths
from streamline_hooks.surgery.exchange import Exchange, move_parameter
from streamline_hooks.surgery.layout import NewSlot, Placed, names_of
from streamline_hooks.surgery.own_config import OwnConfigs
from streamline_hooks.surgery.per_layer_weights import find_per_layer_weights
from streamline_hooks.surgery.placement import TrainWithRemoved, bring_to, move_beside
from streamline_hooks.surgery.quantizer_names import SETTINGS, QuantizerNames
from streamline_hooks.surgery.renumber import (
    INDEX_NAMES,
    KEY_SHARING,
    find_index_attributes,
    same_descriptions,
    shortened_config,
)
from streamline_hooks.surgery.saving import SavingRefused, savers
from streamline_hooks.surgery.splice import AFTER, BEFORE, Place, remember_splices, set_splices, spliced

ORIGIN = "_streamline_hooks_origin"
RECORD = "_streamline_hooks"
_MISSING = object()
_NONE: Mapping[int, Mapping[str, nn.Parameter]] = MappingProxyType({})


class Edits:
    """Lay a stack out anew, and take it back.

    Each change first puts its own undoing on a list, so that whatever interrupts it can be followed by `revert`.

    Parameters
    ----------
    configs : OwnConfigs
        Of the stack as it is before any change. They are put in before a layout, and put back after `close`.
    token : str
        Under which the blocks carry their number, so that a copy made meanwhile says what it is a copy of.
    """

    def __init__(self, configs: OwnConfigs, token: str) -> None:
        self.configs, stack = configs, configs.inside
        self.stack = stack
        self.indices = find_index_attributes(stack.blocks)
        self._token = token
        self._origins: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._undoing: list[Callable[[], None]] = []
        self._present: tuple[nn.Module, ...] = tuple(stack.blocks)
        self._first_hook = next_hook_id()
        self._earlier = {id(m) for block in stack.blocks for place in (BEFORE, AFTER) for m in spliced(block, place)}

    def forget(self) -> None:
        """Keep the changes for good, and let go of what was removed."""
        state = vars(self.stack.container)
        train = state.get("train")
        if isinstance(train, TrainWithRemoved):
            state.pop("train")
            if train.earlier is not None:
                state["train"] = train.earlier
        self._undoing.clear()

    def refuse_saving(self) -> None:
        """Let ``save_pretrained`` raise until the changes are taken back."""
        for owner in savers(self.stack):
            self._set(owner, "save_pretrained", SavingRefused(owner))

    def remember_class(self, model: nn.Module) -> int:
        """Remember what a commit changes besides the layout: classes, configuration values, hooks and the record.

        Returns
        -------
        int
            What `revert` takes to undo the commit alone.
        """
        state, config = vars(model), vars(model).get("config")
        kind, config_kind, hooks = type(model), type(config), dict(model._load_state_dict_pre_hooks)
        values, record = dict(getattr(config, "__dict__", {})), {k: v for k, v in state.items() if k == RECORD}

        def put_back() -> None:
            model.__class__ = kind
            if type(config) is not config_kind:
                config.__class__ = config_kind
            if hasattr(config, "__dict__"):
                vars(config).clear()
                vars(config).update(values)
            model._load_state_dict_pre_hooks.clear()
            model._load_state_dict_pre_hooks.update(hooks)
            state.pop(RECORD, None)
            state.update(record)

        self._undoing.append(put_back)
        return len(self._undoing) - 1

    def close(self) -> None:
        """Take every change back, and the capture hooks that were installed meanwhile."""
        self.revert()
        forget_capture_hooks(self.stack.model, self._first_hook)

    def lay_out(
        self,
        slots: list[NewSlot],
        at_end: list[Placed],
        stand_ins: Mapping[int, Mapping[str, nn.Parameter]] = _NONE,
    ) -> None:
        """Make the model have these slots, with what runs before each and after the last.

        Parameters
        ----------
        slots : list of NewSlot
        at_end : list of Placed
            As `Layout.arrange` gives them. The model is as it was before any change.
        stand_ins : mapping of int to mapping of str to torch.nn.Parameter
            What stands in the place of output projections, by the block's number before the surgery and the path
            below the block.
        """
        container = self.stack.container
        forget_capture_hooks(self.stack.model, self._first_hook)
        original = [(name, module) for name, module in container._modules.items() if module is not None]

        def put_back() -> None:
            container._modules.clear()
            container._modules.update(original)

        for slot in slots:
            self.source(slot.module)
        self._undoing.append(put_back)
        container._modules.clear()
        names = names_of(original, [slot.module for slot in slots])
        container._modules.update({name: slot.module for name, slot in zip(names, slots, strict=True)})
        for slot in slots:  # beside one that was in the model until now: removed blocks do not follow model.to()
            if slot.module not in self.stack.blocks and slot.module not in self._present:
                move_beside(slot.module, self._present[0])
        for k, slot in enumerate(slots):
            for index in self.indices:
                holder = index.holder(slot.module)
                if holder is not None:
                    self._set(holder, index.name, index.of(k))
            self._splice(slot.module, BEFORE, slot.before)
            self._splice(slot.module, AFTER, at_end if k == len(slots) - 1 else [])
            if slot.module in self.stack.blocks:
                for path, stand_in in stand_ins.get(self.stack.blocks.index(slot.module), {}).items():
                    self._stand_in(slot.module, path, stand_in)
            else:
                self._own_configs(slot.module)
                self._undoing += [h.remove for h in lend_capture_hooks(self.stack.blocks[0], slot.module)]
        self.shorten_config(slots)
        self._follow_alignment_heads(slots)
        for config, settings in QuantizerNames(self.stack).renumbered([self.source(slot.module) for slot in slots]):
            if not self.configs.is_original(config):
                self._set(config, SETTINGS, settings)
        self._follow_device_map([name for name, _ in original], names, slots)
        self.refuse_saving()
        self._present = tuple(slot.module for slot in slots)
        removed = [block for block in self.stack.blocks if block not in self._present]
        if removed:
            self._set(container, "train", TrainWithRemoved(container, removed))

    def _stand_in(self, block: nn.Module, path: str, stand_in: nn.Parameter) -> None:
        exchange = Exchange(block, path, stand_in)
        self._undoing.append(exchange.put_back)
        exchange.put_in()

    def _splice(self, block: nn.Module, place: Place, placed: list[Placed]) -> None:
        modules = [module for module, _, _ in placed]
        if list(spliced(block, place)) == modules:
            return
        for module in modules:
            if id(module) in self._earlier:  # its precision is its own: narrowed, its values would be lost
                self._undoing.append(bring_to(module, block))
            else:
                move_beside(module, block)
            self._own_configs(module)
        self._undoing.append(remember_splices(block, place))
        set_splices(block, place, modules)

    def _own_configs(self, module: nn.Module) -> None:
        """Let a module that is put in refer to no configuration that another model may have too."""
        for part, name, config in list(self.configs.of_new_module(module)):
            self._set(part, name, config)

    def shorten_config(self, slots: list[NewSlot]) -> None:
        """Set the block count and the per-block lists of the configurations to those of the kept blocks."""
        config, count = self.stack.config, self.stack.count_attribute
        if config is None or count is None:
            return
        sources = [self.source(slot.module) for slot in slots]
        length = len(self.stack)
        for described in self._descriptions():
            values = shortened_config(described, count, length, sources, self.stack.stage)
            new = {name: value for name, value in values.items() if vars(described).get(name, _MISSING) != value}
            if described is config and new:
                self._follow_outside_the_config(new, [0 if source is None else source for source in sources])
            for name, value in new.items():
                self._set(described, name, value)
        self._follow_key_sharing(slots)

    def _descriptions(self) -> list[Any]:
        return [config for config in same_descriptions(self.stack) if not self.configs.is_original(config)]

    def _copies(
        self, old: Mapping[str, Any], new: Mapping[str, Any], sources: Sequence[int]
    ) -> Iterator[tuple[nn.Module, str, Any]]:
        return find_copies(self.stack, old, new, sources)

    def _follow_key_sharing(self, slots: list[NewSlot]) -> None:
        """A block whose last reader went keeps its keys for nobody (Gemma 3n, Gemma 4)."""
        modes = getattr(self.stack.config, KEY_SHARING, None) or []
        for slot, mode in zip(slots, modes, strict=False):
            for module in slot.module.modules():
                if vars(module).get("store_full_length_kv", mode == "store") != (mode == "store"):
                    self._set(module, "store_full_length_kv", mode == "store")

    def _follow_alignment_heads(self, slots: list[NewSlot]) -> None:
        """What a Whisper tells the time of a word by: heads of its decoder, each with its block's number.

        Without any it says itself that it cannot.
        """
        if self.stack.count_attribute != "decoder_layers":
            return
        place = {id(slot.module): k for k, slot in enumerate(slots)}
        new = [place.get(id(block)) for block in self.stack.blocks]
        said = {id(own): own for owner in self.stack.ancestors if (own := getattr(owner, "generation_config", None))}
        for settings in said.values():
            heads = vars(settings).get("alignment_heads")
            if heads:
                kept = [[new[block], head] for block, head in heads if new[block] is not None]
                self._set(settings, "alignment_heads", kept or _MISSING)

    def _follow_outside_the_config(self, new: dict[str, Any], sources: list[int]) -> None:
        """Take what modules keep by a block's number along: copies, paths of tied weights, weights cut by block."""
        old = {name: value for name, value in vars(self.stack.config).items() if name in new}
        for module, name, value in [
            *self._copies(old, new, sources),
            *renumbered_paths(self.stack, sources),
        ]:
            self._set(module, name, value)
        length = len(self.stack)
        if sources == list(range(length)):
            return
        for weight in find_per_layer_weights(self.stack):
            size = getattr(weight.module, weight.size)
            self._set(weight.module, weight.size, size // length * len(sources))
            for name, parameter in weight.chosen(length, sources).items():
                self._exchange(weight.module._parameters, name, parameter)

    def _follow_device_map(self, old: list[str], new: list[str], slots: list[NewSlot]) -> None:
        sources = [self.source(slot.module) for slot in slots]
        blocks = [
            (name, None if source is None else old[source], slot.module)
            for name, source, slot in zip(new, sources, slots, strict=True)
        ]
        for depth, owner in enumerate(self.stack.ancestors):
            device_map = vars(owner).get("hf_device_map")
            if device_map is not None:
                path = ".".join(self.stack.path.split(".")[depth:])
                self._set(owner, "hf_device_map", followed_device_map(device_map, path, old, blocks))

    def source(self, module: nn.Module) -> int | None:
        """Whose per-layer settings a block in a slot has: its own, or those of the block that it is a copy of."""
        marked = vars(module).get(ORIGIN, {}).get(self._token)
        if marked is not None:
            return int(marked)
        origin = self._origins.get(module)
        if origin is None:  # a copy from before the surgery, by its own number; read once, since it is renumbered
            held = [(i, i.holder(module)) for i in self.indices]
            said = {(getattr(h, i.name) - i.first) / i.stride for i, h in held if h is not None}
            origin = int(said.pop()) if len(said) == 1 else -1
            self._origins[module] = origin
        return origin if 0 <= origin < len(self.stack) else None

    def numbers_that_compute(self, right: Callable[[], bool]) -> list[str]:
        """The names of the attributes that, left as they were before the surgery, make a wrong model right.

        Parameters
        ----------
        right : callable
            Says whether the model, as it is laid out now, gives what it must.
        """
        names = list(dict.fromkeys(index.name for index in self.indices))
        found = [name for name in names if self._with_old_numbers([name], right)]
        if found or not self._with_old_numbers(names, right):
            return found
        return [name for name in names if name not in INDEX_NAMES] or names

    def _with_old_numbers(self, names: Sequence[str], right: Callable[[], bool]) -> bool:
        done = len(self._undoing)
        for block in self.stack.container.children():
            number = self.source(block)
            for index in self.indices:
                holder = index.holder(block)
                if index.name in names and number is not None and holder is not None:
                    self._set(holder, index.name, index.of(number))
        try:
            return right()
        finally:
            self.revert(done)

    def _set(self, target: Any, name: str, value: Any) -> None:
        self._put(vars(target), name, value)

    def _exchange(self, parameters: dict[str, Any], name: str, parameter: nn.Parameter) -> None:
        """Put a parameter in another one's place, which comes back to where the model is then."""
        held = parameters[name]

        def put_back() -> None:
            move_parameter(held, parameters[name])
            parameters[name] = held

        self._undoing.append(put_back)
        parameters[name] = parameter

    def _put(self, values: dict[str, Any], name: str, value: Any) -> None:
        held = values.get(name, _MISSING)

        def put_back() -> None:
            if held is _MISSING:
                values.pop(name, None)
            else:
                values[name] = held

        self._undoing.append(put_back)
        if value is _MISSING:
            values.pop(name, None)
        else:
            values[name] = value

    def revert(self, to: int = 0) -> None:
        """Take the changes after the first few back. Each step can be done twice, so that one can be interrupted."""
        while len(self._undoing) > to:
            self._undoing[-1]()
            self._undoing.pop()
