"""Which halves of blocks are gone, and the mutation that keeps their number: the genome of the evolutionary search."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from streamline_hooks.branches import BRANCHES, Branch
from streamline_hooks.selection.search.selected import Selection

Half = tuple[int, Branch]
Gone = frozenset[Half]
Unit = Literal["block", "attention", "mlp"]
UNITS: tuple[Unit, ...] = ("block", *BRANCHES)


def gone_of(selection: Selection) -> Gone:
    """The halves that a selection gives up: both of a block that goes as a whole."""
    return frozenset([*((k, branch) for k in selection.blocks for branch in BRANCHES), *selection.silenced])


def selection_of(gone: Gone, score: float = 0.0) -> Selection:
    """The selection that gives up these halves; a block of which both are gone goes as a whole."""
    blocks = {k for k, _ in gone if all((k, branch) in gone for branch in BRANCHES)}
    return Selection.of_blocks(blocks, [half for half in gone if half[0] not in blocks], score)


@dataclass(frozen=True)
class Levels:
    """What may go, and the level-switching mutation on it (EvoPress, arXiv 2410.14649).

    A block is an attention and an MLP. A switch takes one unit (a block, an attention or an MLP) back and gives
    another of the same kind up, so that as many attentions and as many MLPs are gone as before, and with blocks that
    are alike as many parameters.

    Attributes
    ----------
    blocks : frozenset of int
        That may go as a whole.
    singles : frozenset of (int, {"attention", "mlp"})
        Branches that may go alone.

    Examples
    --------
    >>> levels = Levels(frozenset({0, 1, 2}), frozenset())
    >>> sorted(k for k, branch in levels.switched(gone_of(Selection.of_blocks([0, 1])), "block", Random(0)))
    [0, 0, 2, 2]
    """

    blocks: frozenset[int]
    singles: Gone

    def mutated(self, gone: Gone, random: Random) -> Gone:
        """Switch the levels of one to three units, most often of one; the same where there is no other to switch to.

        How many is the lesser of two numbers drawn from one to three, as in the paper's own search.
        """
        for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
            units = [unit for unit in UNITS if all(self.movable(gone, unit))]
            if units:
                gone = self.switched(gone, random.choice(units), random)
        return gone

    def switched(self, gone: Gone, unit: Unit, random: Random) -> Gone:
        """Take one unit that is gone back, and give another of its kind up."""
        back, up = self.movable(gone, unit)
        returning, going = (self._halves(random.choice(choice), unit) for choice in (back, up))
        return (gone - returning) | going

    def movable(self, gone: Gone, unit: Unit) -> tuple[list[int], list[int]]:
        """The blocks whose unit can come back, and those whose can go."""
        everywhere = sorted(self.blocks | {k for k, _ in self.singles})
        back = [k for k in everywhere if self._halves(k, unit) <= gone and self._fits(gone - self._halves(k, unit), k)]
        up = [k for k in everywhere if not self._halves(k, unit) & gone and self._fits(gone | self._halves(k, unit), k)]
        return back, up

    @staticmethod
    def _halves(k: int, unit: Unit) -> Gone:
        return frozenset((k, branch) for branch in BRANCHES if unit in ("block", branch))

    def _fits(self, gone: Gone, k: int) -> bool:
        """Whether what is left of a block is something that may be left."""
        own = {half for half in gone if half[0] == k}
        return k in self.blocks if len(own) == len(BRANCHES) else own <= self.singles
