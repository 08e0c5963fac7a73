"""The standard sites of a model, and the hooks that read or change the tensors that pass them.

A site is a tensor that every transformer computes, such as what an attention adds to the residual stream.

Hooks at the same site run in the order in which they were registered: a recorder that was opened before an intervention
records the tensor before the change. `RemainderHook` and `NoteHook` make the two exceptions that keep this order true
where a contribution is not the output of a submodule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import StreamlineError, UnsupportedSurgery
from streamline_hooks.modeling import (
    BlockSites,
    BlockStack,
    Branch,
    BranchSites,
    Change,
    ChangeHook,
    GraphCallback,
    ReadHook,
    by_token,
    get_logits,
    in_backward,
    read_input,
    read_output,
    write_input,
    write_output,
)

BlockSite = Literal[
    "block.input",
    "block.output",
    "attention.input",
    "attention.output",
    "attention.heads",
    "mlp.input",
    "mlp.output",
]
"""Sites of every block."""
ModelSite = Literal["embeddings", "final_norm", "logits"]
"""Sites of which a model has one."""
Site = BlockSite | ModelSite
BLOCK_SITES: tuple[BlockSite, ...] = get_args(BlockSite)
MODEL_SITES: tuple[ModelSite, ...] = get_args(ModelSite)
_TOLERANCE = 1e-5


class NoteHook(ReadHook):
    """Hook that reads a tensor after every change by interventions; it stays last when they register their hooks.

    It also runs when gradient checkpointing runs a block again.
    """

    def __call__(self, module: nn.Module, *values: Any) -> None:
        """Call `read`, unless the module is a copy."""
        if module is self._watched and self._read is not None:
            self._read(*values)


class RemainderHook(ReadHook):
    """Hook on the output of a block's forward, before splices and all other hooks of the block.

    It returns the changed output, or None.
    """

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        """Return the result of `read`, or None if the module is a copy."""
        return self._read(*values) if module is self._watched and self._read is not None else None


@dataclass(frozen=True, eq=False)
class SiteAccess:
    """A site of a model, with what is needed to read and change its tensor.

    Attributes
    ----------
    stack : BlockStack
    site : str
    k : int or None
        Index of the block; None for a site of the model.
    module : torch.nn.Module or None
        The submodule that returns the tensor of a site of the model.
    branches : BlockSites or None
        The branches of the block, for the sites inside a block.
    """

    stack: BlockStack
    site: Site
    k: int | None = None
    module: nn.Module | None = None
    branches: BlockSites | None = None

    def __str__(self) -> str:
        return self.site if self.k is None else f"{self.site} of block {self.k}"

    @property
    def feature_axes(self) -> int:
        """Number of axes after (batch, tokens)."""
        return 2 if self.site == "attention.heads" else 1

    @property
    def refusal(self) -> str:
        """The reason why the tensor can be read but not changed, or an empty string."""
        if self.branches is None or not self.site.endswith(".output"):
            return ""
        branch = self._branch
        if branch.output is None and self.branches.first == branch.branch:
            return f"{branch.reasons['output']}, and the other branch reads the sum"
        return ""

    def by_token(self, state: Tensor) -> Tensor:
        """Return a tensor of the site as (batch, tokens, ...)."""
        if self.k is not None and self.branches is None:
            return by_token(state, self.stack[self.k])
        return state[None] if state.ndim == 1 + self.feature_axes else state

    def hooks(self, visit: Change, kind: type[ReadHook] = ReadHook) -> Iterator[RemovableHandle]:
        """Register and yield the hooks that pass the tensor to `visit`, and write what it returns unless it is None.

        `kind` is the class of the hooks; only `ChangeHook` and its subclasses change the tensor.
        """
        if self.k is None:
            assert self.module is not None
            write = self._change_logits if self.site == "logits" else _change_output
            yield from _register(self.module, "output", kind, partial(write, visit))
        elif self.site == "block.input":
            block = self.stack[self.k]
            yield from _register(block, "input", kind, partial(_change_input, visit, block))
        elif self.site == "block.output":
            yield from _register(self.stack[self.k], "output", kind, partial(_change_output, visit))
        else:
            yield from self._guards()
            yield from self._branch_hooks(visit, kind)

    def _branch_hooks(self, visit: Change, kind: type[ReadHook]) -> Iterator[RemovableHandle]:
        if self.site == "attention.heads":
            yield from self._input_hooks((str(self._branch.projection),), self._split_heads(visit), kind)
        elif self.site.endswith(".input"):
            yield from self._input_hooks(self._branch.readers, visit, kind)
        elif self._branch.output is not None:
            yield from self._output_hooks(self._branch, visit, kind)
        else:
            yield from self._remainder_hooks(visit, kind)

    @property
    def _branch(self) -> BranchSites:
        assert self.branches is not None
        branch: Branch = "mlp" if self.site.startswith("mlp") else "attention"
        return self.branches.branches[branch]

    @property
    def _block(self) -> nn.Module:
        assert self.k is not None
        return self.stack[self.k]

    def _guards(self) -> Iterator[RemovableHandle]:
        """Raise if a child of the block runs that did not run when the sites were found."""
        assert self.branches is not None

        def refuse(path: str, *_: Any) -> None:
            raise UnsupportedSurgery(
                f"{self} cannot be read in this call: it runs {path} of {type(self._block).__name__}, such as "
                "cross-attention, which was not called when the sites were found, and whose contribution is unknown. "
                "Expected the same computation in every forward pass. Record block.output instead."
            )

        for path in self.branches.uncalled:
            for module in self._block.get_submodule(path).modules():  # a list of modules is not called itself
                yield from _register(module, "input", ReadHook, partial(refuse, path))

    def _split_heads(self, visit: Change) -> Change:
        heads = self._branch.heads
        assert heads is not None

        def split(state: Tensor) -> Tensor | None:
            changed = visit(state.unflatten(-1, heads))
            return None if changed is None else changed.flatten(-2)

        return split

    def _input_hooks(self, paths: tuple[str, ...], visit: Change, kind: type[ReadHook]) -> Iterator[RemovableHandle]:
        """Visit the input of the first submodule, and pass the result to all of them."""
        visit, shape_hooks = self._with_token_axes(visit)
        yield from shape_hooks
        latest: list[Tensor | None] = [None]

        def first(state: Tensor) -> Tensor | None:
            latest[0] = visit(state)
            return latest[0]

        for number, path in enumerate(paths):
            change: Change = first if number == 0 else lambda _: latest[0]
            module = self._block.get_submodule(path)
            yield from _register(module, "input", kind, partial(_change_input, change, None))

    def _output_hooks(self, branch: BranchSites, visit: Change, kind: type[ReadHook]) -> Iterator[RemovableHandle]:
        if branch.returns_state:
            visit, input_hooks = self._difference(visit)
            yield from input_hooks
        visit, shape_hooks = self._with_token_axes(visit)
        yield from shape_hooks
        multiplier = branch.multiplier

        def scaled(state: Tensor) -> Tensor | None:
            contribution = state * multiplier
            changed = visit(contribution)
            if changed is None:
                return None
            unchanged = state + (changed - contribution) / multiplier  # bitwise, and with the gradient of the change
            return torch.where(changed == contribution, unchanged, changed / multiplier)

        module = self._block.get_submodule(str(branch.output))
        change = visit if multiplier == 1 else scaled
        write = partial(_change_output, change) if branch.side == "output" else partial(_change_input, change, None)
        yield from _register(module, branch.side, kind, write)

    def _difference(self, visit: Change) -> tuple[Change, Iterator[RemovableHandle]]:
        """Visit the difference of a state from the block's input, after all interventions at that input."""
        before: list[Tensor] = []

        def enter(args: Any, kwargs: Any) -> None:
            before[:] = [read_input(args, kwargs, self._block).clone()]  # some blocks change it in place

        def difference(state: Tensor) -> Tensor | None:
            entering = before.pop().view_as(state)
            contribution = state - entering
            changed = visit(contribution)
            if changed is None:
                return None
            unchanged = state + (changed - contribution)  # bitwise, and with the gradient of the change
            return torch.where(changed == contribution, unchanged, entering + changed)

        return difference, _register(self._block, "input", NoteHook, enter)

    def _with_token_axes(self, visit: Change) -> tuple[Change, Iterator[RemovableHandle]]:
        """Give the tensors of a submodule that flattens the tokens the shape (batch, tokens, ...)."""
        axes: list[torch.Size] = [torch.Size()]

        def enter(args: Any, kwargs: Any) -> None:
            axes[0] = read_input(args, kwargs, self._block).shape[:-1]

        def shaped(state: Tensor) -> Tensor | None:
            if state.ndim > len(axes[0]):
                return visit(state)
            changed = visit(state.unflatten(0, tuple(axes[0])))
            return None if changed is None else changed.flatten(0, 1)

        return shaped, _register(self._block, "input", NoteHook, enter)

    def _remainder_hooks(self, visit: Change, kind: type[ReadHook]) -> Iterator[RemovableHandle]:
        """Visit what a block adds to its input without the contribution of the other branch."""
        assert self.branches is not None
        (other,) = (branch for branch in self.branches.branches.values() if branch is not self._branch)
        notes = ContributionNotes(self._block)
        yield from notes.hooks([other])

        def leave(args: Any, output: Any) -> Any:
            before, passed = notes.take()
            if in_backward() and not issubclass(kind, ChangeHook):
                return None
            state = read_output(output)
            contribution = state - before - passed[other.branch].view_as(state)
            changed = visit(contribution)
            if changed is None:
                return None
            return write_output(output, state + (changed - contribution))

        yield _register_remainder(self._block, leave)

    def _change_logits(self, visit: Change, args: Any, output: Any) -> Any:
        logits = get_logits(output)
        changed = visit(logits)
        if changed is None:
            return None
        if isinstance(output, Tensor):
            return changed
        if getattr(output, "loss", None) is not None:
            raise StreamlineError(
                "The model computed its loss from the logits before they are changed. Expected a call without labels. "
                "Omit labels and compute the loss from the changed logits."
            )
        output = copy.copy(output)
        if isinstance(output, Mapping):
            output["logits"] = changed  # type: ignore[index]
            return output
        return replace(output, logits=changed)


