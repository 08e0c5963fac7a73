"""What a compression block by block reads, keeps, computes and takes, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamline_hooks.planning.rates import Rates
from streamline_hooks.planning.work import work_of
from streamline_hooks.repair.size import features_of
from streamline_hooks.stack import BlockStack

_FLOAT64 = 8
_CHOOSING = 10  # forwards of a few tokens that read every block, before a window goes
_MATRICES = 10  # d×d in float64 while a window is solved for


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes
    ----------
    name : str
    read, written : float
        Bytes of weights, and of states that are not in memory.
    states : float
        Bytes of states that are there at once, in memory and in files together.
    products, sums, eigen : float
        FLOPs in the precision of the weights, of products in float64, and of eigendecompositions in float64.
    """

    name: str
    read: float
    written: float
    states: float
    products: float
    sums: float
    eigen: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """How long it takes: reading, writing and computing one after the other.

        Tokens are shared among processes, eigendecompositions are not; the products beside them are counted as if they
        were. All of them need every block, at about the same time: of one machine it is read from the disk once.
        """
        alone = self.read / rates.read + self.written / rates.write + self.eigen / rates.eigen
        return alone + (self.products / rates.products + self.sums / rates.sums) / rates.processes


@dataclass(frozen=True)
class Asked:
    """What a compression is asked for.

    Attributes
    ----------
    calibration, validation, test : int
        Tokens.
    sequence_length : int
    window : int
        Blocks that go.
    shortlist : int
        Windows that are fitted and judged.
    memory : int
        Bytes of states in memory; what is more is in files, as all are that a run which can go on later leaves there.
    checks : int
        Times that the blocks are run on a few tokens to be held against the whole model, or to see what they keep
        apart.
    """

    calibration: int = 41_000
    validation: int = 4_096
    test: int = 12_288
    sequence_length: int = 512
    window: int = 1
    shortlist: int = 8
    memory: int = 2**30
    checks: int = 1


@dataclass(frozen=True)
class Plan:
    """A run, stage by stage.

    Attributes
    ----------
    parameters : int
    bytes : int
        Of all weights.
    resident : int
        Bytes in memory at the most: what is no block, the largest block, states, and the matrices of a solution.
    stages : tuple of Stage
    """

    parameters: int
    bytes: int
    resident: int
    stages: tuple[Stage, ...]

    @property
    def states(self) -> float:
        """Bytes of states, in memory and in files, at the most."""
        return max(stage.states for stage in self.stages)

    def seconds(self, rates: Rates) -> float:
        """Of all stages."""
        return sum(stage.seconds(rates) for stage in self.stages)

    def table(self, rates: Rates) -> str:
        """The stages as Markdown."""
        lines = [
            "| stage | reads | writes | states | FLOPs | in float64 | time |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for stage in self.stages:
            numbers = (_bytes(stage.read), _bytes(stage.written), _bytes(stage.states))
            flops = (f"{stage.products:.1e}", f"{stage.sums + stage.eigen:.1e}", _time(stage.seconds(rates)))
            lines.append(f"| {stage.name} | " + " | ".join((*numbers, *flops)) + " |")
        read, written = sum(s.read for s in self.stages), sum(s.written for s in self.stages)
        products, sums = sum(s.products for s in self.stages), sum(s.sums + s.eigen for s in self.stages)
        lines.append(
            f"| **all** | {_bytes(read)} | {_bytes(written)} | {_bytes(self.states)} | {products:.1e} | {sums:.1e} | "
            f"**{_time(self.seconds(rates))}** |"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e9:.2f} billion parameters, {_bytes(self.bytes)}, at most {_bytes(self.resident)} in "
            f"memory, {_bytes(self.states)} of states"
        )


