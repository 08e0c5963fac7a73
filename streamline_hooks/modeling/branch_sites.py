"""Find where the attention and the MLP of a block read their input and return their contribution.

`find_branches` splits a block into two branches. This module finds, for each branch, the submodules whose inputs or
outputs hold three tensors, and verifies each by changing it while the block runs on a few tokens:

- the contribution, which the branch adds to the residual stream. It may be a multiple of an output (Granite). If it is
  replaced by any tensor r, the block must continue as if the branch had added r;
- the input of the branch, after its norm. If it is fixed, the contribution must not depend on the block's input;
- the heads, which the output projection of the attention reads. The same must hold.

Blocks with a norm after each sum have other sites, see `streamline_hooks.modeling.find_post_norm_sites`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import StreamlineError, UnsupportedSurgery
from streamline_hooks.modeling.block_call import BlockCall, Side, TensorSite
from streamline_hooks.modeling.branches import BRANCHES, Branch, Branches, BranchSearch, root_mean_square, union
from streamline_hooks.modeling.hidden_state import read_input, read_output, write_input, write_output
from streamline_hooks.modeling.probe import SPLICES

Change = Callable[[Tensor], "Tensor | None"]
"""Function that receives a tensor and returns its replacement, or None to leave it."""

_SAME_SCALE = 1e-3  # a measured multiple this close to one is one
_TOLERANCE = 1e-4  # of root mean squares; wider for dtypes of lower precision
_PASSED = ("View", "UnsafeView", "Reshape", "Transpose", "Permute", "Clone", "ToCopy", "Mul", "Div", "Sigmoid", "Silu")


@dataclass(frozen=True)
class BranchSites:
    """Paths of the submodules whose tensors belong to one branch.

    Attributes
    ----------
    branch : {"attention", "mlp"}
    output : str or None
        Path of the submodule whose output, times `multiplier`, is the contribution. None if there is none; the
        contribution is then the change of the block without that of the other branch.
    multiplier : float
    readers : tuple of str
        Paths of the submodules that receive the input of the branch. Empty if there are none.
    projection : str or None
        Path of the attention's output projection, if its input is divided into heads.
    heads : tuple of int or None
        Number of heads and size of a head.
    reasons : mapping
        For each of "output", "input" and "heads" that is missing, the reason.
    returns_state : bool
        Whether the output is the state after the branch, so that the contribution is its difference from the state that
        enters the block.
    side : {"input", "output"}
        "input" if the submodule `output` receives this state instead of returning it.
    """

    branch: Branch
    output: str | None
    multiplier: float
    readers: tuple[str, ...]
    projection: str | None
    heads: tuple[int, int] | None
    reasons: Mapping[str, str]
    returns_state: bool = False
    side: Side = "output"


@dataclass(frozen=True)
class BlockSites:
    """The sites of the two branches of a block.

    Attributes
    ----------
    first : {"attention", "mlp"} or None
        The branch that runs first; None if both read the block's input.
    branches : mapping of str to BranchSites
    uncalled : tuple of str
        Children of the block that were not called, such as the cross-attention of a decoder without an encoder. If they
        are called, the sites are not those of the block.
    post_norm : bool
        Whether the block normalizes the state after each branch, and the contributions contain the norms.
    """

    first: Branch | None
    branches: Mapping[Branch, BranchSites]
    uncalled: tuple[str, ...] = ()
    post_norm: bool = False

    @property
    def last(self) -> Branch:
        """The branch whose contribution is added last, or the MLP of parallel branches."""
        return "attention" if self.first == "mlp" else "mlp"


def uncalled_children(call: BlockCall) -> tuple[str, ...]:
    """Return the children of a block with weight matrices that a run does not call or use otherwise."""
    called: set[str] = set()
    with ExitStack() as hooks, torch.no_grad():
        for name, module in call.block.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, name=name: called.add(name)))
        output = call.run(call.state, {})
        called = {name.partition(".")[0] for name in called}
        uncalled = [
            name
            for name, child in call.block.named_children()
            if name not in called and any(parameter.ndim > 1 for parameter in child.parameters())
        ]
        zeros = {
            name: torch.zeros_like(parameter)
            for name, parameter in call.block.named_parameters()
            if name.partition(".")[0] in uncalled
        }
        return tuple(uncalled) if torch.equal(call.run(call.state, zeros), output) else ()


def find_branch_sites(call: BlockCall, branches: Branches, uncalled: tuple[str, ...] = ()) -> BlockSites:
    """Find the sites of the two branches of a block from one call without padding, in evaluation mode.

    `uncalled` are the `uncalled_children`. Raises `UnsupportedSurgery` if the contribution of neither branch is the
    output of a submodule.
    """
    with torch.no_grad():
        search = SiteSearch(call, branches, uncalled)
        sites = {branch: search.sites_of(branch) for branch in BRANCHES}
        readable = [site for site in sites.values() if site.output is not None]
        between = None if readable else search.state_between()
    if between is not None and branches.first is not None:
        first = replace(sites[branches.first], output=between.path, side=between.side, returns_state=True)
        sites[branches.first] = first
    elif not readable:
        raise UnsupportedSurgery(
            f"The contributions of the branches of {type(call.block).__name__} cannot be read: none of its submodules "
            "returns what its attention or its MLP adds to the state."
        )
    return BlockSites(branches.first, sites, uncalled)


class SiteSearch:
    """The steps of `find_branch_sites` for one call of a block."""

    def __init__(self, call: BlockCall, branches: Branches, uncalled: tuple[str, ...] = ()) -> None:
        self.call, self.block, self.branches = call, call.block, branches
        self.search = BranchSearch(call, (*SPLICES, *uncalled))
        self.state = call.state
        writers = branches.writers
        every = [name for names in writers.values() for name in names]
        self.values = {branch: self.search.comparable(names, every) for branch, names in writers.items()}
        self.both = self.search.together(self.values, BRANCHES)
        self.tolerance = max(_TOLERANCE, self.search.tolerance)
        self.size = root_mean_square(self.state)
        self.other, self.added = (self.noise(self.state, seed) for seed in (1, 2))
        self.inputs, self.outputs = self.observe()
        projections, _ = self.search.read_graph()
        self.behind = {
            branch: union(p.behind | p.names for p in projections if p.names & set(writers[branch]))
            for branch in BRANCHES
        }
        if branches.first is not None:
            self.behind[self.second] -= self.behind[branches.first]

    @property
    def second(self) -> Branch:
        """The branch that runs second, or the MLP of parallel branches."""
        return BRANCHES[1 - BRANCHES.index(self.branches.first or "attention")]

    def noise(self, like: Tensor, seed: int) -> Tensor:
        """Return a random tensor as large as another, whose tokens have different norms, so that a norm is noticed."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(like.shape, generator=generator) * (root_mean_square(like) or 1.0)
        return (noise * (0.5 + torch.rand((*like.shape[:-1], 1), generator=generator))).to(like)

    def equal(self, actual: Tensor, expected: Tensor, size: float) -> bool:
        """Whether two tensors are equal up to rounding, relative to a root mean square."""
        return bool(torch.isfinite(actual).all()) and root_mean_square(actual - expected) <= self.tolerance * size

    def observe(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the input and output states of each submodule that one run calls once, in the order of their ends."""
        inputs: dict[str, list[Tensor | None]] = {}
        outputs: dict[str, list[Tensor | None]] = {}

        def enter(path: str, args: Any, kwargs: Any) -> None:
            inputs.setdefault(path, []).append(_state_or_none(lambda: read_input(args, kwargs)))

        def leave(path: str, output: Any) -> None:
            outputs.setdefault(path, []).append(_state_or_none(lambda: read_output(output)))

        with ExitStack() as hooks:
            for path, module in self.block.named_modules():
                if path and path.partition(".")[0] not in SPLICES:
                    hooks.enter_context(
                        module.register_forward_pre_hook(
                            lambda m, args, kwargs, path=path: enter(path, args, kwargs), with_kwargs=True
                        )
                    )
                    hooks.enter_context(
                        module.register_forward_hook(lambda m, args, output, path=path: leave(path, output))
                    )
            self.call.run(self.state, self.both)
        once = [
            {path: states[0] for path, states in recorded.items() if len(states) == 1 and states[0] is not None}
            for recorded in (inputs, outputs)
        ]
        return once[0], once[1]

    def sites_of(self, branch: Branch) -> BranchSites:
        """Find the sites of one branch."""
        reasons: dict[str, str] = {}
        output, multiplier = self.output_of(branch)
        if output is None:
            reasons["output"] = f"no submodule returns what the {branch} adds to the state, or a multiple of it"
        readers = self.readers_of(branch)
        if not readers:
            reasons["input"] = f"no submodule receives everything that the {branch} reads"
        projection, heads = (None, None) if branch == "mlp" else self.heads()
        if projection is None and branch == "attention":
            reasons["heads"] = "the input of the output projection is not a concatenation of heads"
        return BranchSites(branch, output, multiplier, readers, projection, heads, reasons)

    def run(
        self, state: Tensor, on: tuple[Branch, ...], changes: Mapping[tuple[str, str], Change] | None = None
    ) -> Tensor:
        """Run the block without the branches that are not in `on`, and change inputs or outputs of submodules."""
        with ExitStack() as hooks:
            for (path, side), change in (changes or {}).items():
                hooks.enter_context(changing(self.block.get_submodule(path), side, change))
            return self.call.run(state, self.search.together(self.values, on))

    def output_of(self, branch: Branch) -> tuple[str | None, float]:
        """Return the path of the submodule that returns the contribution, and the multiplier of its output."""
        first = self.branches.first
        if first is None or branch == first:
            target = self.run(self.state, (branch,)) - self.state
        else:
            target = self.run(self.state, BRANCHES) - self.run(self.state, (first,))
        for path, output in reversed(self.outputs.items()):
            if output.shape[-1] != target.shape[-1] or output.numel() != target.numel() or output.dtype != target.dtype:
                continue
            output = output.reshape(target.shape)  # some submodules flatten the tokens
            multiplier = _multiple(output, target)
            is_multiple = multiplier != 0 and self.equal(output * multiplier, target, root_mean_square(target))
            if is_multiple and self.is_contribution(branch, path, multiplier):
                return path, multiplier
        return None, 1.0

    def state_between(self) -> TensorSite | None:
        """Return where to read the state after the first branch, if the block continues from any tensor there."""
        site = None if self.branches.first is None else self.branches.sites.get(self.branches.first)
        if site is None or site.path not in (self.inputs if site.side == "input" else self.outputs):
            return None
        middle = self.noise(self.state, 3)
        changes: dict[tuple[str, str], Change] = {(site.path, site.side): lambda state: middle.view(state.shape)}
        expected = self.run(middle, (self.second,))
        size = root_mean_square(expected)
        same = (self.equal(self.run(state, BRANCHES, changes), expected, size) for state in (self.state, self.other))
        return site if all(same) else None

    def is_contribution(self, branch: Branch, path: str, multiplier: float) -> bool:
        """Whether the block continues as if the branch had added what replaces this output."""
        changed = self.run(
            self.state, BRANCHES, {(path, "output"): lambda state: (self.added / multiplier).view(state.shape)}
        )
        first = self.branches.first
        if first is None:
            (other,) = (b for b in BRANCHES if b != branch)
            expected = self.run(self.state, (other,)) + self.added
        elif branch == first:
            expected = self.run(self.state + self.added, (self.second,))
        else:
            expected = self.run(self.state, (first,)) + self.added
        return self.equal(changed, expected, root_mean_square(expected))

    def readers_of(self, branch: Branch) -> tuple[str, ...]:
        """Return the submodules that receive the input of a branch."""
        names = [n for n in self.behind[branch] if self.search.parameters[n].ndim > 1]
        owners = sorted({n.rpartition(".")[0] for n in names})
        if not owners:
            return ()
        container = _common(owners)
        inside = container
        while inside:
            if inside in self.inputs and self.fixes(branch, (inside,)):
                return (inside,)
            inside = inside.rpartition(".")[0]  # a router may lie outside the module of the experts
        depth = container.count(".") + 1 if container else 0
        children = {".".join(owner.split(".")[: depth + 1]) for owner in owners}
        called = [path for path in self.inputs if path in children]
        if not called:
            return ()
        state = self.inputs[called[0]]
        readers = tuple(
            path for path in called if self.inputs[path].shape == state.shape and torch.equal(self.inputs[path], state)
        )
        return readers if self.fixes(branch, readers) else ()

    def fixes(self, branch: Branch, paths: tuple[str, ...]) -> bool:
        """Whether the contribution depends on the block's input only through the input of these submodules."""
        state = self.inputs[paths[0]]
        if state.shape[:-1].numel() != self.state.shape[:-1].numel():
            return False
        fixed = [self.noise(state, seed) for seed in (3, 4)]

        def contribution(entering: Tensor, replacement: Tensor) -> Tensor:
            changes: dict[tuple[str, str], Change] = {(path, "input"): lambda _: replacement for path in paths}
            return self.run(entering, (branch,), changes) - entering

        try:
            added = contribution(self.state, fixed[0])
            again = contribution(self.other, fixed[0])
            different = contribution(self.state, fixed[1])
        except StreamlineError:
            return False
        size = max(self.size, root_mean_square(added))
        return self.equal(added, again, size) and root_mean_square(added - different) > 2 * self.tolerance * size

    def heads(self) -> tuple[str | None, tuple[int, int] | None]:
        """Return the output projection of the attention, and the number and size of its heads."""
        path = _common(sorted({name.rpartition(".")[0] for name in self.branches.writers["attention"]}))
        if not path or path not in self.inputs or not self.fixes("attention", (path,)) or not self.is_linear(path):
            return None, None
        heads = self.merged_heads(path, self.inputs[path].shape[-1])
        return (path, heads) if heads else (None, None)

    def is_linear(self, path: str) -> bool:
        """Whether a submodule is a linear map plus a constant."""
        states = [self.noise(self.inputs[path], seed) for seed in (3, 4)]
        results = []
        for state in (*states, states[0] + states[1], torch.zeros_like(states[0])):
            outputs: list[Tensor] = []
            with ExitStack() as hooks:
                for side, change in (("input", lambda _, state=state: state), ("output", outputs.append)):
                    hooks.enter_context(changing(self.block.get_submodule(path), side, change))
                self.run(self.state, BRANCHES)
            results.append(outputs[0])
        return self.equal(results[0] + results[1], results[2] + results[3], root_mean_square(results[2]))

    def merged_heads(self, path: str, width: int) -> tuple[int, int] | None:
        """Return the last two sizes of the tensor that was merged into the input of a submodule, from the graph."""
        states: list[Tensor] = []
        with torch.enable_grad(), changing(self.block.get_submodule(path), "input", states.append):
            self.call.run(self.state.detach().requires_grad_(), {})
        pending: list[Any] = [states[0].grad_fn] if states else []
        done: set[Any] = set()
        while pending:
            node = pending.pop(0)
            if node is None or node in done:
                continue
            done.add(node)
            sizes: tuple[int, ...] = getattr(node, "_saved_self_sym_sizes", ())
            if len(sizes) >= 3 and sizes[-2] * sizes[-1] == width != sizes[-1]:
                return int(sizes[-2]), int(sizes[-1])
            alone = node.name().startswith("Cat") and len(node.next_functions) == 1
            if alone or node.name().startswith(_PASSED):
                pending += [following for following, _ in node.next_functions]
        return None


@contextmanager
def changing(module: nn.Module, side: str, change: Change) -> Iterator[None]:
    """Pass the input or output state of a module to `change` and use its result."""

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        state = change(read_input(args, kwargs))
        return None if state is None else write_input(args, kwargs, state)

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        state = change(read_output(output))
        return None if state is None else write_output(output, state)

    if side == "input":
        handle = module.register_forward_pre_hook(enter, with_kwargs=True)
    else:
        handle = module.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()


def _state_or_none(read: Callable[[], Tensor]) -> Tensor | None:
    try:
        return read().detach().clone()
    except StreamlineError:  # the submodule has no hidden state, such as one that makes a mask
        return None


def _multiple(output: Tensor, target: Tensor) -> float:
    """Return the number by which an output is multiplied to be nearest to a target."""
    wide, aim = output.double().flatten(), target.double().flatten()
    size = float(wide @ wide)
    multiplier = float(wide @ aim) / size if size else 0.0
    return 1.0 if abs(multiplier - 1.0) < _SAME_SCALE else multiplier


def _common(paths: list[str]) -> str:
    """Return the longest dotted path that contains all paths."""
    parts = [path.split(".") for path in paths]
    depth = 0
    while all(len(p) > depth for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    return ".".join(parts[0][:depth])