class ContributionNotes:
    """The input of a block and the contributions of its branches in the current call, after all interventions."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._before: Tensor | None = None
        self._passed: dict[Branch, Tensor] = {}

    def hooks(self, branches: Iterable[BranchSites]) -> Iterator[RemovableHandle]:
        """Register and yield the hooks that note the contributions of these branches."""

        def enter(args: Any, kwargs: Any) -> None:
            self._passed.clear()
            self._before = read_input(args, kwargs, self._block).clone()  # some blocks change it in place

        def leave(branch: BranchSites, args: Any, values: Any) -> None:
            state = (read_output(values) if branch.side == "output" else read_input(args, values)).clone()
            if branch.returns_state and self._before is not None:
                state = state - self._before.view_as(state)
            self._passed[branch.branch] = state * branch.multiplier

        yield from _register(self._block, "input", NoteHook, enter)
        for branch in branches:
            module = self._block.get_submodule(str(branch.output))
            yield from _register(module, branch.side, NoteHook, partial(leave, branch))

    def take(self) -> tuple[Tensor, dict[Branch, Tensor]]:
        """Return and forget the block's input and the contributions."""
        before, passed = self._before, dict(self._passed)
        self._before = None
        self._passed.clear()
        if before is None or not passed:
            raise UnsupportedSurgery(
                f"{type(self._block).__name__} ran differently than when its branches were found: a submodule that "
                "returned a contribution was not called. Expected the same computation in every forward pass. Record "
                "block.output instead."
            )
        return before, passed


