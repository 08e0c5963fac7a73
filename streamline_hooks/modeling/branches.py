"""Find the two residual branches of a block, attention and MLP, by running the block.

A block with two branches adds to the residual stream twice: z = m + M(m) with m = x + A(x), or in the reverse order, or
z = x + A(x) + M(x) in parallel. The content of A and M (norms before or after, multipliers, experts, a recurrent mixer
instead of attention) does not matter, and module names are not used. Let B(a, m) be the block with the output
projections of A multiplied by a and those of M by m. On a few tokens

- B(0, 0) must return its input;
- B(1, 1) must equal B(1, 0) followed by B(0, 1), or the reverse, or the input plus the changes of B(1, 0) and B(0, 1);
- the change that one branch makes to a token must depend on other tokens (attention), and that of the second branch
  must not (MLP).

Any other block is refused, and the error names the missing property.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import UnsupportedSurgery, refuse_compiled
from streamline_hooks.modeling.block_call import BlockCall, TensorSite, find_tensor_site, register_branch_hooks
from streamline_hooks.modeling.hidden_state import read_input, read_output
from streamline_hooks.modeling.state_layout import DEFAULT_LAYOUT, by_token, layout_of

_SUMS = ("Add", "Sub")
_ELEMENTWISE = (*_SUMS, "Mul", "Div")
_NO_ELEMENTWISE = ("Addmm", "Addbmm", "Addmv", "Addr")


@dataclass(frozen=True)
class Projection:
    """A linear map whose result is added to the block's output, or the bias of one.

    Attributes
    ----------
    names : frozenset of str
        Names of its parameters.
    is_map : bool
        False for a bias alone.
    behind : frozenset of str
        Names of the parameters that its input depends on.
    """

    names: frozenset[str]
    is_map: bool
    behind: frozenset[str]


def last_projections(
    output: Tensor, state: Tensor, parameters: Mapping[str, Tensor]
) -> tuple[list[Projection], frozenset[str]]:
    """Return the projections whose results are added to a block's output, and the parameters the output depends on.

    `output` has an autograd graph whose leaves are `state` and `parameters`.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    by_state: dict[Any, bool] = {}  # whether a node depends on the state
    behind: dict[Any, frozenset[str]] = {}  # the parameters that a node depends on
    for node in _inputs_first(output.grad_fn):  # also keeps the nodes alive, so that each stays one object
        leaf = getattr(node, "variable", None)
        inputs = _inputs(node)
        by_state[node] = leaf is state or any(by_state[n] for n in inputs)
        behind[node] = union([frozenset({names[id(leaf)]} if id(leaf) in names else ()), *(behind[n] for n in inputs)])
    projections: list[Projection] = []
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        dependent = [n for n in _inputs(node) if by_state[n]]
        own_names = union(behind[n] for n in _inputs(node) if not by_state[n])
        name = node.name()
        elementwise = name.startswith(_ELEMENTWISE) and not name.startswith(_NO_ELEMENTWISE)
        if not elementwise and dependent and any(parameters[n].ndim > 1 for n in own_names):
            projections.append(Projection(own_names, True, union(behind[n] for n in dependent)))
            continue
        if name.startswith(_SUMS) and elementwise and dependent and own_names:
            projections.append(Projection(own_names, False, frozenset()))
        pending += dependent
    return projections, behind.get(output.grad_fn, frozenset())


def union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    """Return the union of sets."""
    return frozenset[str]().union(*sets)


def _inputs(node: Any) -> list[Any]:
    return [n for n, _ in node.next_functions if n is not None]


def _inputs_first(root: Any) -> Iterator[Any]:
    """Yield the nodes of a graph, each after the nodes that it depends on."""
    done, pending = set(), [] if root is None else [(root, False)]
    while pending:
        node, expanded = pending.pop()
        if node in done:
            continue
        if expanded:
            done.add(node)
            yield node
            continue
        pending.append((node, True))
        pending += [(n, False) for n in _inputs(node) if n not in done]


Branch = Literal["attention", "mlp"]
BRANCHES: tuple[Branch, Branch] = ("attention", "mlp")
_MIXES = {torch.float16: 3e-2, torch.bfloat16: 3e-2}  # 1e-3 for float32 and float64
_ROUNDINGS = 16
_USUAL_SIZE = 16  # inverse root mean square of a typical weight matrix


