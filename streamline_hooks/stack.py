"""Where the blocks of a model are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from streamline_hooks.arguments import checked
from streamline_hooks.errors import StreamlineError

_CONTAINERS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True, eq=False)
class BlockStack:
    """A run of transformer blocks that are called one after the other.

    Attributes
    ----------
    path : str
        Dotted path of the container below the model, for instance ``"model.layers"``.
    container : torch.nn.Module
        The ``ModuleList`` or ``Sequential`` that holds the blocks.
    blocks : tuple of torch.nn.Module
        The blocks, in order, as they were when the stack was found.
    ancestors : tuple of torch.nn.Module
        The modules from the model down to the container's owner.
    config : object or None
        The configuration whose block count describes this stack, or None where there is none.
    count_attribute : str or None
        The attribute of ``config`` that holds the number of blocks.
    stage : int or None
        In a hierarchical model, whose attribute is a list of such numbers: which of them is this stack's.
    """

    path: str
    container: nn.Module
    blocks: tuple[nn.Module, ...]
    ancestors: tuple[nn.Module, ...]
    config: Any = None
    count_attribute: str | None = None
    stage: int | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> nn.Module:
        return self.blocks[index]

    @property
    def model(self) -> nn.Module:
        """The model that the stack was looked for in."""
        return self.ancestors[0]

    @property
    def parameters_per_block(self) -> tuple[int, ...]:
        """Number of parameters of each block."""
        return tuple(sum(p.numel() for p in block.parameters()) for block in self.blocks)

    def has_its_config(self) -> bool:
        """Whether `config` is still the configuration that describes this stack."""
        return _describing_config(self.path, self.ancestors, len(self))[0] is self.config

    def __str__(self) -> str:
        kinds = sorted({type(block).__name__ for block in self.blocks})
        total = sum(self.parameters_per_block)
        config = f"{type(self.config).__name__}.{self.count_attribute}" if self.config is not None else "no config"
        config += "" if self.stage is None else f"[{self.stage}]"
        return f"{self.path}: {len(self)} x {' | '.join(kinds)}, {total:,} parameters, described by {config}"


@checked()
def find_stack(model: nn.Module, path: str | None = None) -> BlockStack:
    """Find the stack of blocks of a model.

    For a Transformers model the decoder's outermost block lists are looked at, and one whose length equals the
    configured number of blocks is preferred. For any other module the largest homogeneous ``ModuleList`` or
    ``Sequential`` is taken.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    path : str, optional
        The dotted path of the container, where the choice should not be made here; or, where one stack alone answers
        to it, ``"vision"``, ``"text"``, ``"audio"``, ``"encoder"`` or ``"decoder"``.

    Returns
    -------
    BlockStack

    Raises
    ------
    StreamlineError
        If there is no block list, if several are equally good, or if `path` is not one; the text lists the
        candidates. If one module stands at several positions of the stack, or a position is empty; the text lists
        the positions.

    Examples
    --------
    >>> from torch import nn
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> print(find_stack(nn.TransformerEncoder(layer, 3)).path)
    layers
    """
    return _without_repeats(_chosen_stack(model, path))


def _chosen_stack(model: nn.Module, path: str | None) -> BlockStack:
    if path is not None:
        return _stack_at(model, path)
    candidates = find_stacks(model)
    if not candidates:
        raise StreamlineError(
            f"No stack of blocks was found in {type(model).__name__}: expected an nn.ModuleList or nn.Sequential "
            "whose members are blocks (modules with submodules of their own). Pass the model that holds them."
        )
    get_decoder: Any = getattr(_unwrapped(model), "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if isinstance(decoder, nn.Module):
        below = [s for s in candidates if decoder in s.ancestors]
        own = [s for s in below if s.ancestors[-1] is decoder]  # and not, say, an audio encoder's inside it
        candidates = own or below or candidates
    described = [s for s in candidates if s.config is not None]
    candidates = described or candidates
    sizes = [sum(p.numel() for block in dict.fromkeys(s.blocks) for p in block.parameters()) for s in candidates]
    best = [s for s, size in zip(candidates, sizes, strict=True) if size == max(sizes)]
    if len(best) > 1:
        raise StreamlineError(
            f"{type(model).__name__} has {len(best)} equally good stacks of blocks: {_listing(best)}. "
            f"Name one, for instance stack={best[0].path!r}."
        )
    return best[0]


@checked()
def find_stacks(model: nn.Module) -> list[BlockStack]:
    """Find every stack of blocks of a model: encoder, decoder, vision tower, a hierarchical model's stages.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Returns
    -------
    list of BlockStack
        The outermost stacks, in the order of the model's modules. A module that stands at several positions of its
        list is counted at each of them.
    """
    found: list[BlockStack] = []
    _walk(model, "", (), found)
    return found


def members(container: nn.Module) -> tuple[nn.Module, ...]:
    """Return the module at each position of a block list, without positions that hold None.

    ``children()`` yields a module that stands at several positions only once, which shifts all later positions.
    """
    return tuple(module for module in container._modules.values() if module is not None)


def _without_repeats(stack: BlockStack) -> BlockStack:
    """Return the stack, or raise if its positions do not hold one module each."""
    held = list(stack.container._modules.values())
    if None in held:
        raise StreamlineError(
            f"{stack.path} of {type(stack.model).__name__} holds None at position {held.index(None)}. Expected a "
            "block at each position. Remove the empty positions from the list."
        )
    positions: dict[int, list[int]] = {}
    for position, block in enumerate(stack.blocks):
        positions.setdefault(id(block), []).append(position)
    repeated = [found for found in positions.values() if len(found) > 1]
    if repeated:
        listed = "; ".join(", ".join(map(str, found)) for found in repeated)
        raise StreamlineError(
            f"{stack.path} of {type(stack.model).__name__} holds the same {type(stack[repeated[0][0]]).__name__} at "
            f"several positions ({listed}). Expected a module of its own at each position, because hooks, indices and "
            "splices belong to the module. Put copies there: layers[k] = copy.deepcopy(layers[k])."
        )
    return stack


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that knows its decoder, where it is the only one inside another, such as DDP or a training module."""
    if hasattr(model, "get_decoder"):
        return model
    inside = [_unwrapped(child) for child in model.children() if not isinstance(child, _CONTAINERS)]
    knowing = [module for module in inside if hasattr(module, "get_decoder")]
    return knowing[0] if len(knowing) == 1 else model


