"""Find the stack of transformer blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from streamline_hooks.core import Registry, StreamlineError, validate_arguments, warn_caller

_CONTAINERS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True, eq=False)
class BlockStack:
    """A list of transformer blocks that a model calls one after the other.

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
        The configuration that describes this stack.
    count_attribute : str or None
        The attribute of ``config`` that holds the number of blocks.
    stage : int or None
        Index of this stack in that attribute, if the attribute lists the block counts of a hierarchical model's stages.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> stack = find_stack(tiny_model("llama"))
    >>> stack.path, len(stack), type(stack[0]).__name__
    ('model.layers', 8, 'LlamaDecoderLayer')
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

    @classmethod
    def at(cls, model: nn.Module, path: str, config: Any = None, count_attribute: str | None = None) -> BlockStack:
        """Return the stack at the path of a container without searching the model.

        Parameters
        ----------
        model : torch.nn.Module
        path : str
            Dotted path of the ``ModuleList`` or ``Sequential``.
        config, count_attribute : object and str, optional
            The configuration that describes the stack, and its attribute that holds the number of blocks. By default
            the nearest configuration above the container that has this number of blocks, if any.

        Returns
        -------
        BlockStack

        Raises
        ------
        StreamlineError
            If `path` is not a container with modules, or `count_attribute` is not the number of blocks.

        Examples
        --------
        >>> from streamline_hooks.testing import tiny_model
        >>> len(BlockStack.at(tiny_model("llama"), "model.layers"))
        8
        """
        stack = _stack_of_container(model, path)
        if stack is None:
            raise StreamlineError(
                f"path={path!r} is not a block list of {type(model).__name__}. Expected the path of a non-empty "
                "nn.ModuleList or nn.Sequential. Choose a name from model.named_modules()."
            )
        if config is None:
            return stack
        if not isinstance(count_attribute, str) or getattr(config, count_attribute, None) != len(stack):
            raise StreamlineError(
                f"count_attribute={count_attribute!r} of {type(config).__name__} does not equal the number of blocks "
                f"of {path!r}, {len(stack)}. Expected the attribute that holds this number. Correct it, or omit config."
            )
        return replace(stack, config=config, count_attribute=count_attribute, stage=None)

    @property
    def model(self) -> nn.Module:
        """Model that contains the stack."""
        return self.ancestors[0]

    @property
    def parameters_per_block(self) -> tuple[int, ...]:
        """Number of parameters per block."""
        return tuple(sum(p.numel() for p in block.parameters()) for block in self.blocks)

    def has_its_config(self) -> bool:
        """Whether `config` is still the configuration that describes this stack in the model."""
        described = _describing_config(self.path, self.ancestors, len(self))[0]
        if described is not None or self.config is None or self.stage is not None:
            return described is self.config
        counted = getattr(self.config, str(self.count_attribute), None) == len(self)
        return counted and any(_holds_config(module, self.config) for module in self.ancestors)

    def __str__(self) -> str:
        kinds = sorted({type(block).__name__ for block in self.blocks})
        total = sum(self.parameters_per_block)
        config = f"{type(self.config).__name__}.{self.count_attribute}" if self.config is not None else "no config"
        config += "" if self.stage is None else f"[{self.stage}]"
        return f"{self.path}: {len(self)} x {' | '.join(kinds)}, {total:,} parameters, described by {config}"


StackFinder = Callable[[nn.Module], "Sequence[BlockStack] | None"]
"""Function that returns the block stacks of a model it supports, the main stack first, and None for other models."""


@validate_arguments()
def register_stack_finder(name: str, finder: StackFinder) -> StackFinder:
    """Register a function that finds the block stacks of certain models.

    Registered finders are called before the built-in search of `find_stack` and `find_stacks`.

    Parameters
    ----------
    name : str
        Name of the finder in messages. ``del STACK_FINDERS[name]`` removes the finder.
    finder : callable
        ``finder(model)`` returns a list of `BlockStack` for a model that it supports, and None for any other model. The
        first stack is the one that `find_stack` returns. Create the stacks with `BlockStack.at`. The model may be a
        base model or a part of a model. If the finder raises or returns stacks that the model does not have, a warning
        is issued and the built-in search is used.

    Returns
    -------
    callable
        The finder, unchanged.

    Raises
    ------
    StreamlineError
        If the name is invalid or already registered for another finder.

    Examples
    --------
    >>> from torch import nn
    >>> def doctest_finder(model):
    ...     return [BlockStack.at(model, "cells")] if hasattr(model, "cells") else None
    >>> finder = register_stack_finder("doctest-cells", doctest_finder)
    >>> find_stack(nn.ModuleDict({"cells": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})).path
    'cells'
    >>> del STACK_FINDERS["doctest-cells"]
    """
    return STACK_FINDERS.add(name, finder)


