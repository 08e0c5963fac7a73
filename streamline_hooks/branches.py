"""The two residual branches of a block, attention and MLP, found and proven by running the block.

A block with the usual two branches adds to the residual stream twice: z = m + M(m) with m = x + A(x), in this order
or the other, or z = x + A(x) + M(x) in parallel. What A and M are made of (norms before or after, multipliers,
experts, a recurrent mixer in the place of attention) makes no difference to this, and no name is looked at. With
B(a, m) for the block whose output projections are multiplied by a in the one branch and by m in the other, it is
shown on a few tokens that

- B(0, 0) gives the very state that came in;
- B(0, 1) after B(1, 0) gives what B(1, 1) gives, or the other way round, or the sum of what each adds does;
- what one branch adds to a token depends on other tokens (attention, or what stands in its place), and what the other
  adds does not (MLP, or a mixture of experts).

Anything else is refused with what did not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from streamline_hooks.block_call import BlockCall, Tap, find_tap
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.layouts import USUAL, layout_of

_SUMS = ("Add", "Sub")
_ELEMENTWISE = (*_SUMS, "Mul", "Div")
_NO_ELEMENTWISE = ("Addmm", "Addbmm", "Addmv", "Addr")


@dataclass(frozen=True)
class Projection:
    """A linear map before the output, or a bias behind one.

    `names` are its parameters; `behind` those that its input depends on; `is_map` is False for a bias alone.
    """

    names: frozenset[str]
    is_map: bool
    behind: frozenset[str]


def last_projections(
    output: Tensor, state: Tensor, parameters: Mapping[str, Tensor]
) -> tuple[list[Projection], frozenset[str]]:
    """Find the projections that write a block's output, and every parameter that the output depends on.

    `output` carries the graph from `state` and `parameters`, both leaves.
    """
    graph = _Graph(output.grad_fn, state, parameters)
    found: list[Projection] = []
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        inputs = [n for n, _ in node.next_functions if n is not None]
        dependent = [n for n in inputs if graph.by_state[n]]
        own = frozenset[str]().union(*(graph.behind[n] for n in inputs if not graph.by_state[n]))
        name = node.name()
        elementwise = name.startswith(_ELEMENTWISE) and not name.startswith(_NO_ELEMENTWISE)
        if not elementwise and dependent and any(parameters[n].ndim > 1 for n in own):
            behind = frozenset[str]().union(*(graph.behind[n] for n in dependent))
            found.append(Projection(own, True, behind))
            continue
        if name.startswith(_SUMS) and elementwise and dependent and own:
            found.append(Projection(own, False, frozenset()))
        waiting += dependent
    return found, graph.behind.get(output.grad_fn, frozenset())


class _Graph:
    """For each node of a graph, whether it depends on the state, and on which parameters."""

    def __init__(self, root: Any, state: Tensor, parameters: Mapping[str, Tensor]) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.by_state: dict[Any, bool] = {}
        self.behind: dict[Any, frozenset[str]] = {}
        for node in _inputs_first(root):  # which also keeps the nodes alive, so that each is one object
            leaf = getattr(node, "variable", None)
            inputs = [n for n, _ in node.next_functions if n is not None]
            self.by_state[node] = leaf is state or any(self.by_state[n] for n in inputs)
            own = frozenset({names[id(leaf)]}) if id(leaf) in names else frozenset[str]()
            self.behind[node] = own.union(*(self.behind[n] for n in inputs))


def _inputs_first(root: Any) -> Iterator[Any]:
    """The nodes of a graph, each after all that it depends on."""
    done, waiting = set(), [] if root is None else [(root, False)]
    while waiting:
        node, expanded = waiting.pop()
        if node in done:
            continue
        if expanded:
            done.add(node)
            yield node
            continue
        waiting.append((node, True))
        waiting += [(n, False) for n, _ in node.next_functions if n is not None and n not in done]


Branch = Literal["attention", "mlp"]
BRANCHES: tuple[Branch, Branch] = ("attention", "mlp")
_MIXES = {torch.float16: 3e-2, torch.bfloat16: 3e-2}  # 1e-3 for anything wider
_ROUNDINGS = 16
_USUAL_SIZE = 16  # one over the root mean square of a matrix


@dataclass(frozen=True)
class Branches:
    """The residual branches of one block.

    `first` is the branch before the other one, None if both read the block's input. `writers` holds the paths of the
    parameters of each branch's output projections; with these at zero the branch adds nothing. `taps` says where to
    read the state behind the first branch or, of parallel branches, what each adds; it is empty if no submodule passes
    that.
    """

    first: Branch | None
    writers: Mapping[Branch, tuple[str, ...]]
    taps: Mapping[Branch, Tap]


def find_branches(call: BlockCall, apart: Collection[str] = ()) -> Branches:
    """Find a block's two residual branches, and verify them by running the block about fifteen times.

    The call is of a block in evaluation mode, with two tokens at least and no padding. Children in `apart` (spliced
    modules) are not part of the block's own forward. `UnsupportedSurgery` says what the block does that one with two
    residual branches would not.
    """
    _require_readable(call)
    with torch.no_grad():
        search = _Search(call, apart)
        search.require_repeatable()
        projections, unused = search.read_graph()
        roles = search.roles_of(projections, unused)
        if not roles:
            search.refuse("no projection of floating-point weights writes into the state")
        if not torch.equal(search.with_roles(roles, on=()), call.state):
            search.refuse(
                "with every output projection at zero, the state that leaves it is not the one that entered (a norm "
                "on the residual stream, several streams, or more than what projections add)"
            )
        roles = search.necessary(roles)
        writers = search.by_branch(roles)
        first = search.order(projections, writers)
        every = [name for names in writers.values() for name in names]
        values = {branch: search.comparable(names, every) for branch, names in writers.items()}
        search.require_composed(values, first)
        return Branches(first, writers, search.taps(values, first))


def tolerance(dtype: torch.dtype) -> float:
    """How far two numbers may be apart, relative to the largest, that are equal up to the order of a sum."""
    return _ROUNDINGS * torch.finfo(dtype).eps


def pattern_of(block: nn.Module, name: str) -> str:
    """A parameter's path below a block, with a star in the place of a number in a list: the same for all experts."""
    module: Any = block
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            parts[place] = "*"
        module = module._modules[part]
    return ".".join(parts)