def _stack_at(model: nn.Module, path: str) -> BlockStack:
    """The stack that somebody has named: any container, even of a single block."""
    ancestors: list[nn.Module] = []
    module = model
    for name in path.split("."):
        ancestors.append(module)
        module = module._modules.get(name) or nn.Identity()
    blocks = members(module)
    if not isinstance(module, _CONTAINERS) or not blocks:
        stacks = find_stacks(model)
        answering = _answering(path, stacks)
        if len(answering) == 1:
            return answering[0]
        what = f"{len(answering)} stacks answer to" if answering else "No stack of blocks at"
        raise StreamlineError(
            f"{what} {path!r} in {type(model).__name__}. Expected one of: {_listing(answering or stacks)}."
        )
    return BlockStack(path, module, blocks, tuple(ancestors), *_describing_config(path, tuple(ancestors), len(blocks)))


_WORDS = {
    "vision": {"vision", "visual", "image"},
    "text": {"text", "language"},
    "audio": {"audio", "speech"},
    "encoder": {"encoder"},
    "decoder": {"decoder"},
}


def _answering(name: str, stacks: list[BlockStack]) -> list[BlockStack]:
    """The stacks with a word in their path that stands for a name; for text also what has no word of another tower."""
    wanted = _WORDS.get(name)
    if wanted is None:
        return []
    words = [{word for part in stack.path.split(".") for word in part.split("_")} for stack in stacks]
    found = [stack for stack, own in zip(stacks, words, strict=True) if own & wanted]
    towers = _WORDS["vision"] | _WORDS["audio"]
    if name == "text" and not found and any(own & towers for own in words):
        return [stack for stack, own in zip(stacks, words, strict=True) if not own & towers]
    return found