STACK_FINDERS: Registry[StackFinder] = Registry(
    "stack finder",
    "register_stack_finder",
    group="streamline_hooks.stack_finders",
    register=register_stack_finder,
)
"""Registered stack finders by name. They are called before the built-in search."""


@validate_arguments()
def find_stack(model: nn.Module, path: str | None = None) -> BlockStack:
    """Find the stack of blocks of a model.

    Registered stack finders are called first, see `register_stack_finder`. In a Transformers model the stack is one of
    the outermost block lists of the decoder, preferably a list whose length equals the configured number of blocks. In
    any other module it is the largest homogeneous ``ModuleList`` or ``Sequential``.

    Parameters
    ----------
    model : torch.nn.Module
    path : str, optional
        Dotted path of the container, or ``"vision"``, ``"text"``, ``"audio"``, ``"encoder"`` or ``"decoder"`` if the
        word describes exactly one stack.

    Returns
    -------
    BlockStack

    Raises
    ------
    StreamlineError
        If the model has no block list, if several lists are equally plausible, or if `path` is not a block list; the
        message lists the candidates. Also if a position of the stack is empty or two positions hold the same module.

    Examples
    --------
    >>> from torch import nn
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> print(find_stack(nn.TransformerEncoder(layer, 3)).path)
    layers
    """
    stack = _preferred_stack(model) if path is None else _stack_at(model, path)
    modules = list(stack.container._modules.values())
    if None in modules:
        raise StreamlineError(
            f"{stack.path} of {type(stack.model).__name__} contains None at position {modules.index(None)}. Expected a "
            "block at every position. Remove the empty positions from the list."
        )
    positions: dict[int, list[int]] = {}
    for position, block in enumerate(stack.blocks):
        positions.setdefault(id(block), []).append(position)
    repeated = [indices for indices in positions.values() if len(indices) > 1]
    if repeated:
        listed = "; ".join(", ".join(map(str, indices)) for indices in repeated)
        raise StreamlineError(
            f"{stack.path} of {type(stack.model).__name__} contains the same {type(stack[repeated[0][0]]).__name__} at "
            f"several positions ({listed}). Expected a different module at every position, because hooks, indices and "
            "splices belong to a module. Replace the repetitions by copies: layers[k] = copy.deepcopy(layers[k])."
        )
    return stack