@dataclass(frozen=True)
class Branches:
    """The residual branches of one block.

    Attributes
    ----------
    first : {"attention", "mlp"} or None
        The branch that runs first; None if both branches read the block's input (parallel branches).
    writers : mapping
        For each branch, the names of the parameters of its output projections. A branch whose writers are zero adds
        nothing.
    sites : mapping
        For sequential branches, where to read the state after the first branch. For parallel branches, where to read
        the change that each branch adds. Empty if no submodule receives or returns these tensors.
    """

    first: Branch | None
    writers: Mapping[Branch, tuple[str, ...]]
    sites: Mapping[Branch, TensorSite]


def find_branches(call: BlockCall, apart: Collection[str] = ()) -> Branches:
    """Find the two residual branches of a block, and verify them by running the block about fifteen times.

    The block must be in evaluation mode, and the call must have at least two tokens and no padding. `apart` names
    children that are not part of the block's forward (spliced modules). Raises `UnsupportedSurgery` with the missing
    property if the block does not have two branches.
    """
    require_readable(call)
    with torch.no_grad():
        search = BranchSearch(call, apart)
        search.require_repeatable()
        projections, unused = search.read_graph()
        roles = search.roles_of(projections, unused)
        if not roles:
            search.refuse("no projection with floating-point weights adds to the state")
        if not torch.equal(search.with_roles(roles, on=()), call.state):
            search.refuse(
                "with all output projections at zero, its output differs from its input (it has a norm on the residual "
                "stream, several streams, or an addition that is not a projection)"
            )
        roles = search.necessary(roles)
        writers = search.by_branch(roles)
        first = search.order(projections, writers)
        all_names = [name for names in writers.values() for name in names]
        values = {branch: search.comparable(names, all_names) for branch, names in writers.items()}
        search.require_composed(values, first)
        return Branches(first, writers, search.sites(values, first))


def sum_order_tolerance(dtype: torch.dtype) -> float:
    """Return the largest relative difference allowed between results that differ only in summation order."""
    return _ROUNDINGS * torch.finfo(dtype).eps


def parameter_pattern(block: nn.Module, name: str) -> str:
    """Return a parameter's path below a block with each list index replaced by a star, equal for all experts."""
    module: Any = block
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            parts[index] = "*"
        module = module._modules[part]
    return ".".join(parts)