def plan_blockwise(stack: BlockStack, asked: Asked, *, bytes_a_weight: float | None = None) -> Plan:
    """What `compress_checkpoint` will take.

    Parameters
    ----------
    stack : BlockStack
        Of a model on any device, that without memory included.
    asked : Asked
    bytes_a_weight : float, optional
        In the checkpoint; by default that of the parameters.

    Raises
    ------
    StreamlineError
        If a block's experts cannot be told, see `work_of`.

    Notes
    -----
    With T tokens, d features, L blocks of which a token is multiplied with A weights each, a vocabulary of V, C windows
    on the shortlist:

    - a forward takes 2·A FLOPs a token and block and 4·h·(T' + 1)/2 for attention, h being the numbers of a query and
      T' a sequence's tokens; the head 2·d·V;
    - a profile compares all L + 1 states of a token in float64, 2·(L + 1)²·d, and keeps them all;
    - moments are two d×d products in float64 for each window, 4·d² a token; a solution two eigendecompositions, about
      10·d³ each, and seven products of d×d matrices, 14·d³ (see `solve`);
    - candidates go through the blocks behind their windows beside the original. Of which windows these will be nothing
      is known: they are taken to be in the middle.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> plan = plan_blockwise(find_stack(tiny_model("llama")), Asked(calibration=1000, validation=100, test=100))
    >>> [stage.name for stage in plan.stages]
    ['check', 'rank', 'verify', 'choose', 'measure', 'save']
    """
    work, width = work_of(stack), features_of(stack)
    length = len(work)
    model: Any = stack.model
    parameters = list(model.parameters())
    size = bytes_a_weight or sum(p.numel() * p.element_size() for p in parameters) / sum(p.numel() for p in parameters)
    blocks = [one.parameters * size for one in work]
    each = [one.flops(asked.sequence_length) for one in work]
    everything = sum(p.numel() for p in parameters) * size
    outside = everything - sum(blocks)
    head = 2.0 * width * getattr(model.config.get_text_config(), "vocab_size", 0)
    end = (length + asked.window) // 2  # where a window in the middle ends
    behind = sum(each[end:])
    state = width * max(2.0, size)  # a token's, at one place

    def spilled(kept: float) -> float:
        return max(0.0, kept - asked.memory)

    calibration, validation, test = asked.calibration, asked.validation, asked.test
    ranked = (length + 1) * calibration * state
    candidates = asked.shortlist
    fitted = (2 + min(candidates, asked.window)) * (calibration + validation) * state
    fitted += candidates * validation * state
    measured = 6 * test * state
    gone = sum(blocks) * asked.window / length
    stages = (
        Stage("check", asked.checks * sum(blocks), 0.0, 0.0, asked.checks * 32 * sum(each), 0.0),
        Stage(
            "rank", sum(blocks) + spilled(ranked), spilled(ranked), ranked,
            calibration * sum(each), 2.0 * calibration * (length + 1) ** 2 * width,
        ),
        Stage(
            "verify", sum(blocks) + _head_bytes(stack, size), spilled(fitted), fitted,
            calibration * sum(each[:end]) + validation * (sum(each) + candidates * behind)
            + validation * (1 + candidates) * head,
            4.0 * calibration * candidates * width**2 + 14.0 * candidates * width**3, 20.0 * candidates * width**3,
        ),
        Stage("choose", _CHOOSING * sum(blocks), 0.0, 0.0, _CHOOSING * 16 * sum(each), 0.0),
        Stage(
            "measure", sum(blocks) + _head_bytes(stack, size), spilled(measured), measured,
            test * (sum(each) + 2 * behind + 3 * head), 0.0,
        ),
        Stage("save", everything - gone, everything - gone, 0.0, 0.0, 0.0),
    )  # fmt: skip
    in_memory = min(asked.memory, max(stage.states for stage in stages))
    resident = outside - _own_head(stack) * size + max(blocks) + in_memory + _MATRICES * _FLOAT64 * width**2
    return Plan(sum(p.numel() for p in parameters), round(everything), round(resident), stages)


def _own_head(stack: BlockStack) -> int:
    """Weights of an LM head that shares none with the embeddings; it is read when it is needed."""
    model: Any = stack.model
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    own = {id(p) for p in head.parameters()} - {id(p) for p in table.parameters()} if head is not None else set()
    return sum(p.numel() for p in head.parameters() if id(p) in own) if own else 0


def _head_bytes(stack: BlockStack, size: float) -> float:
    return _own_head(stack) * size


def _bytes(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"
