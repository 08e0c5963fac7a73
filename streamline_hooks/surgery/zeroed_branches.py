"""Zero one residual branch of a block by replacing its output projections by zeros.

The block keeps its slot, its cache entry and its index, so no mask or rotary embedding changes, and the checkpoint
keeps the format of its architecture. The parameters are replaced instead of overwritten, so that the original ones can
be restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import Batch, UnsupportedSurgery
from streamline_hooks.modeling import (
    BlockCall,
    BlockStack,
    Branch,
    Branches,
    branches_in,
    observe_blocks,
    read_output,
    write_output,
)
from streamline_hooks.surgery.probe import (
    ReferenceRun,
    run_reference_with_hooks,
)

Parameters = Mapping[str, nn.Parameter]
"""Parameters by their path below a block."""


@dataclass(frozen=True)
class ParameterSwap:
    """Replacements of a branch's output projections: zeros if `is_zero`, otherwise products with a folded map."""

    parameters: Parameters
    is_zero: bool


def parameter_like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Return a parameter with other values and the attributes of `parameter`."""
    replacement = nn.Parameter(values, requires_grad=parameter.requires_grad)
    vars(replacement).update(vars(parameter))
    return replacement


_COMPUTE = "_streamline_hooks_compute"


def computed_parameter(original: nn.Parameter, compute: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """Return a parameter whose values are computed from those of `original`.

    If `original` is offloaded, the result is on the meta device. Its values are computed whenever its module is loaded,
    see `offloaded_values`, because those of many blocks may not fit into memory.
    """
    if not original.is_meta:
        return parameter_like(original, compute(original.detach()))
    before = vars(original).get(_COMPUTE)
    replacement = parameter_like(original, torch.empty_like(original))
    vars(replacement)[_COMPUTE] = compute if before is None else partial(_composed, before, compute)
    return replacement


def offloaded_values(parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
    """Return the function from the stored values of an offloaded parameter to those of its replacement."""
    compute: Callable[[Tensor], Tensor] | None = vars(parameter).get(_COMPUTE)
    return compute or partial(_constant, parameter.detach())


def _composed(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return second(first(values))


def _constant(values: Tensor, stored: Tensor) -> Tensor:
    return values.to(stored.dtype)


def require_unshared(stack: BlockStack, k: int, paths: Iterable[str], verb: str) -> None:
    """Raise `UnsupportedSurgery` if a projection is shared, since the other module would change or not be saved."""
    projection_ids = {id(stack[k].get_parameter(path)) for path in paths}
    names: dict[int, list[str]] = {}
    for name, parameter in stack.model.named_parameters(remove_duplicate=False):
        if id(parameter) in projection_ids:
            names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1:
            raise UnsupportedSurgery(
                f"The branches of block {k} cannot be {verb} separately: {' and '.join(shared)} are the same "
                "parameter. Untie them first, or choose another block."
            )


def require_unquantized(parameter: nn.Parameter, k: int, path: str, replacement: str, advice: str) -> None:
    """Raise `UnsupportedSurgery` if a parameter is quantized and cannot be replaced by a tensor of its shape."""
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor or not parameter.is_floating_point():
        raise UnsupportedSurgery(
            f"{replacement} cannot replace {path} of block {k}, which is a {type(parameter).__name__} of "
            f"{parameter.dtype} ({type(parameter.data).__name__}). {advice}"
        )


def require_branches(call: BlockCall | UnsupportedSurgery, refusal: str) -> tuple[BlockCall, Branches]:
    """Return a call and the branches of its block, or raise; `refusal` is the first part of the error's text."""
    branches = branches_in(call)
    if isinstance(call, UnsupportedSurgery) or isinstance(branches, UnsupportedSurgery):
        raise UnsupportedSurgery(f"{refusal}: {branches} Choose another block.", "branches")
    return call, branches


def zero_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the zero parameters of a module if one of them is a matrix, as after `LayerSurgeon.zero_branch`.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> len(zero_parameters(layer))
    0
    >>> _ = nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    >>> len(zero_parameters(layer))
    2
    """
    parameters = [p for p in module.parameters(recurse=False) if p.is_floating_point() and not p.is_meta]
    zero = [p for p in parameters if not bool(p.detach().any())]
    return zero if any(p.ndim > 1 for p in zero) else []


def zero_parameter_ids(module: nn.Module) -> set[int]:
    """Return the ``id`` of each parameter that `zero_parameters` finds in a module and its submodules."""
    return {id(parameter) for part in module.modules() for parameter in zero_parameters(part)}


def find_zeros(stack: BlockStack, k: int, branch: Branch, batch: Batch | Tensor | None) -> Parameters:
    """Return zeros for a branch's output projections, or raise `UnsupportedSurgery` if they cannot be replaced."""
    with observe_blocks(stack, [k], batch) as calls:
        _, branches = require_branches(calls[k], f"The {branch} branch of block {k} cannot be zeroed")
    paths = branches.writers[branch]
    require_unshared(stack, k, paths, "zeroed")
    projections = {path: stack[k].get_parameter(path) for path in paths}
    for path, parameter in projections.items():
        require_unquantized(parameter, k, path, "Zeros", "Zero branches before quantizing.")
    return {path: computed_parameter(parameter, torch.zeros_like) for path, parameter in projections.items()}


def observe_zeroed(model: nn.Module, block: nn.Module, paths: Iterable[str]) -> ReferenceRun | None:
    """Run a Transformers model with the outputs of some projections replaced by zeros, and with its own parameters.

    Return None, with a warning, if the model is not deterministic or cannot be run without a batch.
    """
    owners = {path.rpartition(".")[0] for path in paths}

    def attach() -> list[RemovableHandle]:
        return [block.get_submodule(owner).register_forward_hook(zero_output) for owner in owners]

    message = f"The zeroed branch of this {type(model).__name__} is not compared with the model without the branch"
    return run_reference_with_hooks(model, attach, message, runs=block)


def zero_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Replace the output of a module by zeros, as a forward hook."""
    return write_output(output, torch.zeros_like(read_output(output)))
