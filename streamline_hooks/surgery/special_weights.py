"""Handle weights outside the blocks that contain one slice per block (Gemma 3n and Gemma 4: per-layer embeddings).

While blocks are removed, a copy with the slices of the remaining blocks replaces these weights, which takes additional
memory. Committing keeps the new parameters, so an optimizer must be created after the surgery.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamline_hooks.modeling import BlockStack

_WIDTH_ATTRIBUTE = "hidden_size_per_layer_input"
_SIZES = {nn.Embedding: ("embedding_dim", 1), nn.Linear: ("out_features", 0)}


@dataclass(frozen=True)
class PerLayerWeight:
    """A weight whose columns (of an embedding) or rows (of a projection) are the slices of the blocks, in order."""

    name: str
    """Name of the module below the stack's owner."""
    module: nn.Module
    """Embedding or projection."""
    size: str
    """Attribute of the module that contains the total size of all slices."""
    dim: int
    """Dimension of the weight that is sliced."""

    def chosen(self, length: int, sources: Sequence[int]) -> dict[str, nn.Parameter]:
        """Return copies of the parameters with the slices of the blocks `sources` out of `length` blocks."""
        indices = torch.tensor(list(sources))
        parameters = {}
        for name, parameter in self.module.named_parameters(recurse=False):
            dim = self.dim if name == "weight" else 0
            slices = parameter.data.unflatten(dim, (length, -1)).index_select(dim, indices.to(parameter.device))
            parameters[name] = nn.Parameter(slices.flatten(dim, dim + 1), requires_grad=parameter.requires_grad)
        return parameters


def per_layer_width(stack: BlockStack) -> int:
    """Return the number of features in a block's slice, or 0 if the configuration has none."""
    return getattr(stack.config, _WIDTH_ATTRIBUTE, None) or 0


def find_per_layer_weights(stack: BlockStack) -> list[PerLayerWeight]:
    """Find the embeddings and projections outside the blocks that have one slice per block of the full stack."""
    total_width = per_layer_width(stack) * len(stack)
    return [
        PerLayerWeight(name, module, size, dim)
        for name, module in stack.ancestors[-1].named_children()
        for kind, (size, dim) in _SIZES.items()
        if total_width and isinstance(module, kind) and "per_layer" in name and getattr(module, size) == total_width
    ]


def per_layer_weights_obstacle(stack: BlockStack) -> str | None:
    """Return why the slices cannot be selected, or None: the weights are missing, not in memory, or shared."""
    if not per_layer_width(stack):
        return None
    weights = find_per_layer_weights(stack)
    if not weights:
        return f"the model's embedding has one slice for each of its {len(stack)} blocks and was not found"
    parameters = [parameter for weight in weights for parameter in weight.module.parameters(recurse=False)]
    subject = f"{weights[0].name} has one slice for each of its {len(stack)} blocks"
    if any(parameter.is_meta for parameter in parameters):
        return f"{subject} and is not in memory (it is offloaded)"
    owners = sum(any(p is h for h in parameters) for _, p in stack.model.named_parameters(remove_duplicate=False))
    if owners != len(parameters):
        return f"{subject} and shares its weights with another module"
    return None


QUANTIZATION_CONFIG = "quantization_config"


class QuantizerSettings:
    """Block names in the settings of a quantizer, for the stack before the surgery.

    Settings such as ``modules_to_not_convert``, ``llm_int8_skip_modules`` and ``ignore`` name the modules that a
    checkpoint contains in full precision. Without renumbering they would name other blocks after a surgery.
    """

    def __init__(self, stack: BlockStack) -> None:
        self.stack = stack
        configs = [getattr(owner, "config", None) for owner in stack.ancestors]
        holding = {id(config): config for config in configs if getattr(config, "__dict__", {}).get(QUANTIZATION_CONFIG)}
        self.settings = [(config, vars(config)[QUANTIZATION_CONFIG]) for config in holding.values()]
        parts = stack.model.named_modules() if self.settings else ()
        lists = [name for name, part in parts if isinstance(part, (nn.ModuleList, nn.Sequential))]
        self._others = [f".{name}" for name in lists if name != stack.path]

    def renumbered(self, sources: Sequence[int | None]) -> Iterator[tuple[Any, Any]]:
        """Yield each configuration whose settings change, with the new settings, given the source of each slot."""
        slots: dict[int, list[int]] = defaultdict(list)
        for slot, source in enumerate(sources):
            if source is not None:
                slots[source].append(slot)
        for config, settings in self.settings:
            new = {name: self._renumbered(value, slots) for name, value in _settings_dict(settings).items()}
            if new != _settings_dict(settings):
                other = copy.copy(settings)
                _settings_dict(other).update(new)
                yield config, other

    def pattern(self, first: int) -> str | None:
        """Return a setting that matches only some blocks from `first` on, and is not the name of one block.

        A regular expression, or the end of a name that also occurs in another stack, cannot be renumbered.
        """
        for _, settings in self.settings:
            for name, value in _settings_dict(settings).items():
                for text in _strings(value):
                    if self._named(text) is None and self._tells_apart(text, first):
                        return f"{name}: {text}"
        return None

    def _renumbered(self, value: Any, slots: dict[int, list[int]]) -> Any:
        """Replace each name of a module in a block by its new names; a removed block has none."""
        if isinstance(value, dict):
            return {
                new: self._renumbered(inner, slots) for key, inner in value.items() for new in self._new(key, slots)
            }
        if isinstance(value, (list, tuple, set)):
            return type(value)(self._renumbered(new, slots) for item in value for new in self._new(item, slots))
        return value

    def _new(self, entry: Any, slots: dict[int, list[int]]) -> list[Any]:
        named = self._named(entry) if isinstance(entry, str) else None
        if named is None:
            return [entry]
        before, number, behind = named
        return [".".join([before, str(slot), *behind]) for slot in slots[number]]

    def _named(self, text: str) -> tuple[str, int, list[str]] | None:
        """Split a name into the stack's path as written, a block index and the rest, or return None.

        The path may begin deeper or less deep in the model (``layers.3``, ``model.layers.3``), as long as it matches no
        other list of modules.
        """
        parts, path = text.split("."), f".{self.stack.path}"
        for k in range(1, len(parts)):
            before = ".".join(parts[:k])
            if not (path.endswith(f".{before}") or f".{before}".endswith(path)):
                continue
            ours = parts[k].isdecimal() and int(parts[k]) < len(self.stack)
            alone = not any(other.endswith(f".{before}") for other in self._others)
            return (before, int(parts[k]), parts[k + 1 :]) if ours and alone else None
        return None

    def _tells_apart(self, text: str, first: int) -> bool:
        """Whether an entry matches a module in one block and not in another, by the rules of Transformers."""
        try:
            expression = re.compile(text.removeprefix("re:"))
        except re.error:
            return False
        matches: dict[str, set[bool]] = defaultdict(set)
        for k in range(first, len(self.stack)):
            for inside, _ in self.stack[k].named_modules():
                name = ".".join(filter(None, [self.stack.path, str(k), inside]))
                matches[inside].add(bool(expression.match(name)) or name.endswith(text))
        return any(len(answers) > 1 for answers in matches.values())


def _settings_dict(settings: Any) -> dict[str, Any]:
    return settings if isinstance(settings, dict) else vars(settings)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple, set)):
        for inner in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from _strings(inner)
