"""What a quantizer's settings say of blocks by their path: which modules stay as they are, or are treated otherwise."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from streamline_hooks.stack import BlockStack

SETTINGS = "quantization_config"


class QuantizerNames:
    """The names of a stack's blocks in the settings of a quantizer.

    By them (``modules_to_not_convert``, ``llm_int8_skip_modules``, ``ignore``, ...) who loads a checkpoint is told
    which modules it holds in full precision. Left as they are, they speak of other blocks after a surgery.

    Parameters
    ----------
    stack : BlockStack
        As it is before the surgery.
    """

    def __init__(self, stack: BlockStack) -> None:
        self.stack = stack
        configs = [getattr(owner, "config", None) for owner in stack.ancestors]
        holding = {id(config): config for config in configs if getattr(config, "__dict__", {}).get(SETTINGS)}
        self.held = [(config, vars(config)[SETTINGS]) for config in holding.values()]
        parts = stack.model.named_modules() if self.held else ()
        lists = [name for name, part in parts if isinstance(part, (nn.ModuleList, nn.Sequential))]
        self._others = [f".{name}" for name in lists if name != stack.path]

    def renumbered(self, sources: Sequence[int | None]) -> Iterator[tuple[Any, Any]]:
        """Find the settings that change, and what they must become.

        Parameters
        ----------
        sources : sequence of int or None
            For each slot of the new stack the block that stands there; None for one that no setting can name.

        Yields
        ------
        config : object
            A configuration that holds such settings.
        value : dict or object
            What its ``quantization_config`` must be: another one of the same kind.
        """
        slots: dict[int, list[int]] = defaultdict(list)
        for slot, source in enumerate(sources):
            if source is not None:
                slots[source].append(slot)
        for config, held in self.held:
            old = _values(held)
            new = {name: self._renumbered(value, slots) for name, value in old.items()}
            if new == old:
                continue
            other = copy.copy(held)
            _values(other).update(new)
            yield config, other

    def pattern(self, first: int) -> str | None:
        """What means some blocks and not others, from a place on, and is no name of one; None where nothing does.

        A regular expression, or the end of a name that another stack has too: it cannot be written for other numbers.

        Parameters
        ----------
        first : int
            The first block whose number changes.
        """
        for _, held in self.held:
            for name, value in _values(held).items():
                for text in _texts(value):
                    if self._named(text) is None and self._tells_apart(text, first):
                        return f"{name}: {text}"
        return None

    def _renumbered(self, value: Any, slots: dict[int, list[int]]) -> Any:
        """The same with each name of a block's part in its new places, and without those of blocks that are gone."""
        if isinstance(value, dict):
            return {
                new: self._renumbered(inner, slots) for key, inner in value.items() for new in self._new(key, slots)
            }
        if isinstance(value, (list, tuple, set)):
            return type(value)(self._renumbered(new, slots) for one in value for new in self._new(one, slots))
        return value

    def _new(self, entry: Any, slots: dict[int, list[int]]) -> list[Any]:
        named = self._named(entry) if isinstance(entry, str) else None
        if named is None:
            return [entry]
        before, number, behind = named
        return [".".join([before, str(slot), *behind]) for slot in slots[number]]

    def _named(self, text: str) -> tuple[str, int, list[str]] | None:
        """The stack's path as it is written here, the number of one of its blocks, and what follows; or None.

        The path may begin further inside the model or further outside of it (``layers.3``, ``model.layers.3``), where
        no other list of modules is meant by it too.
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
        """Whether it is true of a part in one block, as Transformers asks, and not of the same in another."""
        try:
            expression = re.compile(text.removeprefix("re:"))
        except re.error:
            return False
        said: dict[str, set[bool]] = defaultdict(set)
        for k in range(first, len(self.stack)):
            for inside, _ in self.stack[k].named_modules():
                name = ".".join(filter(None, [self.stack.path, str(k), inside]))
                said[inside].add(bool(expression.match(name)) or name.endswith(text))
        return any(len(answers) > 1 for answers in said.values())


def _values(held: Any) -> dict[str, Any]:
    return held if isinstance(held, dict) else vars(held)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple, set)):
        for inner in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from _texts(inner)