class BranchSearch:
    """The steps of `find_branches` for one call of a block."""

    def __init__(self, call: BlockCall, excluded: Collection[str]) -> None:
        self.call, self.state = call, call.state
        self.parameters = {n: p for n, p in call.block.named_parameters() if n.partition(".")[0] not in excluded}
        self.tolerance = sum_order_tolerance(self.state.dtype)
        self.pattern = partial(parameter_pattern, call.block)

    def refuse(self, reason: str) -> NoReturn:
        """Raise `UnsupportedSurgery` with the reason."""
        raise UnsupportedSurgery(f"{type(self.call.block).__name__} does not have two residual branches: {reason}.")

    def require_repeatable(self) -> None:
        """Refuse a block whose output is not finite, or differs between two runs."""
        again = self.call.run(self.state, {})
        if not torch.isfinite(again).all():
            self.refuse("its output is not finite")
        if not self.close(again, self.call.output):
            self.refuse("its output differs between two runs on the same input")

    def read_graph(self) -> tuple[list[Projection], frozenset[str]]:
        """Return the projections into the output, and the parameters that the output does not depend on."""
        called: set[str] = set()
        leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items() if p.is_floating_point()}
        state = self.state.detach().requires_grad_()
        with ExitStack() as hooks, torch.enable_grad():
            for name, module in self.call.block.named_modules():
                hooks.enter_context(module.register_forward_pre_hook(lambda *_, name=name: called.add(name)))
            projections, used = last_projections(self.call.run(state, leaves), state, leaves)
        matrices = {n for n, p in leaves.items() if p.ndim > 1 and n not in used}
        kinds = {self.pattern(n) for n in used}
        unseen = sorted(n for n in matrices if n.rpartition(".")[0] not in called and self.pattern(n) not in kinds)
        if unseen:
            self.refuse(f"{unseen[0]} was not used for the probe batch, so its contribution is unknown")
        return projections, frozenset(leaves) - used

    def roles_of(self, projections: list[Projection], unused: frozenset[str]) -> dict[str, frozenset[str]]:
        """Group projections by role; all experts share one role, including those that no token was routed to."""
        roles: dict[str, set[str]] = {}
        for projection in projections:
            for name in projection.names:
                roles.setdefault(self.pattern(name).rpartition(".")[0], set()).add(name)
        for names in roles.values():
            kinds = {self.pattern(name) for name in names}
            names |= {name for name in unused if self.pattern(name) in kinds}
        return {role: frozenset(names) for role, names in roles.items()}

    def with_roles(self, roles: Mapping[str, frozenset[str]], on: Iterable[str]) -> Tensor:
        """Run the block with the projections of all roles except `on` zeroed."""
        chosen, names = union(roles[role] for role in on), union(roles.values())
        return self.call.run(self.state, {n: self.value(n) if n in chosen else self.zero(n) for n in names})

    def necessary(self, roles: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
        """Drop roles that need not be zeroed, such as a router, whose weights only scale the experts' outputs."""
        needed = dict(roles)
        for role in sorted(roles, key=lambda role: sum(self.parameters[n].numel() for n in roles[role])):
            if torch.equal(self.with_roles(needed, on=[role]), self.state):
                del needed[role]
        return needed

    def by_branch(self, roles: Mapping[str, frozenset[str]]) -> dict[Branch, tuple[str, ...]]:
        """Split the projections into those of a branch that mixes tokens and those of a branch that does not."""
        names = sorted(union(roles.values()))
        if not names:
            self.refuse("none of its projections changes the state")
        depth = 0
        while len({tuple(n.split(".")[: depth + 1]) for n in names}) == 1 and depth < names[0].count("."):
            depth += 1
        parts: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            parts.setdefault(tuple(name.rpartition(".")[0].split(".")[: depth + 1]), []).append(name)
        branch_names: dict[Branch, list[str]] = {"attention": [], "mlp": []}
        for part in parts.values():
            branch_names["attention" if self.mixes_tokens(part, names) else "mlp"] += part
        missing = [branch for branch in BRANCHES if not branch_names[branch]]
        if missing:
            verb = "does not mix" if missing == ["attention"] else "mixes"
            self.refuse(f"everything that it adds to the state {verb} tokens, so it has no {missing[0]} branch")
        return {branch: tuple(part) for branch, part in branch_names.items()}

    def mixes_tokens(self, branch_names: list[str], names: list[str]) -> bool:
        """Whether the change that only these projections make to a token depends on the states of other tokens."""
        values = {n: self.zero(n) for n in names} | self.comparable(branch_names, names)
        other = self.state.clone()
        other[..., ::2, :] = other[..., ::2, :].flip(-1)  # change every second token
        added, changed = ((self.call.run(x, values) - x)[..., 1::2, :] for x in (self.state, other))
        bound = _MIXES.get(self.state.dtype, 1e-3) * float(added.abs().max())
        return float((added - changed).abs().max()) > bound

    def comparable(self, branch_names: Iterable[str], names: Iterable[str]) -> dict[str, Tensor]:
        """Scale projections so that the change they add is about as large as the state and exceeds rounding."""
        values = {n: self.value(n) for n in branch_names}
        added = root_mean_square(self.call.run(self.state, {n: self.zero(n) for n in names} | values) - self.state)
        size = root_mean_square(self.state)
        if not (math.isfinite(added) and added > 0 and size > 0):
            return values
        return {n: value * 2.0 ** round(math.log2(size / added)) for n, value in values.items()}

    def order(self, projections: list[Projection], writers: Mapping[Branch, tuple[str, ...]]) -> Branch | None:
        """Return the branch whose result the second branch reads, from the graph; None for parallel branches."""
        behind = {b: union(p.behind for p in projections if p.names & set(writers[b])) for b in BRANCHES}
        reused = [name for branch in BRANCHES for name in writers[branch] if name in behind[branch]]
        if reused:
            self.refuse(f"it adds to the state more than twice: another projection reads the result of {reused[0]}")
        attention_last, mlp_last = (behind[b] & set(writers[o]) for b, o in (BRANCHES, reversed(BRANCHES)))
        if attention_last and mlp_last:
            self.refuse("each of the two branches reads the result of the other")
        return "attention" if mlp_last else "mlp" if attention_last else None

    def require_composed(self, values: Mapping[Branch, dict[str, Tensor]], first: Branch | None) -> None:
        """Verify that B(1, 1) equals the composition, or the sum, of B(1, 0) and B(0, 1)."""
        full_output = self.call.run(self.state, self.together(values, BRANCHES))
        if first is None:
            parts = [self.call.run(self.state, self.together(values, [branch])) - self.state for branch in BRANCHES]
            composed = self.state + parts[0] + parts[1]
        else:
            between = self.call.run(self.state, self.together(values, [first]))
            composed = self.call.run(between, self.together(values, [b for b in BRANCHES if b != first]))
        if not (torch.isfinite(full_output).all() and self.close(full_output, composed)):
            self.refuse("the change that it adds is not the sum of the changes of its attention and its MLP")

    def sites(self, values: Mapping[Branch, dict[str, Tensor]], first: Branch | None) -> dict[Branch, TensorSite]:
        """Find where the state between the branches, or the change of each parallel branch, can be read."""
        targeted = [first] if first else BRANCHES
        outputs = {b: self.call.run(self.state, self.together(values, [b])) for b in targeted}
        targets = outputs if first else {b: after - self.state for b, after in outputs.items()}

        def run_all() -> None:
            self.call.run(self.state, self.together(values, BRANCHES))

        bound = self.tolerance * float(self.state.abs().max())
        sites = {b: find_tensor_site(self.call.block, run_all, target, bound) for b, target in targets.items()}
        return {b: site for b, site in sites.items() if site is not None} if all(sites.values()) else {}

    def together(self, values: Mapping[Branch, dict[str, Tensor]], on: Iterable[Branch]) -> dict[str, Tensor]:
        """Return the values of all projections, with zeros for the branches that are not in `on`."""
        on = set(on)
        return {
            n: v if branch in on else self.zero(n)
            for branch, branch_values in values.items()
            for n, v in branch_values.items()
        }

    def value(self, name: str) -> Tensor:
        """Return a parameter's value, with a matrix scaled to the size of typical weights.

        Weights near zero would hide the effect of a branch.
        """
        parameter = self.parameters[name].detach()
        if parameter.ndim < 2:
            return parameter
        size = root_mean_square(parameter)
        if size == 0:
            generator = torch.Generator().manual_seed(0)
            parameter, size = torch.randn(parameter.shape, generator=generator).to(parameter), 1.0
        return parameter * 2.0 ** -round(math.log2(size * _USUAL_SIZE))

    def zero(self, name: str) -> Tensor:
        """Return zeros like a parameter."""
        return torch.zeros_like(self.parameters[name])

    def close(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors are equal up to the order of sums."""
        return bool((a - b).abs().max() <= self.tolerance * b.abs().max())


def require_readable(call: BlockCall) -> None:
    """Raise `UnsupportedSurgery` if the states of a call have a layout in which branches are not found."""
    name, block, state = type(call.block).__name__, call.block, call.state
    if (
        layout_of(block) != DEFAULT_LAYOUT
        or state.ndim not in (2, 3)
        or state.is_nested
        or call.output.shape != state.shape
    ):
        raise UnsupportedSurgery(
            f"Cannot find the branches of {name}: its states have the shape {tuple(state.shape)} and the layout "
            f"({', '.join(layout_of(block).split())}). Expected (batch, tokens, features) or (tokens, features)."
        )
    if state.shape[-2] < 2:
        raise UnsupportedSurgery(
            f"Cannot find the branches of {name} on a sequence of one token. Use sequences of at least two tokens."
        )
    if any(parameter.is_meta for parameter in block.parameters()):
        raise UnsupportedSurgery(
            f"Cannot find the branches of {name}: its parameters are offloaded. Load the model without a device map "
            "that offloads them."
        )


def root_mean_square(state: Tensor) -> float:
    """Return the root mean square of the elements of a tensor."""
    return float(state.double().square().mean().sqrt())


Receive = Callable[[int, Branch, Tensor, Tensor], None]


@contextmanager
def reading_branches(
    blocks: Mapping[int, nn.Module], branches: Mapping[int, Branches], receive: Receive
) -> Iterator[None]:
    """Pass the states before and after each residual branch to `receive` while the blocks run in evaluation mode.

    `receive` gets the block's index, the branch, and both states of shape (batch, tokens, features), and must not keep
    the states. The state after a parallel branch is the block's input plus the change of this branch. Raises
    `UnsupportedSurgery` if the state between the branches in the first forward of a block, or the sum of parallel
    branches in any forward, does not match `branches`.
    """
    for block in blocks.values():
        refuse_compiled(block, "read the branches of")
    with ExitStack() as hooks:
        for k, block in blocks.items():
            for handle in _Reading(k, block, branches[k], receive).hooks():
                hooks.enter_context(handle)
        yield


class _Reading:
    """The hooks of `reading_branches` on one block."""

    def __init__(self, k: int, block: nn.Module, branches: Branches, receive: Receive) -> None:
        if not branches.sites:
            raise UnsupportedSurgery(
                f"Cannot read the branches of block {k}: no submodule of {type(block).__name__} receives the state "
                "between them or returns their changes. Expected a block with separate attention and MLP modules. "
                "Choose another block, or replace whole blocks."
            )
        self.k, self.block, self.branches, self.receive = k, block, branches, receive
        self.paths = {site.path for site in branches.sites.values()}
        self.passed: dict[Branch, Tensor] = {}
        self.before: Tensor | None = None
        self.arguments: tuple[Any, Any] | None = None
        self.checked, self.is_read = False, True

    def hooks(self) -> Iterator[RemovableHandle]:
        yield self.block.register_forward_pre_hook(self.enter, with_kwargs=True)
        yield from register_branch_hooks(self.block, self.receive_state, self.paths)
        yield self.block.register_forward_hook(self.leave, prepend=True)

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.passed.clear()
        # Accelerate loads offloaded weights part by part: a forward in which they are not kept in memory is not read.
        self.is_read = not any(parameter.is_meta for parameter in block.parameters())
        if not self.is_read:
            return
        self.before = read_input(args, kwargs, block).detach().clone()  # some blocks change the state in place
        self.arguments = None if self.checked else copy.deepcopy((args, kwargs))

    def receive_state(self, site: TensorSite, state: Tensor) -> None:
        for branch, expected in self.branches.sites.items():
            if site == expected and self.before is not None:
                self.passed[branch] = state.detach().reshape(self.before.shape).clone()

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        if not self.is_read:
            return
        before, after, passed = self.before, read_output(output).detach(), dict(self.passed)
        self.before = None  # later calls of submodules are not part of the forward
        if before is None or set(passed) != set(self.branches.sites):
            raise UnsupportedSurgery(
                f"Block {self.k} ran differently than when its branches were found: the state between them did not "
                f"pass {', '.join(sorted(self.paths))}. Expected the same computation for every batch. Choose another "
                "block, or pass batches like the probe batch."
            )
        first = self.branches.first
        if first is None:
            states = {branch: (before, before + passed[branch]) for branch in BRANCHES}
            self.require_close(before + passed["attention"] + passed["mlp"], after)
        else:
            second = BRANCHES[1 - BRANCHES.index(first)]
            states = {first: (before, passed[first]), second: (passed[first], after)}
            if self.arguments is not None:
                zeros = {name: torch.zeros_like(block.get_parameter(name)) for name in self.branches.writers[second]}
                self.require_close(BlockCall(block, *self.arguments, after).run(before, zeros), passed[first])
        self.checked, self.arguments = True, None
        for branch, (entering, leaving) in states.items():
            self.receive(self.k, branch, by_token(entering, block), by_token(leaving, block))

    def require_close(self, expected: Tensor, actual: Tensor) -> None:
        if not (expected - actual).abs().max() <= sum_order_tolerance(actual.dtype) * actual.abs().max():
            raise UnsupportedSurgery(
                f"Block {self.k} computes something else on this batch than when its branches were found: the state "
                "between the branches differs from the block's output without the second branch, or the two parallel "
                "branches do not sum to the block's output. Expected the same computation for every batch. Choose "
                "another block."
            )
