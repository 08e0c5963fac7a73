"""What is trained besides the stand-ins: adapters on blocks that stay, or such blocks whole.

Either is a copy of the block, trained in the student while the teacher has the original. Nothing of it is left in the
model until `Student.settle`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any, Literal

import torch
from torch import nn

from streamline_hooks.arguments import check_fields, checked
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.adapters import with_adapters
from streamline_hooks.repair.folded import Folded
from streamline_hooks.repair.options import read_options
from streamline_hooks.repair.scaled import Scaled
from streamline_hooks.repair.stand_in import StandIn
from streamline_hooks.repair.student import Student
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.silence import silent_inside
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices
from streamline_hooks.task import Task

Where = Literal["all", "after", "beside", "last"]
_OF_ADAPTERS = ("rank", "alpha", "dropout", "targets")


@dataclass(frozen=True)
class Healing:
    """What is trained of the blocks that stay.

    Attributes
    ----------
    how : {"lora", "partial"}
        Low-rank adapters beside their linear layers (LoRA, arXiv 2106.09685), which are merged in the end, or the
        blocks whole.
    where : {"all", "after", "beside", "last"}
        All blocks, those after the first cut, `count` on either side of each cut, or the last `count` of the stack.
    count : int
        See there.
    rate : float
        Share of the training's learning rate at which all this is trained: what stays knows most already, and what is
        new has all to learn.
    head : bool
        Whether the LM head is trained too, whole; where it is the input embedding as well, it cannot be.
    rank, alpha, dropout
        Of the adapters, and of them alone: alpha/rank is their scale.
    targets : tuple of str
        How the names of the layers end that get an adapter; by default every linear layer of a block does. Blocks are
        trained whole, or not.

    Examples
    --------
    >>> Healing.parse("partial:where=beside,count=2").blocks(8, [range(3, 5)])
    [1, 2, 5, 6]
    >>> Healing.parse("lora:rank=8,targets=up_proj+down_proj").targets
    ('up_proj', 'down_proj')
    """

    how: Literal["lora", "partial"] = "lora"
    where: Where = "all"
    count: int = 0
    rate: float = 1.0
    head: bool = False
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        counted = self.where in ("beside", "last")
        if self.how not in ("lora", "partial") or self.where not in ("all", "after", "beside", "last"):
            raise StreamlineError(
                f"Healing {self.how!r} of {self.where!r} blocks is unknown; expected 'lora' or 'partial', of 'all', "
                "'after', 'beside' or 'last'."
            )
        if counted != (self.count > 0):
            raise StreamlineError(
                f"Healing of the blocks {self.where!r} was given count={self.count}; expected 1 or more for 'beside' "
                "and 'last', and none otherwise."
            )
        if not 0 < self.rate < inf:
            raise StreamlineError(f"Healing at rate={self.rate} of the learning rate trains nothing; expected above 0.")
        if self.rank < 1 or not 0 < self.alpha < inf or not 0 <= self.dropout < 1:
            raise StreamlineError(
                f"Adapters of rank={self.rank}, alpha={self.alpha}, dropout={self.dropout} cannot be; expected a rank "
                "of 1 or more, alpha above 0, dropout in 0 to 1."
            )

        default = {field.name: field.default for field in fields(self)}
        given = [name for name in _OF_ADAPTERS if getattr(self, name) != default[name]]
        if self.how == "partial" and given:
            raise StreamlineError(
                f"Healing 'partial' trains blocks whole and was given {', '.join(given)}, of adapters. Leave that out, "
                "or heal with 'lora'."
            )

    @classmethod
    @checked()
    def parse(cls, text: str) -> Healing:
        """Read ``"lora"``, ``"lora:rank=64,where=after"`` or ``"partial:where=beside,count=2"``.

        Raises
        ------
        StreamlineError
            If it cannot be read.
        """
        read: dict[str, Any] = {
            "where": str, "count": int, "rate": float, "rank": int, "alpha": float, "dropout": float,
            "targets": lambda value: tuple(value.split("+")),
            "head": lambda value: {"": True, "true": True, "false": False}[value.lower()],
        }  # fmt: skip
        given = read_options(text, read, "healing", "lora:rank=16,where=after")
        return cls(how=text.partition(":")[0].strip(), **given)  # type: ignore[arg-type]

    def blocks(self, length: int, windows: Sequence[range]) -> list[int]:
        """The blocks that are trained, of those that stay."""
        gone = {k for window in windows for k in window}
        match self.where:
            case "all":
                chosen = set(range(length))
            case "after":
                chosen = set(range(min((window.stop for window in windows), default=0), length))
            case "last":
                chosen = set(range(length - self.count, length))
            case "beside":
                chosen = set()
                for window in windows:
                    chosen |= set(range(window.start - self.count, window.start))
                    chosen |= set(range(window.stop, window.stop + self.count))
        return sorted(k for k in chosen - gone if 0 <= k < length)


def healing_copies(
    stack: BlockStack, windows: Sequence[range], healing: Healing, *, seed: int = 0
) -> tuple[dict[int, nn.Module], dict[str, nn.Module]]:
    """Make the copies that a `Student` trains.

    Parameters
    ----------
    stack : BlockStack
        Of the original.
    windows : sequence of range
        What is given up.
    healing : Healing
    seed : int
        Of the adapters' weights. The caller's random numbers are left as they were.

    Returns
    -------
    copies : dict of int to torch.nn.Module
        Of blocks that stay. Those with adapters share the block's weights, which are not trained.
    outside : dict of str to torch.nn.Module
        The LM head by its path, where it is trained.

    Raises
    ------
    StreamlineError
        If no block is left to train, peft is missing, no layer has a name that is asked for, or the head is tied.
    """
    chosen = healing.blocks(len(stack), windows)
    if not chosen and not healing.head:
        raise StreamlineError(
            f"Healing of the blocks {healing.where!r} finds none: {len(stack)} blocks, of which "
            f"{', '.join(f'{w.start} to {w.stop - 1}' for w in windows)} go. Choose others."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        copies = {
            k: with_adapters(stack[k], healing.rank, healing.alpha, healing.dropout, healing.targets)
            if healing.how == "lora"
            else _whole(stack[k])
            for k in chosen
        }
    return copies, _head(stack.model) if healing.head else {}


@checked()
def student_of(
    stack: BlockStack,
    stand_ins: Sequence[tuple[range, StandIn]],
    healing: Healing | None = None,
    *,
    seed: int = 0,
    task: Task | None = None,
    teacher: nn.Module | None = None,
) -> Student:
    """A student with these stand-ins, and with copies of what is healed beside them.

    Parameters
    ----------
    stack : BlockStack
        Of the original.
    stand_ins : sequence of (range, StandIn)
        See `Student`.
    healing : Healing, optional
        By default the stand-ins alone are trained.
    seed : int
        See `healing_copies`.
    task : Task, optional
        See `Student`.
    teacher : torch.nn.Module, optional
        See `Student`.

    Raises
    ------
    StreamlineError
        As `healing_copies`.
    """
    if healing is None:
        return Student(stack.model, stand_ins, stack=stack.path, task=task, teacher=teacher)
    with LayerSurgeon(stack.model, stack.path, probe=False) as surgeon:
        for window, stand_in in stand_ins:  # what is folded into a block belongs into its copy, which takes its place
            if isinstance(stand_in, Folded):
                surgeon.fold(window.start - 1, stand_in.map)
            elif isinstance(stand_in, Scaled):
                surgeon.scale(window.stop, stand_in.factor)
        copies, outside = healing_copies(stack, [window for window, _ in stand_ins], healing, seed=seed)
    options: dict[str, Any] = {"rate": healing.rate, "stack": stack.path, "task": task, "teacher": teacher}
    return Student(stack.model, stand_ins, copies=copies, outside=outside, **options)


def _whole(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    for place in (BEFORE, AFTER):  # what is spliced in beside a block is no part of it
        set_splices(made, place, [])
    silent = silent_inside(made)  # what was silenced stays so
    for parameter in made.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) not in silent)
    return made


def _head(model: nn.Module) -> dict[str, nn.Module]:
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    path = next((path for path, module in model.named_modules() if module is head), None)
    if head is None or path is None:
        raise StreamlineError(f"{type(model).__name__} does not say which its LM head is; leave head out.")
    own = {id(parameter) for parameter in head.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not name.startswith(f"{path}."):
            raise StreamlineError(
                f"The LM head of {type(model).__name__} is {name} as well: trained alone, it would be a new matrix of "
                f"{parameter.numel():,} parameters. Train the last blocks instead, or untie the two first."
            )
    return {path: _whole(head)}
