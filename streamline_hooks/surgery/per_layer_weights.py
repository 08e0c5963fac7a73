"""Weights outside the blocks that hold one slice for each of them (Gemma 3n and Gemma 4: per-layer embeddings).

While blocks are out, a copy with the slices of the others stands in their place: as much memory again. After commit
the parameters are new ones, so that an optimiser is made after the surgery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from streamline_hooks.stack import BlockStack

_WIDTH = "hidden_size_per_layer_input"
_SIZES = {nn.Embedding: ("embedding_dim", 1), nn.Linear: ("out_features", 0)}


@dataclass(frozen=True)
class PerLayerWeight:
    """A weight whose columns (of an embedding) or rows (of a projection) are the blocks' slices, one after the other.

    Attributes
    ----------
    name : str
        Of the module, below the stack's owner.
    module : torch.nn.Embedding or torch.nn.Linear
    size : str
        The module's attribute that holds the size of all slices together.
    dim : int
        The dimension of the weight that is cut.
    """

    name: str
    module: nn.Module
    size: str
    dim: int

    def chosen(self, length: int, sources: Sequence[int]) -> dict[str, nn.Parameter]:
        """The parameters with the slices of these blocks, in this order; whole copies, as the slots need them.

        Parameters
        ----------
        length : int
            Blocks that the weights hold slices for.
        sources : sequence of int
        """
        which = torch.tensor(list(sources))
        made = {}
        for name, held in self.module.named_parameters(recurse=False):
            dim = self.dim if name == "weight" else 0
            slices = held.data.unflatten(dim, (length, -1)).index_select(dim, which.to(held.device))
            made[name] = nn.Parameter(slices.flatten(dim, dim + 1), requires_grad=held.requires_grad)
        return made


def width_of_slices(stack: BlockStack) -> int:
    """Features of a block's slice, 0 where the configuration knows of none."""
    return getattr(stack.config, _WIDTH, None) or 0


def find_per_layer_weights(stack: BlockStack) -> list[PerLayerWeight]:
    """Find the embeddings and projections beside the blocks that have a slice for each of them.

    Parameters
    ----------
    stack : BlockStack
        With the number of blocks that the weights were made for.
    """
    everything = width_of_slices(stack) * len(stack)
    found = []
    for name, module in stack.ancestors[-1].named_children():
        for kind, (size, dim) in _SIZES.items():
            if everything and isinstance(module, kind) and "per_layer" in name and getattr(module, size) == everything:
                found.append(PerLayerWeight(name, module, size, dim))
    return found


def obstacle(stack: BlockStack) -> str | None:
    """Why the slices cannot be picked, where there are any: not found, not in memory, or shared with another weight."""
    if not width_of_slices(stack):
        return None
    found = find_per_layer_weights(stack)
    if not found:
        return f"the model's embedding has a part for each of its {len(stack)} blocks, and it was not found"
    held = [parameter for weight in found for parameter in weight.module.parameters(recurse=False)]
    what = f"{found[0].name} has a part for each of its {len(stack)} blocks"
    if any(parameter.is_meta for parameter in held):
        return f"{what} and is not in memory (it is offloaded)"
    owners = sum(any(p is h for h in held) for _, p in stack.model.named_parameters(remove_duplicate=False))
    if owners != len(held):
        return f"{what} and shares its weights with another module"
    return None
