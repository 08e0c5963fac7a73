"""Assert that identities preserve the output, and that a removal equals bypassing and a shorter model."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from streamline_hooks.core import Batch, describe_blocks
from streamline_hooks.modeling import BlockStack, find_stack, pooling_argument
from streamline_hooks.surgery import AFTER, BEFORE, INDEX_NAMES, LayerSurgeon, bypassing, checked_window
from streamline_hooks.testing.compare import (
    assert_outputs_match,
    is_transformers_model,
    make_batches,
    model_output,
    reproducible_eval,
)


def assert_identity_preserves_output(
    model: nn.Module,
    batch: Batch | Tensor | None = None,
    *,
    identity: Callable[[], nn.Module] = nn.Identity,
    positions: Iterable[int] | None = None,
    stack: str | None = None,
    tolerance: float = 0.0,
) -> None:
    """Assert that inserted identities, and blocks replaced by themselves, leave the logits unchanged.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with a block stack. It is run in evaluation mode and restored.
    batch : mapping or torch.Tensor, optional
        Inputs of the forward. Default for a Transformers model: random tokens, with and without left padding.
    identity : callable
        Returns the module to insert, for example a replacement in its initial state.
    positions : iterable of int, optional
        Positions of the insertion, 0 to L for a stack of L blocks. Default: all.
    stack : str, optional
        Path of the block stack, see `find_stack`.
    tolerance : float
        Relative tolerance; 0 compares bit for bit.

    Raises
    ------
    AssertionError
        If the logits change. The message contains the position, the largest difference and its index.
    StreamlineError
        If no batch can be generated, or a position is out of range.

    Examples
    --------
    >>> from streamline_hooks.testing import assert_identity_preserves_output, tiny_model
    >>> assert_identity_preserves_output(tiny_model("llama", blocks=3))
    """
    batches = make_batches(model, batch, left_padded=True)
    length = len(find_stack(model, stack))
    tested = range(length + 1) if positions is None else list(positions)
    with reproducible_eval(model):
        for inputs in batches:
            expected = model_output(model, inputs)
            for position in tested:
                with LayerSurgeon(model, stack, probe=False) as surgeon:
                    name = type(surgeon.insert(position, identity())).__name__
                    got = model_output(model, inputs)
                where = f"before block {position}" if position < length else f"after the last block (position {length})"
                description = f"A {name} inserted {where} changes the logits"
                cause = f"the {name} is not an identity, or the hook that runs it changes the state"
                assert_outputs_match(model, inputs, got, expected, description, cause, tolerance)
            for k in range(length):
                with LayerSurgeon(model, stack, probe=False) as surgeon:
                    surgeon.replace([k], surgeon.stack[k])
                    got = model_output(model, inputs)
                description = f"Block {k} replaced by itself changes the logits"
                cause = "the surgery moves, renumbers or copies a block that it should not change"
                assert_outputs_match(model, inputs, got, expected, description, cause, tolerance)


def assert_removal_equals_shorter_model(
    model: nn.Module,
    window: Iterable[int],
    batch: Batch | Tensor | None = None,
    *,
    stack: str | None = None,
    tolerance: float | None = None,
) -> None:
    """Assert that removing a window is equivalent to a model built with fewer blocks.

    The logits of the model after a `LayerSurgeon` has removed the window must equal (a) the logits of the model with
    the window bypassed by hooks, and (b) for a Transformers model, the logits of the class built from the shortened
    configuration with the remaining weights. The block indices of the models must be equal too.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with a block stack. It is restored. For (b) a second, shorter model is built.
    window : iterable of int
        Consecutive block indices, for example ``range(2, 4)``.
    batch : mapping or torch.Tensor, optional
        Inputs of the forward. Default for a Transformers model: random tokens, with and without left padding.
    stack : str, optional
        Path of the block stack, see `find_stack`.
    tolerance : float, optional
        Relative tolerance. The default depends on the dtype (1e-5 for float32).

    Raises
    ------
    AssertionError
        If logits or indices differ. The message contains the comparison, the largest difference and its index.
    UnsupportedSurgery
        If the window cannot be removed for a known reason.
    StreamlineError
        If the window is out of range, or no batch can be generated.

    Examples
    --------
    >>> from streamline_hooks.testing import assert_removal_equals_shorter_model, tiny_model
    >>> assert_removal_equals_shorter_model(tiny_model("llama", blocks=4), range(1, 3))
    """
    blocks = find_stack(model, stack)
    removed_blocks = checked_window(window, len(blocks))
    batches = make_batches(model, batch, left_padded=True)
    description = f"{type(model).__name__} without {describe_blocks(removed_blocks)}"
    with reproducible_eval(model):
        with bypassing(model, removed_blocks, stack=stack):
            bypassed = [model_output(model, inputs) for inputs in batches]
        weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
        with LayerSurgeon(model, stack, probe=False) as surgeon:
            surgeon.remove(removed_blocks)
            removed = [model_output(model, inputs) for inputs in batches]
            remaining = find_stack(model, blocks.path)
            indices = block_index_attributes(remaining.blocks)
            wrong = wrong_block_indices(remaining)
            config = copy.deepcopy(model.config) if is_transformers_model(model) else None
            now = {key: value.detach().clone() for key, value in model.state_dict().items()}
            names = [name for name, _ in remaining.container.named_children()]
        cause = "the wrong blocks remain, or their order, attention mask or positions changed"
        cause = f"{cause} ({'; '.join(wrong)})" if wrong else cause
        for inputs, logits, expected in zip(batches, removed, bypassed, strict=True):
            by_hooks = f"{description} returns different logits than with these blocks bypassed by hooks"
            assert_outputs_match(model, inputs, logits, expected, by_hooks, cause, tolerance)
        if config is None:
            return
        if _has_splices(weights):
            shorter = _build_with_splices(model, blocks, removed_blocks, weights)
        else:
            renamed = _rename_weights(weights, now, blocks, removed_blocks, names)
            shorter = _build_shorter_model(type(model), config, renamed, model, description)
        expected_indices = block_index_attributes(find_stack(shorter, blocks.path).blocks)
        for (path, name), by_position in expected_indices.items():
            for position, value in by_position.items():
                index = indices.get((path, name), {}).get(position, value)
                if index != value:
                    raise AssertionError(
                        f"{description}: {name} of block {position}{f' ({path})' if path else ''} is {index}; expected "
                        f"{value}, as in a {type(shorter).__name__} built from the shortened configuration. Likely "
                        "cause: the surgery does not renumber the blocks, so they write to the wrong cache slots."
                    )
        cause = (
            "the lists or counts of the configuration were not shortened like the blocks, or the class builds a block "
            "depending on its index, so that a checkpoint would load as a different model"
        )
        with reproducible_eval(shorter):
            for inputs, logits in zip(batches, removed, strict=True):
                by_class = (
                    f"{description} returns different logits than the class built from the shortened configuration"
                )
                assert_outputs_match(shorter, inputs, logits, model_output(shorter, inputs), by_class, cause, tolerance)


def _has_splices(weights: Mapping[str, Tensor]) -> bool:
    return any({BEFORE, AFTER} & set(key.split(".")) for key in weights)


def _rename_weights(
    weights: Mapping[str, Tensor], now: Mapping[str, Tensor], stack: BlockStack, window: range, names: list[str]
) -> dict[str, Tensor]:
    """Return the remaining weights under their new names, of blocks from `weights` and of other modules from `now`."""
    old = [name for name, _ in stack.container.named_children()]
    new = dict(zip((name for k, name in enumerate(old) if k not in window), names, strict=True))
    prefix = f"{stack.path}."
    renamed = {key: value for key, value in now.items() if not key.startswith(prefix)}
    for key, value in weights.items():
        name, _, rest = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix) and name in new:
            renamed[f"{prefix}{new[name]}.{rest}"] = value
    return renamed


def _build_with_splices(model: nn.Module, stack: BlockStack, window: range, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build the shorter model of a model with splices from a copy in which the removal is committed."""
    duplicate: Any = copy.deepcopy(model)
    with LayerSurgeon(duplicate, stack.path, probe=False) as surgeon:
        surgeon.remove(window)
        surgeon.commit()
    now = duplicate.state_dict()
    names = [name for name, _ in find_stack(duplicate, stack.path).container.named_children()]
    plain = {key: value for key, value in weights.items() if not {BEFORE, AFTER} & set(key.split("."))}
    remaining = {
        key: value for key, value in now.items() if _has_splices({key: value}) or not key.startswith(f"{stack.path}.")
    }
    remaining |= _rename_weights(plain, {}, stack, window, names)
    return _build_shorter_model(type(duplicate), duplicate.config, remaining, model, type(model).__name__)


