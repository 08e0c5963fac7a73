"""What is trained besides the stand-ins: adapters on blocks that stay, or such blocks whole.

Either is a copy of the block, trained in the student while the teacher has the original. Nothing of it is left in the
model until `Student.settle`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from streamline_hooks.arguments import checked
from streamline_hooks.core.config import Bound, Config
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.folded import Folded, Scaled
from streamline_hooks.repair.stand_in import StandIn
from streamline_hooks.repair.student import Student
from streamline_hooks.replacements.block import trainable_copy
from streamline_hooks.stack import BlockStack, find_stacks
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.silence import silent_inside, silent_parameters
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices
from streamline_hooks.task import Task

Where = Literal["all", "after", "beside", "last"]
_OF_ADAPTERS = ("rank", "alpha", "dropout", "targets")


@dataclass(frozen=True)
class HealingConfig(Config):
    """Describe which of the remaining blocks are trained beside the replacement, and how.

    Attributes
    ----------
    method : {"lora", "partial"}
        Low-rank adapters of the linear layers, merged afterwards (LoRA, arXiv 2106.09685), or the blocks whole.
        The default is ``"lora"``, which takes less memory.
    where : {"all", "after", "beside", "last"}
        All blocks (the default), those after the first removed one, `count` on each side of each removed window, or
        the last `count` of the stack.
    count : int
        Number of blocks for `where` ``"beside"`` and ``"last"``, and 0, the default, otherwise.
    learning_rate_ratio : float
        Learning rate of the healed weights as a fraction of `DistillationConfig.learning_rate`, above 0; default 1.0.
        A lower one suits blocks trained whole, which change less than a new module.
    head : bool
        Whether the LM head is trained too, whole; default False. A head that is tied to the input embedding is refused.
    rank : int
        Rank of the adapters; default 16.
    alpha : float
        Scale of the adapters: their output is multiplied by alpha/rank; above 0, default 16.
    dropout : float
        Dropout probability of the adapters' input, at least 0 and below 1; default 0.
    targets : tuple of str
        Suffixes of the names of the linear layers that get an adapter; empty, the default, for all of a block.

    Raises
    ------
    StreamlineError
        If a value is invalid.

    Examples
    --------
    >>> HealingConfig("partial", where="beside", count=2).blocks(8, [range(3, 5)])
    [1, 2, 5, 6]
    """

    bounds: ClassVar[Mapping[str, Bound]] = {
        "count": 0,
        "learning_rate_ratio": "(0, inf)",
        "rank": 1,
        "alpha": "(0, inf)",
        "dropout": "[0, 1)",
    }

    method: Literal["lora", "partial"] = "lora"
    where: Where = "all"
    count: int = 0
    learning_rate_ratio: float = 1.0
    head: bool = False
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.where in ("beside", "last")) != (self.count > 0):
            raise StreamlineError(
                f"HealingConfig: count={self.count} with where={self.where!r} is invalid. Expected at least 1 for "
                "'beside' and 'last', and 0 otherwise. Change one."
            )
        default = {field.name: field.default for field in fields(self)}
        given = [name for name in _OF_ADAPTERS if getattr(self, name) != default[name]]
        if self.method == "partial" and given:
            raise StreamlineError(
                f"HealingConfig: method='partial' trains blocks whole, and {', '.join(given)} is of adapters. Expected "
                "none of these. Leave it out, or choose method='lora'."
            )

    def blocks(self, length: int, windows: Sequence[range]) -> list[int]:
        """Return the remaining blocks that are trained."""
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
    stack: BlockStack, windows: Sequence[range], healing: HealingConfig, *, seed: int = 0
) -> tuple[dict[int, nn.Module], dict[str, nn.Module]]:
    """Return trainable copies of blocks by number, and of the LM head by path if it is trained.

    Blocks with adapters share the weights of the original, frozen. `seed` initialises adapters; the global random
    state is kept.
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
            if healing.method == "lora"
            else trainable_copy(stack[k])
            for k in chosen
        }
    return copies, _head(stack.model) if healing.head else {}


