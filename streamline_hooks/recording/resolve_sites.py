"""Find the standard sites of a model.

They are found by running each block on a few tokens, not by the names of modules, see
`streamline_hooks.modeling.block_sites_in`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, UnsupportedSurgery, weights_in_memory
from streamline_hooks.modeling import (
    BlockSites,
    BlockStack,
    block_sites_in,
    observe_calls,
    probing,
    read_input,
    read_output,
)
from streamline_hooks.recording.sites import Site, SiteAccess

_NORM_SCALE = 16.0  # a norm returns almost the same for this multiple of its input


def resolve_sites(
    stack: BlockStack, sites: Iterable[tuple[Site, int | None]], probe: Batch | Tensor | None = None
) -> list[SiteAccess]:
    """Find sites of a model, or raise `UnsupportedSurgery` with the reason why one cannot be read.

    Parameters
    ----------
    stack : BlockStack
    sites : iterable of tuple
        Site and index of the block, which is None for a site of the model.
    probe : mapping or torch.Tensor, optional
        A batch without padding on which the sites are found, if the library cannot create one for the model.

    Returns
    -------
    list of SiteAccess

    Raises
    ------
    UnsupportedSurgery
        If a site does not exist or its tensor cannot be read.
    StreamlineError
        If the model has to be run but no inputs are known for it.

    Examples
    --------
    >>> from streamline_hooks.modeling import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> (access,) = resolve_sites(find_stack(tiny_model("llama", blocks=2)), [("attention.heads", 1)])
    >>> print(access, access.feature_axes)
    attention.heads of block 1 2
    """
    sites = list(sites)
    inner = sorted({k for site, k in sites if k is not None and not site.startswith("block.")})
    branches = _branch_sites(stack, inner, probe)
    accesses: list[SiteAccess] = []
    for site, k in sites:
        if k is None:
            accesses.append(SiteAccess(stack, site, module=_module_of(stack, site, probe)))
        elif site.startswith("block."):
            accesses.append(SiteAccess(stack, site, k))
        else:
            block_sites = branches[k]
            branch, _, part = site.partition(".")
            reason: str | None = None
            if isinstance(block_sites, UnsupportedSurgery):
                reason = str(block_sites)
            elif part != "output":
                reason = block_sites.branches["mlp" if branch == "mlp" else "attention"].reasons.get(part)
            if isinstance(block_sites, UnsupportedSurgery) or reason is not None:
                raise UnsupportedSurgery(
                    f"{site} of block {k} cannot be read: {str(reason).rstrip('.')}. Expected a block whose attention "
                    "and MLP are separate submodules. Choose another site or block, or record block.output.",
                    "branches",
                )
            accesses.append(SiteAccess(stack, site, k, branches=block_sites))
    return accesses


_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, BlockSites | UnsupportedSurgery]] = WeakKeyDictionary()


def _branch_sites(
    stack: BlockStack, blocks: Iterable[int], probe: Batch | Tensor | None = None
) -> dict[int, BlockSites | UnsupportedSurgery]:
    """Find the sites of the branches of blocks, or the error with the reason why there are none.

    The results are stored, and used again while the modules and the names of the parameters of a block are the same.
    """
    blocks = list(blocks)
    structures = {k: _structure(stack[k]) for k in blocks}
    unknown = [k for k in blocks if _KNOWN.get(stack[k], (None, None))[0] != structures[k]]
    if unknown:
        with probing(stack, unknown, probe) as run:
            calls = observe_calls({k: stack[k] for k in unknown}, run)
            for k, call in calls.items():
                with weights_in_memory(stack[k]):
                    _KNOWN[stack[k]] = structures[k], block_sites_in(call)
    return {k: _KNOWN[stack[k]][1] for k in blocks}


def _structure(block: nn.Module) -> Any:
    modules = tuple((name, type(module), vars(module).get("forward")) for name, module in block.named_modules())
    return modules, tuple((name, p.dtype, p.ndim) for name, p in block.named_parameters())


def _module_of(stack: BlockStack, site: Site, probe: Batch | Tensor | None) -> nn.Module:
    """Return the module that returns the tensor of a site of the model."""
    model: Any = stack.model
    if site == "embeddings":
        getter = getattr(model, "get_input_embeddings", None)
        module = getter() if callable(getter) else None
        if not isinstance(module, nn.Module):
            raise UnsupportedSurgery(
                f"embeddings of {type(model).__name__} cannot be read: it has no get_input_embeddings(). Expected a "
                "Transformers model. Use block.input of block 0, the state that enters the stack."
            )
        if type(module).forward is nn.Module.forward:
            raise UnsupportedSurgery(
                f"embeddings of {type(model).__name__} cannot be read: its input embeddings are a "
                f"{type(module).__name__} of several modules. Expected one module that returns the embeddings. Use "
                "block.input of block 0, the state that enters the stack."
            )
        return module
    with probing(stack, [len(stack) - 1], probe) as run, torch.no_grad():
        return _logits_module(stack, run) if site == "logits" else _final_norm(stack, run)


def _logits_module(stack: BlockStack, run: Callable[[], Any]) -> nn.Module:
    """Return the innermost model around the stack that returns logits."""
    returned: list[nn.Module] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        is_root_tensor = module is stack.model and isinstance(output, Tensor)
        if is_root_tensor or isinstance(getattr(output, "logits", None), Tensor):
            returned.append(module)

    with ExitStack() as hooks:
        for module in stack.ancestors:
            hooks.enter_context(module.register_forward_hook(leave))
        run()
    if not returned:
        raise UnsupportedSurgery(
            f"logits of {type(stack.model).__name__} cannot be read: its output has no logits. Expected a model with "
            "its head. Load it with the class of its task, such as AutoModelForCausalLM."
        )
    return returned[0]


def _final_norm(stack: BlockStack, run: Callable[[], Any]) -> nn.Module:
    """Return the module that receives the output of the last block and normalizes it."""
    last: list[Tensor] = []
    candidates: list[tuple[nn.Module, Tensor]] = []
    called: dict[int, int] = {}
    inside = {id(module) for block in stack.blocks for module in block.modules()} | {id(m) for m in stack.ancestors}

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        last[:] = [read_output(output).clone()]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        called[id(module)] = called.get(id(module), 0) + 1
        try:
            state = read_input(args, kwargs)
        except StreamlineError:
            return
        if last and state.shape == last[0].shape and torch.equal(state, last[0]):
            candidates.append((module, state.clone()))

    with ExitStack() as hooks:
        hooks.enter_context(stack[len(stack) - 1].register_forward_hook(leave))
        for module in stack.model.modules():
            if id(module) not in inside:
                hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
        run()
    for module, state in candidates:
        if (
            called[id(module)] == 1
            and all(parameter.ndim < 2 for parameter in module.parameters())
            and _normalizes(module, state)
        ):
            return module
    raise UnsupportedSurgery(
        f"final_norm of {type(stack.model).__name__} cannot be read: no module only normalizes the output of its last "
        f"block ({stack.path}). Expected a model with a norm after its blocks. Use block.output of the last block."
    )


def _normalizes(module: nn.Module, state: Tensor) -> bool:
    """Whether a module returns almost the same for a multiple of its input, and something else than its input."""
    state = state / state.float().square().mean().sqrt().clamp_min(1e-12).to(state)
    output, scaled = read_output(module(state)), read_output(module(state * _NORM_SCALE))
    if output.shape != state.shape or torch.equal(output, state):
        return False
    return bool((output - scaled).abs().max() <= 0.05 * output.abs().max())