def _build_shorter_model(
    model_class: type[Any], config: Any, weights: Mapping[str, Tensor], like: nn.Module, what: str
) -> nn.Module:
    try:
        shorter: nn.Module = model_class(config, **pooling_argument(like)).to(next(like.parameters()).device).eval()
        _cast_like(shorter, like, weights)
        shorter.load_state_dict(dict(weights), strict=True)
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise AssertionError(
            f"{what}: {model_class.__name__} cannot be built from the shortened configuration and loaded with the "
            f"remaining weights: {type(error).__name__}: {' '.join(str(error).split())[:600]}. Likely cause: a count "
            "or list in the configuration does not match the blocks."
        ) from error
    return shorter


def _cast_like(shorter: nn.Module, like: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Cast parameters to the dtypes of the weights, and buffers to the dtype of the buffer of the same name."""
    buffers = {name.rpartition(".")[2]: buffer.dtype for name, buffer in like.named_buffers()}
    for name, parameter in shorter.named_parameters():
        if name in weights:
            parameter.data = parameter.data.to(weights[name].dtype)
    for module in shorter.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name in buffers:
                module._buffers[name] = buffer.to(buffers[name])


def block_index_attributes(blocks: Sequence[nn.Module]) -> dict[tuple[str, str], dict[int, int]]:
    """Return the index attributes of blocks by path below the block and name, then by position in the stack."""
    indices: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for position, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name in INDEX_NAMES & vars(module).keys():
                value = vars(module)[name]
                if type(value) is int:
                    indices[path, name][position] = value
    return dict(indices)


def wrong_block_indices(stack: BlockStack) -> list[str]:
    """Describe the blocks whose index attribute is not their position in the stack.

    Duplicate indices, and indices that do not start at 0 (or at 1 for all blocks), break a cache.
    """
    descriptions = []
    names = [name for name, _ in stack.container.named_children()]
    for (path, name), by_position in block_index_attributes(stack.blocks).items():
        shifts = [value - position for position, value in by_position.items()]
        expected = 1 if name == "layer_number" and shifts.count(1) > shifts.count(0) else 0
        is_uniform = len(shifts) > 1 and len(set(shifts)) == 1
        if not is_uniform and 2 * shifts.count(expected) <= len(shifts):
            continue  # not a block index, for example the index of an attention shared by several blocks
        for position, value in by_position.items():
            if value != position + expected:
                location = ".".join(filter(None, (stack.path, names[position], path)))
                descriptions.append(f"{name} of block {position} ({location}) is {value}")
    return descriptions