class ContributionCheck:
    """Verify in the first call of a block that its input and the two contributions sum to its output.

    The hooks are removed after a call that was verified.
    """

    def __init__(self, k: int, block: nn.Module, sites: BlockSites) -> None:
        self._k, self._block, self._sites = k, block, sites
        self._notes = ContributionNotes(block)
        self._handles: list[RemovableHandle] = []
        self._callback = GraphCallback(self._receive)
        self._is_verified = False

    def hooks(self) -> Iterator[RemovableHandle]:
        """Register and yield the hooks; none if a contribution is itself a difference."""
        branches = list(self._sites.branches.values())
        if any(branch.output is None for branch in branches):
            return
        for handle in (*self._notes.hooks(branches), _register_remainder(self._block, self._leave)):
            self._handles.append(handle)
            yield handle

    def _leave(self, args: Any, output: Any) -> None:
        before, passed = self._notes.take()
        self._callback(0, before, *(passed[branch] for branch in self._sites.branches), read_output(output))
        if not torch.compiler.is_compiling():
            while self._handles:
                self._handles.pop().remove()

    def _receive(self, key: int, before: Tensor, first: Tensor, second: Tensor, state: Tensor) -> None:
        """Verify a call; later calls of a compiled graph, whose operators stay, are not verified."""
        if self._is_verified:
            return
        with torch.no_grad():
            terms = [before, first.view_as(state), second.view_as(state)]
            wide = [term.double() if term.device.type != "mps" else term.float() for term in terms]
            error = float((wide[0] + wide[1] + wide[2] - state).abs().max())
            size = max(float(term.abs().max()) for term in (*terms, state))
        if not error <= max(_TOLERANCE, 4 * torch.finfo(state.dtype).eps) * size:
            raise UnsupportedSurgery(
                f"The contributions of block {self._k} do not sum to its output: they differ by {error:.2g}, where the "
                f"largest element is {size:.2g}. Expected a relative error of at most {_TOLERANCE:g}. Probable causes "
                "are dropout between a submodule and the sum in training mode, and a hook that was registered later "
                "and changes a contribution. Run the model in evaluation mode, register hooks first, or record "
                "block.output."
            )
        self._is_verified = True