class _Search:
    """The steps of `find_branches`, on one call."""

    def __init__(self, call: BlockCall, apart: Collection[str]) -> None:
        self.call, self.state = call, call.state
        self.parameters = {n: p for n, p in call.block.named_parameters() if n.partition(".")[0] not in apart}
        self.tolerance = tolerance(self.state.dtype)
        self.pattern = partial(pattern_of, call.block)

    def refuse(self, reason: str) -> NoReturn:
        raise UnsupportedSurgery(f"{type(self.call.block).__name__} has not the usual two residual branches: {reason}.")

    def require_repeatable(self) -> None:
        again = self.call.run(self.state, {})
        if not torch.isfinite(again).all():
            self.refuse("its output is not finite")
        if not self.close(again, self.call.output):
            self.refuse("run again on the same state it gives something else")

    def read_graph(self) -> tuple[list[Projection], frozenset[str]]:
        """The projections that write the output, and the matrices that took part in nothing."""
        called: set[str] = set()

        def note(name: str) -> Callable[..., None]:
            return lambda *given: called.add(name)

        leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items() if p.is_floating_point()}
        state = self.state.detach().requires_grad_()
        modules = self.call.block.named_modules()
        handles = [module.register_forward_pre_hook(note(name)) for name, module in modules]
        try:
            with torch.enable_grad():
                projections, used = last_projections(self.call.run(state, leaves), state, leaves)
        finally:
            for handle in handles:
                handle.remove()
        matrices = {n for n, p in leaves.items() if p.ndim > 1 and n not in used}
        kinds = {self.pattern(n) for n in used}
        strangers = sorted(n for n in matrices if n.rpartition(".")[0] not in called and self.pattern(n) not in kinds)
        if strangers:
            self.refuse(
                f"{strangers[0]} takes no part in what the model was run on, so that nothing shows what it would add"
            )
        return projections, frozenset(leaves) - used

    def roles_of(self, projections: list[Projection], unused: frozenset[str]) -> dict[str, frozenset[str]]:
        """The projections by what they do: all experts have one role, those that no token chose included."""
        roles: dict[str, set[str]] = {}
        for projection in projections:
            for name in projection.names:
                roles.setdefault(self.pattern(name).rpartition(".")[0], set()).add(name)
        for names in roles.values():
            kinds = {self.pattern(name) for name in names}
            names |= {name for name in unused if self.pattern(name) in kinds}
        return {role: frozenset(names) for role, names in roles.items()}

    def with_roles(self, roles: Mapping[str, frozenset[str]], on: Iterable[str]) -> Tensor:
        """The block's output with the projections of all other roles at zero."""
        chosen = frozenset[str]().union(*(roles[role] for role in on))
        names = frozenset[str]().union(*roles.values())
        return self.call.run(self.state, {n: self.value(n) if n in chosen else self.zero(n) for n in names})

    def necessary(self, roles: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
        """Leave out what need not be zero, such as a router, whose weights only scale what the experts add."""
        kept = dict(roles)
        for role in sorted(roles, key=lambda role: sum(self.parameters[n].numel() for n in roles[role])):
            if torch.equal(self.with_roles(kept, on=[role]), self.state):
                del kept[role]
        return kept

    def by_branch(self, roles: Mapping[str, frozenset[str]]) -> dict[Branch, tuple[str, ...]]:
        """Deal the projections out: those whose branch mixes tokens, and those whose branch does not."""
        names = sorted(frozenset[str]().union(*roles.values()))
        if not names:
            self.refuse("no projection of it adds anything")
        depth = 0
        while len({tuple(n.split(".")[: depth + 1]) for n in names}) == 1 and depth < names[0].count("."):
            depth += 1
        parts: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            parts.setdefault(tuple(name.rpartition(".")[0].split(".")[: depth + 1]), []).append(name)
        dealt: dict[Branch, list[str]] = {"attention": [], "mlp": []}
        for own in parts.values():
            dealt["attention" if self.mixes_tokens(own, names) else "mlp"] += own
        missing = [branch for branch in BRANCHES if not dealt[branch]]
        if missing:
            what = "does not mix" if missing == ["attention"] else "mixes"
            self.refuse(f"everything that it adds to a token {what} tokens, so that it has no {missing[0]} branch")
        return {branch: tuple(own) for branch, own in dealt.items()}

    def mixes_tokens(self, own: list[str], names: list[str]) -> bool:
        """Whether what these projections alone add to a token changes with another token's state."""
        values = {n: self.zero(n) for n in names} | self.comparable(own, names)
        other = self.state.clone()
        other[..., ::2, :] = other[..., ::2, :].flip(-1)  # every second token, so that each one's neighbour has changed
        added, changed = ((self.call.run(x, values) - x)[..., 1::2, :] for x in (self.state, other))
        bound = _MIXES.get(self.state.dtype, 1e-3) * float(added.abs().max())
        return float((added - changed).abs().max()) > bound

    def comparable(self, own: Iterable[str], names: Iterable[str]) -> dict[str, Tensor]:
        """Values with which projections add about as much as the state is large: nothing drowns in rounding then."""
        values = {n: self.value(n) for n in own}
        added = _size(self.call.run(self.state, {n: self.zero(n) for n in names} | values) - self.state)
        size = _size(self.state)
        if not (math.isfinite(added) and added > 0 and size > 0):
            return values
        return {n: value * 2.0 ** round(math.log2(size / added)) for n, value in values.items()}

    def order(self, projections: list[Projection], writers: Mapping[Branch, tuple[str, ...]]) -> Branch | None:
        """Which branch the other one works behind, from the graph."""
        behind = {
            branch: frozenset[str]().union(*(p.behind for p in projections if p.names & set(writers[branch])))
            for branch in BRANCHES
        }
        again = [name for branch in BRANCHES for name in writers[branch] if name in behind[branch]]
        if again:
            self.refuse(f"it adds more than twice: another projection works on what {again[0]} has added")
        attention_last, mlp_last = (behind[b] & set(writers[o]) for b, o in (BRANCHES, reversed(BRANCHES)))
        if attention_last and mlp_last:
            self.refuse("each of the two works on what the other has added")
        return "attention" if mlp_last else "mlp" if attention_last else None

    def require_composed(self, values: Mapping[Branch, dict[str, Tensor]], first: Branch | None) -> None:
        """B(1, 1) must be what B(1, 0) and B(0, 1) make together."""
        whole = self.call.run(self.state, self.together(values, BRANCHES))
        if first is None:
            parts = [self.call.run(self.state, self.together(values, [branch])) - self.state for branch in BRANCHES]
            made = self.state + parts[0] + parts[1]
        else:
            between = self.call.run(self.state, self.together(values, [first]))
            made = self.call.run(between, self.together(values, [b for b in BRANCHES if b != first]))
        if not (torch.isfinite(whole).all() and self.close(whole, made)):
            self.refuse("what it adds is not the sum of what its attention and its MLP add alone")

    def taps(self, values: Mapping[Branch, dict[str, Tensor]], first: Branch | None) -> dict[Branch, Tap]:
        """Where the state between the branches passes, or what each of two parallel ones adds."""
        wanted = [first] if first else BRANCHES
        alone = {b: self.call.run(self.state, self.together(values, [b])) for b in wanted}
        targets = alone if first else {b: after - self.state for b, after in alone.items()}

        def whole() -> None:
            self.call.run(self.state, self.together(values, BRANCHES))

        bound = self.tolerance * float(self.state.abs().max())
        found = {b: find_tap(self.call.block, whole, target, bound) for b, target in targets.items()}
        return {b: tap for b, tap in found.items() if tap is not None} if all(found.values()) else {}

    def together(self, values: Mapping[Branch, dict[str, Tensor]], on: Iterable[Branch]) -> dict[str, Tensor]:
        """The values of all projections, at zero where their branch is not on."""
        on = set(on)
        return {n: v if branch in on else self.zero(n) for branch, own in values.items() for n, v in own.items()}

    def value(self, name: str) -> Tensor:
        """A parameter's value; a matrix in the size of usual weights, since what is as good as zero shows nothing."""
        parameter = self.parameters[name].detach()
        if parameter.ndim < 2:
            return parameter
        size = _size(parameter)
        if size == 0:
            generator = torch.Generator().manual_seed(0)
            parameter, size = torch.randn(parameter.shape, generator=generator).to(parameter), 1.0
        return parameter * 2.0 ** -round(math.log2(size * _USUAL_SIZE))

    def zero(self, name: str) -> Tensor:
        return torch.zeros_like(self.parameters[name])

    def close(self, a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= self.tolerance * b.abs().max())


def _require_readable(call: BlockCall) -> None:
    name, block, state = type(call.block).__name__, call.block, call.state
    if layout_of(block) != USUAL or state.ndim not in (2, 3) or state.is_nested or call.output.shape != state.shape:
        raise UnsupportedSurgery(
            f"The branches of {name} are not looked for: it works on states of shape {tuple(state.shape)} laid out as "
            f"({', '.join(layout_of(block).split())}); expected (batch, tokens, features), or (tokens, features)."
        )
    if state.shape[-2] < 2:
        raise UnsupportedSurgery("One token shows nothing of what mixes tokens; give sequences of two at least.")
    if any(parameter.is_meta for parameter in block.parameters()):
        raise UnsupportedSurgery(
            f"The branches of {name} are not looked for: its parameters are kept elsewhere (offloaded). Load the model "
            "without a device map that offloads it."
        )


def _size(state: Tensor) -> float:
    return float(state.double().square().mean().sqrt())