def _preferred_stack(model: nn.Module) -> BlockStack:
    if registered := _stacks_of_finders(model):
        return registered[0]
    candidates = _search_stacks(model)
    if not candidates:
        raise StreamlineError(
            f"No stack of blocks was found in {type(model).__name__}. Expected an nn.ModuleList or nn.Sequential "
            "whose members are blocks (modules with submodules). Pass the model that contains the blocks, or register "
            "their path with register_stack_finder."
        )
    get_decoder: Any = getattr(_unwrapped(model), "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if isinstance(decoder, nn.Module):
        below = [s for s in candidates if decoder in s.ancestors]
        direct = [s for s in below if s.ancestors[-1] is decoder]  # not those of an audio encoder inside the decoder
        candidates = direct or below or candidates
    described = [s for s in candidates if s.config is not None]
    candidates = described or candidates
    sizes = [sum(p.numel() for block in dict.fromkeys(s.blocks) for p in block.parameters()) for s in candidates]
    best = [s for s, size in zip(candidates, sizes, strict=True) if size == max(sizes)]
    if len(best) > 1:
        raise StreamlineError(
            f"{type(model).__name__} has {len(best)} equally plausible stacks of blocks: {_listing(best)}. "
            f"Choose one, for instance stack={best[0].path!r}."
        )
    return best[0]


@validate_arguments()
def find_stacks(model: nn.Module) -> list[BlockStack]:
    """Find all stacks of blocks of a model, such as encoder, decoder, vision tower or hierarchical stages.

    The stacks are in the order of the model's modules, or in the order of the registered stack finder that supports the
    model. Stacks inside the blocks of another stack are not included.

    Examples
    --------
    >>> from torch import nn
    >>> [stack.path for stack in find_stacks(nn.Transformer(8, 2, 2, 2, 16, batch_first=True))]
    ['encoder.layers', 'decoder.layers']
    """
    return _stacks_of_finders(model) or _search_stacks(model)


def _search_stacks(model: nn.Module) -> list[BlockStack]:
    stacks: list[BlockStack] = []
    _collect_stacks(model, "", (), stacks)
    return stacks


def _stacks_of_finders(model: nn.Module) -> list[BlockStack]:
    """Return the stacks of the first registered finder that supports the model; an empty list if none does."""
    for name, finder in STACK_FINDERS.items():
        try:
            stacks = finder(model)
            if stacks:
                _check_stacks(model, stacks)
                return list(stacks)
        except Exception as error:  # the finder is foreign code
            warn_caller(
                f"The {STACK_FINDERS.describe(name)} failed for {type(model).__name__}: "
                f"{type(error).__name__}: {error} The built-in search is used instead. Correct or update the finder, "
                f"or remove it with del STACK_FINDERS[{name!r}]."
            )
    return []


def _check_stacks(model: nn.Module, stacks: Any) -> None:
    """Raise unless the result of a stack finder describes block lists of the model."""
    results = stacks if isinstance(stacks, (list, tuple)) else [stacks]
    if results is not stacks or not all(isinstance(stack, BlockStack) for stack in results):
        kinds = " and ".join(sorted({type(result).__name__ for result in results}))
        raise StreamlineError(
            f"It returned {kinds}{' in a list' if results is stacks else ''}. Expected a list of BlockStack or None. "
            "Return [BlockStack.at(model, path)]."
        )
    for stack in stacks:
        actual = _stack_of_container(model, stack.path)
        if actual is None or actual.container is not stack.container or actual.ancestors != stack.ancestors:
            raise StreamlineError(
                f"It returned a stack at {stack.path!r} that does not match the model. Expected the path of an "
                "nn.ModuleList or nn.Sequential, this container, and the modules above it. Use BlockStack.at."
            )
        modules = tuple(stack.container._modules.values())
        if len(modules) != len(stack.blocks) or any(a is not b for a, b in zip(modules, stack.blocks, strict=True)):
            raise StreamlineError(
                f"It returned {len(stack)} blocks for {stack.path!r}, which contains {len(modules)} other blocks. "
                "Expected every module of the container, in order. Use BlockStack.at."
            )
        if len(set(map(id, modules))) < len(modules):
            raise StreamlineError(
                f"It returned {stack.path!r}, which contains the same module at several positions. Expected a "
                "different module at every position. Replace the repetitions by copies."
            )
        if stack.config is not None and stack.stage is None:
            BlockStack.at(model, stack.path, stack.config, stack.count_attribute)


def modules_of(container: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules of a block list by position, without positions that hold None.

    Unlike ``children()``, a module at several positions is returned once for each position.
    """
    return tuple(module for module in container._modules.values() if module is not None)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module with ``get_decoder`` inside a wrapper such as DDP if it is unique, else the model."""
    if hasattr(model, "get_decoder"):
        return model
    inside = [_unwrapped(child) for child in model.children() if not isinstance(child, _CONTAINERS)]
    knowing = [module for module in inside if hasattr(module, "get_decoder")]
    return knowing[0] if len(knowing) == 1 else model


def _stack_at(model: nn.Module, path: str) -> BlockStack:
    """Return the stack at a path, even of a single block, or the stack that "vision", "text", ... describes."""
    registered = [stack for stack in _stacks_of_finders(model) if stack.path == path]
    at_path = registered[0] if registered else _stack_of_container(model, path)
    if at_path is not None:
        return at_path
    stacks = find_stacks(model)
    matching = _stacks_matching(path, stacks)
    if len(matching) == 1:
        return matching[0]
    what = f"{len(matching)} stacks match" if matching else "No stack of blocks at"
    raise StreamlineError(
        f"{what} {path!r} in {type(model).__name__}. Expected one of: {_listing(matching or stacks)}."
    )


def _stack_of_container(model: nn.Module, path: str) -> BlockStack | None:
    """Return the stack at the path of a non-empty container, or None if the path is not one."""
    ancestors: list[nn.Module] = []
    module = model
    for name in path.split("."):
        ancestors.append(module)
        module = module._modules.get(name) or nn.Identity()
    blocks = modules_of(module)
    if not isinstance(module, _CONTAINERS) or not blocks:
        return None
    return BlockStack(path, module, blocks, tuple(ancestors), *_describing_config(path, tuple(ancestors), len(blocks)))


def _holds_config(module: nn.Module, config: Any) -> bool:
    """Whether a module's configuration is `config` or contains it as an attribute."""
    module_config = getattr(module, "config", None)
    return module_config is config or any(value is config for value in getattr(module_config, "__dict__", {}).values())


_STACK_KEYWORDS = {
    "vision": {"vision", "visual", "image"},
    "text": {"text", "language"},
    "audio": {"audio", "speech"},
    "encoder": {"encoder"},
    "decoder": {"decoder"},
}


def _stacks_matching(name: str, stacks: list[BlockStack]) -> list[BlockStack]:
    """Return the stacks whose path contains a word for `name`.

    If no path contains a word for "text", the stacks that are neither vision nor audio towers match it.
    """
    keywords = _STACK_KEYWORDS.get(name)
    if keywords is None:
        return []
    words = [{word for part in stack.path.split(".") for word in part.split("_")} for stack in stacks]
    matching = [stack for stack, stack_words in zip(stacks, words, strict=True) if stack_words & keywords]
    towers = _STACK_KEYWORDS["vision"] | _STACK_KEYWORDS["audio"]
    if name == "text" and not matching and any(stack_words & towers for stack_words in words):
        return [stack for stack, stack_words in zip(stacks, words, strict=True) if not stack_words & towers]
    return matching


def _collect_stacks(module: nn.Module, path: str, ancestors: tuple[nn.Module, ...], stacks: list[BlockStack]) -> None:
    if ancestors and isinstance(module, _CONTAINERS):
        blocks = modules_of(module)
        config, count, stage = _describing_config(path, ancestors, len(blocks))
        is_stack = _are_blocks(blocks) and not _are_stages(blocks, ancestors)
        if is_stack and (len(blocks) > 1 or config is not None):
            stacks.append(BlockStack(path, module, blocks, ancestors, config, count, stage))
            return
    for name, child in module.named_children():
        _collect_stacks(child, f"{path}.{name}" if path else name, (*ancestors, module), stacks)


def _are_blocks(blocks: tuple[nn.Module, ...]) -> bool:
    """Whether modules are of related classes and each has submodules."""
    lists = (*_CONTAINERS, nn.ModuleDict)
    if not blocks or any(next(b.children(), None) is None or isinstance(b, lists) for b in blocks):
        return False
    families = [{c.__name__ for c in type(b).__mro__} - {"Module", "object"} for b in blocks]
    files = {type(b).__module__ for b in blocks}  # hybrid models have blocks of unrelated classes in one file
    return bool(set.intersection(*families)) or (len(files) == 1 and not min(files).startswith("torch.nn"))


def _are_stages(blocks: tuple[nn.Module, ...], ancestors: tuple[nn.Module, ...]) -> bool:
    """Whether modules are stages of a hierarchical model, with the block counts that its configuration lists."""
    depths = next((d for module in reversed(ancestors) if (d := _depths(getattr(module, "config", None)))), [])
    lists = [[c for c in block.children() if isinstance(c, _CONTAINERS)] for block in blocks]
    return len(depths) == len(blocks) and all(
        any(len(container) == depth for container in inside) for inside, depth in zip(lists, depths, strict=True)
    )


def _depths(config: Any) -> list[int]:
    """Return the number of blocks of each stage; an empty list if the configuration has no stages."""
    depths = getattr(config, "__dict__", {}).get("depths")
    return list(depths) if isinstance(depths, (list, tuple)) else []


_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "depth")


def _describing_config(path: str, ancestors: tuple[nn.Module, ...], length: int) -> tuple[Any, str | None, int | None]:
    """Return the nearest config above the container that counts `length` blocks, its attribute, and the stage.

    For an encoder or decoder, the attribute named after it takes precedence over ``num_hidden_layers``.
    """
    side = "decoder" if "decoder" in path.split(".") else "encoder" if "encoder" in path.split(".") else ""
    side_attributes = (f"num_{side}_layers", f"{side}_layers") if side else ()
    for module in reversed(ancestors):
        config = getattr(module, "config", None)
        if config is None or isinstance(config, dict):
            continue
        renamed = getattr(config, "attribute_map", {}).get("num_hidden_layers")
        depths, numbers = _depths(config), [int(name) for name in path.split(".")[:-1] if name.isdecimal()]
        if depths and numbers:  # a count of all blocks or of the stages does not describe one stage
            if numbers[-1] < len(depths) and depths[numbers[-1]] == length:
                return config, "depths", numbers[-1]
            continue
        for name in (*side_attributes, renamed, *_COUNTS):
            if name and getattr(config, "__dict__", {}).get(name) == length:
                return config, name, None
        derived = isinstance(getattr(type(config), "num_hidden_layers", None), property)
        if derived and config.num_hidden_layers == length:
            return config, "num_hidden_layers", None
    return None, None, None


def _listing(stacks: list[BlockStack]) -> str:
    return ", ".join(f"{s.path!r} ({len(s)} blocks)" for s in stacks) or "(none found)"


def check_windows(stack: BlockStack, windows: Iterable[range]) -> None:
    """Raise if a window is not a range of consecutive blocks of the stack."""
    for window in windows:
        if window.step != 1 or not 0 <= window.start < window.stop <= len(stack):
            raise StreamlineError(
                f"{window} is not a window of {type(stack.model).__name__}. Expected consecutive blocks between 0 and "
                f"{len(stack) - 1}, such as range(0, 1)."
            )