def checked_sites(sites: Iterable[str]) -> tuple[Site, ...]:
    """Return the names of sites without repetitions, or raise if one is unknown or there are none."""
    names = tuple(dict.fromkeys([sites] if isinstance(sites, str) else sites))
    known = (*BLOCK_SITES, *MODEL_SITES)
    for name in names:
        if name not in known:
            raise StreamlineError(f"site={name!r} is unknown. Expected one of {', '.join(known)}. Correct the name.")
    if not names:
        raise StreamlineError(
            f"sites=[] is empty. Expected at least one of {', '.join(known)}. Omit sites to record the states that "
            "enter and leave the blocks."
        )
    return names  # type: ignore[return-value]


def _change_input(change: Change, block: nn.Module | None, args: Any, kwargs: Any) -> Any:
    state = change(read_input(args, kwargs, block))
    return None if state is None else write_input(args, kwargs, state, block)


def _change_output(change: Change, args: Any, output: Any) -> Any:
    state = change(read_output(output))
    return None if state is None else write_output(output, state)


def _register(
    module: nn.Module, side: Literal["input", "output"], kind: type[ReadHook], read: Callable[..., Any]
) -> Iterator[RemovableHandle]:
    hook = kind(module, read)
    if side == "input":
        yield module.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        yield module.register_forward_hook(hook)
    hooks: Any = module._forward_pre_hooks if side == "input" else module._forward_hooks
    for key in [key for key, other in hooks.items() if isinstance(other, NoteHook)]:
        hooks.move_to_end(key)


def _register_remainder(block: nn.Module, read: Callable[..., Any]) -> RemovableHandle:
    """Register a hook before all others of the block's output, except those registered so before."""
    handle = block.register_forward_hook(RemainderHook(block, read), prepend=True)
    hooks: Any = block._forward_hooks
    for key in sorted((key for key, hook in hooks.items() if isinstance(hook, RemainderHook)), reverse=True):
        hooks.move_to_end(key, last=False)
    return handle
