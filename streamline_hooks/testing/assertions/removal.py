"""Assert that removing a window equals bypassing it, and equals the class built with fewer blocks."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.pooling_layer import pooling_argument
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.bypass import bypassing
from streamline_hooks.surgery.layout import window_of
from streamline_hooks.surgery.renumber import INDEX_NAMES
from streamline_hooks.surgery.splice import AFTER, BEFORE
from streamline_hooks.testing.assertions.difference import require_same
from streamline_hooks.testing.assertions.running import (
    answer,
    axes_of,
    batches_for,
    is_transformers_model,
    padding_said,
    quietly,
    real_places,
)


def assert_removal_equals_shorter_model(
    model: nn.Module,
    window: Iterable[int],
    batch: Batch | Tensor | None = None,
    *,
    stack: str | None = None,
    tolerance: float | None = None,
) -> None:
    """Assert that removing a window gives the shorter model that it claims to give.

    The logits with the window removed by a `LayerSurgeon` must equal (a) those of the same model with the window
    bypassed by plain hooks, and (b), for a Transformers model, those of its class built from the shortened
    configuration, with the remaining weights loaded under their new names. The blocks of both must say the same
    numbers.

    Parameters
    ----------
    model : torch.nn.Module
        It is given back as it was. For (b) a second, shorter model is built beside it.
    window : iterable of int
        Consecutive blocks, for instance ``range(2, 4)``.
    batch : mapping or torch.Tensor, optional
        What the model's forward takes. Made up for a Transformers model, left-padded as well.
    stack : str, optional
        Path of the stack, see `find_stack`.
    tolerance : float, optional
        Relative; by default that of the dtype, see `difference`.

    Raises
    ------
    AssertionError
        With what the logits differ from, the largest difference and where it is.
    UnsupportedSurgery
        If the window cannot go for a reason that is known; nothing was wrong then.
    StreamlineError
        If the window is none of this model, or no batch can be made up.

    Examples
    --------
    >>> from streamline_hooks.testing import assert_removal_equals_shorter_model, tiny_model
    >>> assert_removal_equals_shorter_model(tiny_model("llama", blocks=4), range(1, 3))
    """
    found = find_stack(model, stack)
    chosen = window_of(window, len(found))
    batches = batches_for(model, batch, left_padded=True)
    what = f"{type(model).__name__} without blocks {chosen.start} to {chosen.stop - 1}"
    with quietly(model):
        with bypassing(model, chosen, stack=stack):
            bypassed = [answer(model, given) for given in batches]
        weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
        with LayerSurgeon(model, stack, probe=False) as surgeon:
            surgeon.remove(chosen)
            removed = [answer(model, given) for given in batches]
            left = find_stack(model, found.path)
            numbers = numbers_said(left.blocks)
            wrong = wrong_numbers(left)
            config = copy.deepcopy(model.config) if is_transformers_model(model) else None
            now = {key: value.detach().clone() for key, value in model.state_dict().items()}
            names = [name for name, _ in left.container.named_children()]
        for given, got, expected in zip(batches, removed, bypassed, strict=True):
            cause = "the surgery leaves the wrong blocks, or in another order, or hands them another mask or position"
            require_same(
                got,
                expected,
                f"{what} gives other logits than with them bypassed by hooks{padding_said(given)}",
                f"{cause} ({'; '.join(wrong)})" if wrong else cause,
                real=real_places(given, expected),
                tolerance=tolerance,
                axes=axes_of(model),
            )
        if config is None:
            return
        if _spliced(weights):
            shorter = _committed_anew(model, found, chosen, weights)
        else:
            shorter = _built(type(model), config, _renumbered(weights, now, found, chosen, names), model, what)
        _hold_shorter(shorter, found.path, what, numbers, batches, removed, tolerance)


def _hold_shorter(
    shorter: nn.Module,
    path: str,
    what: str,
    numbers: Mapping[tuple[str, str], Mapping[int, int]],
    batches: list[dict[str, Any]],
    removed: list[Tensor],
    tolerance: float | None,
) -> None:
    theirs = numbers_said(find_stack(shorter, path).blocks)
    for (where, name), by_position in theirs.items():
        for position, value in by_position.items():
            said = numbers.get((where, name), {}).get(position)
            if said is not None and said != value:
                raise AssertionError(
                    f"{what}: {name} of block {position}{f' ({where})' if where else ''} says {said}; expected "
                    f"{value}, as in a {type(shorter).__name__} built from the shortened configuration. Likely cause: "
                    "the surgery does not renumber the blocks, so that a cache is written into the wrong slots."
                )
    with quietly(shorter):
        for given, got in zip(batches, removed, strict=True):
            expected = answer(shorter, given)
            require_same(
                got,
                expected,
                f"{what} gives other logits than the class built from the shortened configuration{padding_said(given)}",
                "the configuration's lists or counts were not shortened as the blocks were, or the class builds a "
                "block from its number, so that a checkpoint would come back as another model",
                real=real_places(given, expected),
                tolerance=tolerance,
                axes=axes_of(shorter),
            )


def _spliced(weights: Mapping[str, Tensor]) -> bool:
    return any({BEFORE, AFTER} & set(key.split(".")) for key in weights)


def _renumbered(
    weights: Mapping[str, Tensor], now: Mapping[str, Tensor], stack: BlockStack, window: range, names: list[str]
) -> dict[str, Tensor]:
    """The remaining weights under their new names: the blocks' as they were, counted here; the others as they are."""
    old = [name for name, _ in stack.container.named_children()]
    new = dict(zip((name for k, name in enumerate(old) if k not in window), names, strict=True))
    prefix = f"{stack.path}."
    kept = {key: value for key, value in now.items() if not key.startswith(prefix)}
    for key, value in weights.items():
        name, _, rest = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix) and name in new:
            kept[f"{prefix}{new[name]}.{rest}"] = value
    return kept