@checked()
def student_of(
    stack: BlockStack,
    stand_ins: Sequence[tuple[range, StandIn]],
    healing: HealingConfig | None = None,
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
    healing : HealingConfig, optional
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
    options: dict[str, Any] = {
        "rate": healing.learning_rate_ratio,
        "stack": stack.path,
        "task": task,
        "teacher": teacher,
    }
    return Student(stack.model, stand_ins, copies=copies, outside=outside, **options)


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
    return {path: trainable_copy(head)}


def with_adapters(
    block: nn.Module, rank: int, alpha: float, dropout: float, targets: tuple[str, ...] = ()
) -> nn.Module:
    """Return a copy of a block that shares its weights, with LoRA adapters on its linear layers (by suffix)."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise StreamlineError("Healing by adapters takes the package peft: pip install peft") from error
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in block.parameters()}
    made = copy.deepcopy(block, shared)
    for place in (BEFORE, AFTER):  # what is spliced in beside a block is no part of it
        set_splices(made, place, [])
    linear = [name for name, module in made.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
    linear = [name for name in linear if not silent_parameters(made.get_submodule(name))]  # what was silenced stays so
    names = [name for name in linear if not targets or name.endswith(targets)]
    if not names:
        raise StreamlineError(
            f"No layer of a {type(block).__name__} ends in {' or '.join(targets)}; its linear layers are "
            f"{', '.join(linear) or 'none'}. Name some of these (targets)."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=_is_conv1d(made.get_submodule(names[0])),
    )
    try:
        adapted: nn.Module = inject_adapter_in_model(config, made)  # type: ignore[arg-type]
    except ValueError as error:
        raise StreamlineError(
            f"peft puts no adapters on {', '.join(names)} of a {type(block).__name__}: {error} Name others (targets), "
            "or train blocks whole (partial)."
        ) from error
    return adapted


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


@checked()
def freeze_all_but(model: nn.Module, modules: nn.Module | Iterable[nn.Module]) -> list[nn.Parameter]:
    """Let a model's only parameters that take gradients be those of some of its modules.

    Parameters
    ----------
    model : torch.nn.Module
    modules : torch.nn.Module or iterable of them
        Parts of the model, such as what `LayerSurgeon.replace` returned. Where some parameters of one are frozen, these
        stay so; where all are, all are trained, but for the projection of a block's silenced attention or MLP.

    Returns
    -------
    list of torch.nn.Parameter
        Those that are trained, for an optimiser.

    Raises
    ------
    StreamlineError
        If one of the modules is not in the model (the surgeon may have put a copy of it in), or has no parameter of
        floating point to train.

    Examples
    --------
    >>> from streamline_hooks import LayerSurgeon, LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> with LayerSurgeon(model) as surgeon:
    ...     module = surgeon.replace(range(2, 4), LinearReplacement(32))
    ...     [tuple(parameter.shape) for parameter in freeze_all_but(model, module)]
    [(32, 32)]
    """
    chosen = [modules] if isinstance(modules, nn.Module) else list(modules)
    present = set(model.modules())
    missing = [module for module in chosen if module not in present]
    if missing:
        raise StreamlineError(
            f"A {type(missing[0]).__name__} that is to be trained is not in the model. Give what the surgeon returned, "
            "which may be a copy, while it is in the model."
        )
    blocks = [set(stack.blocks) for stack in find_stacks(model)]
    trained = list(dict.fromkeys(p for module in chosen for p in _trainable(module, blocks)))
    if not trained:
        raise StreamlineError(
            f"There is nothing to train in {', '.join(type(module).__name__ for module in chosen) or 'no module'}; "
            "give a module with parameters of floating point."
        )
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def _trainable(module: nn.Module, stacks: Iterable[set[nn.Module]]) -> list[nn.Parameter]:
    floating = [p for p in module.parameters() if p.is_floating_point()]
    # A block beside others of its class that has zeros was silenced; other modules begin at zero.
    own = any(module in blocks and sum(type(b) is type(module) for b in blocks) > 1 for blocks in stacks)
    silent = silent_inside(module) if own else set[int]()
    return [p for p in floating if p.requires_grad] or [p for p in floating if id(p) not in silent]
