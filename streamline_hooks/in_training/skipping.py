"""Skip blocks of a model in single forwards, and check that this equals bypassing them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.read_hook import ChangeHook
from streamline_hooks.stack import BlockStack, find_stack, members
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.bypass import bypass
from streamline_hooks.surgery.copies import find_copies
from streamline_hooks.surgery.edits import Edits
from streamline_hooks.surgery.hazards import find_hazards
from streamline_hooks.surgery.layout import Layout
from streamline_hooks.surgery.own_config import OwnConfigs
from streamline_hooks.surgery.probe import observe_hooked, shortfall
from streamline_hooks.surgery.renumber import shortened_config
from streamline_hooks.surgery.saving import saver_depth


class OwnBlocks(Edits):
    """The edits of a `LayerSurgeon` that repeatedly removes blocks only, with its look-ups cached."""

    def __init__(self, configs: OwnConfigs) -> None:
        super().__init__(configs, uuid.uuid4().hex)
        self._numbers = {id(block): k for k, block in enumerate(self.stack.blocks)}
        self._described: list[Any] | None = None
        self._copying: list[nn.Module] = []

    def source(self, module: nn.Module) -> int | None:
        """The block's number."""
        return self._numbers[id(module)]

    def lay_out(self, *arranged: Any) -> None:
        """As `Edits.lay_out`; the first time, while the model has all blocks, look for what repeats a configuration."""
        if self._described is None:
            config, count, everything = self.stack.config, self.stack.count_attribute, range(len(self.stack))
            if config is not None and count is not None:
                names = {count, *shortened_config(config, count, len(everything), everything, self.stack.stage)}
                held = {name: vars(config)[name] for name in names if name in vars(config)}
                found = find_copies(self.stack, held, held, everything)
                self._copying = list(dict.fromkeys(module for module, _, _ in found))
            self._described = super()._descriptions()
        super().lay_out(*arranged)

    def _descriptions(self) -> list[Any]:
        return self._described or []

    def _copies(
        self, old: Mapping[str, Any], new: Mapping[str, Any], sources: Sequence[int]
    ) -> Iterator[tuple[nn.Module, str, Any]]:
        return find_copies(self.stack, old, new, sources, self._copying)


class Skipping:
    """Remove blocks from a model and restore them repeatedly, with the look-ups of a `LayerSurgeon` done once."""

    def __init__(self, model: nn.Module, stack: BlockStack) -> None:
        self.model = model
        self._follow(stack)

    def _follow(self, stack: BlockStack) -> None:
        self.stack = stack
        self._configs = OwnConfigs(stack)
        self._edits = OwnBlocks(self._configs)

    def follow(self) -> bool:
        """Look at the stack anew where it has other blocks or another configuration by now; whether it has others."""
        same = members(self.stack.container) == self.stack.blocks
        if not same or not self.stack.has_its_config():
            self._follow(find_stack(self.model, self.stack.path))
        return not same

    def leave_out(self, blocks: Collection[int]) -> None:
        """Take blocks out; the model has all of them."""
        layout = Layout(list(self.stack.blocks))
        for k in blocks:
            layout.give_up(range(k, k + 1), None)
        try:
            self._configs.put_in()
            self._edits.lay_out(*layout.arrange())
        except BaseException:
            self.put_back()
            raise

    def put_back(self) -> None:
        """Give the model all its blocks, to the bit as they were; does no harm the second time."""
        try:
            self._close()
        except BaseException:  # Ctrl-C in the middle of it: every step can be done twice
            self._close()
            raise

    def _close(self) -> None:
        self._edits.close()
        self._configs.put_back(search=False)


class BeginHook(ChangeHook):
    """A pre-hook of a model, which must not be without effect where a replica runs in the model's place."""

    def __init__(self, watched: nn.Module | None = None, change: Callable[..., Any] | None = None) -> None:
        super().__init__(watched, change)
        self.is_live = change is not None

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Call what was given, unless it is a copy that runs."""
        if self.is_live and getattr(module, "_is_replica", False):
            raise StreamlineError(
                f"A replica of {type(module).__name__} is running (nn.DataParallel), from which no block can be "
                "skipped. Use DistributedDataParallel, or one device."
            )
        return super().__call__(module, *given)


def require_skippable(skipping: Skipping, blocks: Sequence[int]) -> None:
    """Raise `UnsupportedSurgery` unless skipping the blocks equals bypassing them.

    Every second block is skipped at once, then the others. If either fails, blocks are tried one by one to name the
    culprit.
    """
    stack = skipping.stack
    if len(stack) < 2 and blocks:
        raise StreamlineError(f"{stack.path} has one block, which cannot be skipped; expected two at least.")
    for k in blocks:
        hazards = find_hazards(stack, range(k, k + 1))
        if hazards:
            _refuse(k, f"{'; '.join(map(str, hazards))}.", hazards[0].cause)
    for some in (blocks[::2], blocks[1::2]):
        wrong = _wrong_without(skipping, some) if some else None
        if wrong is not None:
            for k in some:
                _try_alone(stack, k)
            raise UnsupportedSurgery(
                f"Blocks {', '.join(map(str, some))} cannot be skipped in one forward: without them {wrong}, though "
                "each of them can go alone. Name some of them in keep=.",
                "probe",
            )


def _wrong_without(skipping: Skipping, blocks: Sequence[int]) -> str | None:
    """What the model does otherwise than with these blocks bypassed; None where it is right, or nothing can tell."""
    stack, model = skipping.stack, skipping.model
    called: set[int] = set()

    def attach() -> list[RemovableHandle]:
        called.clear()
        watching = [stack[k].register_forward_pre_hook(partial(_note, called, k)) for k in blocks]
        return [*watching, *(handle for k in blocks for handle in bypass(stack[k], stack[k]))]

    what = f"Skipping blocks of this {type(model).__name__} is not held against the same blocks bypassed"
    holds = saver_depth(stack) == 0
    truth = observe_hooked(model, attach, what, frames=5, runs=stack[blocks[0]]) if holds else None
    if truth is not None and len(called) < len(blocks):
        given = " and ".join(truth.given)
        return f"nothing shows whether the model is right, as a forward of {given} alone does not run them all"
    own = {id(parameter) for parameter in model.parameters()}
    skipping.leave_out(blocks)
    try:
        copies = [name for name, parameter in model.named_parameters() if id(parameter) not in own]
        if copies:
            raise UnsupportedSurgery(
                f"Blocks of {type(model).__name__} cannot be skipped at random: {' and '.join(copies)} would be copies "
                "without the parts of those blocks, and what the copies learn would be lost. Train this model with "
                "all its blocks.",
                "per-layer-embeddings",
            )
        return None if truth is None else shortfall(truth, model)
    finally:
        skipping.put_back()


def _note(called: set[int], k: int, *given: object) -> None:
    called.add(k)


def _try_alone(stack: BlockStack, k: int) -> None:
    with LayerSurgeon(stack.model, stack) as surgeon:
        try:
            surgeon.remove([k])
        except UnsupportedSurgery as error:
            _refuse(k, str(error).split(" cannot go: ", 1)[-1].removesuffix(" Choose others."), error.cause)


def _refuse(k: int, why: str, cause: str) -> None:
    raise UnsupportedSurgery(
        f"Block {k} cannot be skipped: {why} Name it in keep=, so that it is never skipped.", cause
    )