def _committed_anew(model: nn.Module, stack: BlockStack, window: range, weights: Mapping[str, Tensor]) -> nn.Module:
    """With splices: where they go is said by the configuration of a copy on which the removal is committed."""
    duplicate: Any = copy.deepcopy(model)
    with LayerSurgeon(duplicate, stack.path, probe=False) as surgeon:
        surgeon.remove(window)
        surgeon.commit()
    now = duplicate.state_dict()
    names = [name for name, _ in find_stack(duplicate, stack.path).container.named_children()]
    plain = {key: value for key, value in weights.items() if not {BEFORE, AFTER} & set(key.split("."))}
    kept = {key: value for key, value in now.items() if _spliced({key: value}) or not key.startswith(f"{stack.path}.")}
    kept |= {k: v for k, v in _renumbered(plain, {}, stack, window, names).items()}
    return _built(type(duplicate), duplicate.config, kept, model, type(model).__name__)


def _built(model_class: type[Any], config: Any, weights: Mapping[str, Tensor], like: nn.Module, what: str) -> nn.Module:
    try:
        shorter = model_class(config, **pooling_argument(like)).to(next(like.parameters()).device).eval()
        _as_precise(shorter, like, weights)
        shorter.load_state_dict(dict(weights), strict=True)
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise AssertionError(
            f"{what}: {model_class.__name__} cannot be built from the shortened configuration and given the "
            f"remaining weights: {type(error).__name__}: {' '.join(str(error).split())[:600]}. Likely cause: a count "
            "or a list in the configuration does not say what the blocks are."
        ) from error
    return shorter


def _as_precise(shorter: nn.Module, like: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give each tensor the precision of the one that it stands for; buffers that are not saved, that of their name."""
    buffers = {name.rpartition(".")[2]: buffer.dtype for name, buffer in like.named_buffers()}
    with torch.no_grad():
        for name, parameter in shorter.named_parameters():
            if name in weights:
                parameter.data = parameter.data.to(weights[name].dtype)
        for module in shorter.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point() and name in buffers:
                    module._buffers[name] = buffer.to(buffers[name])


def numbers_said(blocks: Sequence[nn.Module]) -> dict[tuple[str, str], dict[int, int]]:
    """What blocks say their number is, by the attribute's path below the block and its name, and by the position."""
    said: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for position, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name in INDEX_NAMES & vars(module).keys():
                value = vars(module)[name]
                if type(value) is int:
                    said[path, name][position] = value
    return dict(said)


def wrong_numbers(stack: BlockStack) -> list[str]:
    """Return sentences on blocks whose index attribute is not their position in the stack.

    Duplicate indices, and counts that do not begin at 0 (or 1 where all do), break a cache.
    """
    found = []
    names = [name for name, _ in stack.container.named_children()]
    for (path, name), by_position in numbers_said(stack.blocks).items():
        shifts = [value - position for position, value in by_position.items()]
        expected = 1 if name == "layer_number" and shifts.count(1) > shifts.count(0) else 0
        evenly = len(shifts) > 1 and len(set(shifts)) == 1
        if not evenly and 2 * shifts.count(expected) <= len(shifts):
            continue  # numbers of something else, such as of attentions shared by several blocks
        for position, value in by_position.items():
            if value != position + expected:
                where = ".".join(filter(None, (stack.path, names[position], path)))
                found.append(f"{name} of block {position} ({where}) says {value}")
    return found