def _walk(module: nn.Module, path: str, ancestors: tuple[nn.Module, ...], found: list[BlockStack]) -> None:
    if ancestors and isinstance(module, _CONTAINERS):
        blocks = members(module)
        config, count, stage = _describing_config(path, ancestors, len(blocks))
        whole = _are_blocks(blocks) and not _are_stages(blocks, ancestors)
        if whole and (len(blocks) > 1 or config is not None):
            found.append(BlockStack(path, module, blocks, ancestors, config, count, stage))
            return
    for name, child in module.named_children():
        _walk(child, f"{path}.{name}" if path else name, (*ancestors, module), found)


def _are_blocks(blocks: tuple[nn.Module, ...]) -> bool:
    """Whether modules look alike, each with an inside of its own."""
    if not blocks or any(next(b.children(), None) is None or _is_list(b) for b in blocks):
        return False
    families = [{c.__name__ for c in type(b).__mro__} - {"Module", "object"} for b in blocks]
    return bool(set.intersection(*families)) or _same_interface(blocks)


def _are_stages(blocks: tuple[nn.Module, ...], ancestors: tuple[nn.Module, ...]) -> bool:
    """Whether modules are stages of a hierarchical model, each with as many blocks as a configuration says."""
    depths = next((d for module in reversed(ancestors) if (d := _depths(getattr(module, "config", None)))), [])
    lists = [[c for c in block.children() if isinstance(c, _CONTAINERS)] for block in blocks]
    return len(depths) == len(blocks) and all(
        any(len(container) == depth for container in inside) for inside, depth in zip(lists, depths, strict=True)
    )


def _depths(config: Any) -> list[int]:
    """The blocks of each stage; none where a configuration counts no stages."""
    depths = getattr(config, "__dict__", {}).get("depths")
    return list(depths) if isinstance(depths, (list, tuple)) else []


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (*_CONTAINERS, nn.ModuleDict))


def _same_interface(blocks: tuple[nn.Module, ...]) -> bool:
    """Hybrid models keep blocks of unrelated classes in one list; those still come from one file."""
    return len({type(b).__module__ for b in blocks}) == 1 and not type(blocks[0]).__module__.startswith("torch.nn")


_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "depth")


def _describing_config(path: str, ancestors: tuple[nn.Module, ...], length: int) -> tuple[Any, str | None, int | None]:
    """Return the nearest config above the container that counts `length` blocks, its attribute, and the stage.

    The decoder's count describes the decoder, whatever ``num_hidden_layers`` is.
    """
    side = "decoder" if "decoder" in path.split(".") else "encoder" if "encoder" in path.split(".") else ""
    own = (f"num_{side}_layers", f"{side}_layers") if side else ()
    for module in reversed(ancestors):
        config = getattr(module, "config", None)
        if config is None or isinstance(config, dict):
            continue
        renamed = getattr(config, "attribute_map", {}).get("num_hidden_layers")
        depths, numbers = _depths(config), [int(name) for name in path.split(".")[:-1] if name.isdecimal()]
        if depths and numbers:  # a stage's own; what counts all blocks or the stages says nothing of it
            if numbers[-1] < len(depths) and depths[numbers[-1]] == length:
                return config, "depths", numbers[-1]
            continue
        for name in (*own, renamed, *_COUNTS):
            if name and getattr(config, "__dict__", {}).get(name) == length:
                return config, name, None
        derived = isinstance(getattr(type(config), "num_hidden_layers", None), property)
        if derived and config.num_hidden_layers == length:
            return config, "num_hidden_layers", None
    return None, None, None


def _listing(stacks: list[BlockStack]) -> str:
    return ", ".join(f"{s.path!r} ({len(s)} blocks)" for s in stacks) or "(none found)"
