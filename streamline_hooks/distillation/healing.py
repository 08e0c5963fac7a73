"""Healing: train remaining blocks together with the replacements, with LoRA adapters or completely.

The student trains copies of the blocks; the teacher keeps the originals. `Student.copy_weights_to_model` copies the
trained weights into the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from streamline_hooks.core import (
    Bound,
    Config,
    StreamlineError,
    describe_blocks,
    exclusive_global_state,
    validate_arguments,
)
from streamline_hooks.distillation.student import Student
from streamline_hooks.modeling import BlockStack, Task, find_stacks
from streamline_hooks.repair import FoldedMap, ScaleFactor, WindowReplacement, trainable_copy
from streamline_hooks.surgery import AFTER, BEFORE, LayerSurgeon, set_splices, zero_parameter_ids, zero_parameters

Where = Literal["all", "after", "beside", "last"]


@dataclass(frozen=True)
class HealingConfig(Config):
    """Describe which remaining blocks are trained together with the replacements, and how.

    Attributes
    ----------
    method : {"lora", "partial"}
        Train low-rank adapters of the linear layers and merge them afterwards (``"lora"``, arXiv 2106.09685; the
        default), or train all weights of the blocks (``"partial"``), which takes more memory.
    where : {"all", "after", "beside", "last"}
        Train all blocks (the default), the blocks after the first removed one, `count` blocks on each side of each
        removed window, or the last `count` blocks.
    count : int
        Number of blocks for `where` ``"beside"`` and ``"last"``; otherwise 0, the default.
    learning_rate_ratio : float
        Learning rate of the healed weights as a fraction of `DistillationConfig.learning_rate`, above 0; default 1.0.
        `DistillationConfig.scale_parameter` scales it further.
        A lower value suits ``"partial"``, because blocks change less than new modules.
    head : bool
        Whether to train all weights of the LM head too; default False. A head tied to the input embedding is refused.
    rank : int
        Rank of the adapters; default 16.
    alpha : float
        Scale of the adapters: their output is multiplied by alpha/rank; above 0, default 16.
    dropout : float
        Dropout probability of the adapters' input, at least 0 and below 1; default 0.
    targets : tuple of str
        Suffixes of the names of the linear layers that get an adapter; empty, the default, for all linear layers.

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
                f"HealingConfig: count={self.count} with where={self.where!r} is invalid. Expected a count of at "
                "least 1 for where 'beside' and 'last', and 0 otherwise. Change one of the two."
            )
        default = {field.name: field.default for field in fields(self)}
        adapter_options = [
            name for name in ("rank", "alpha", "dropout", "targets") if getattr(self, name) != default[name]
        ]
        if self.method == "partial" and adapter_options:
            raise StreamlineError(
                f"HealingConfig: method='partial' has no adapters, but {', '.join(adapter_options)} is set. Expected "
                "no option of adapters. Omit it, or choose method='lora'."
            )

    def blocks(self, length: int, windows: Sequence[range]) -> list[int]:
        """Return the sorted indices of the remaining blocks to train.

        Parameters
        ----------
        length : int
            Number of blocks of the stack.
        windows : sequence of range
            Removed windows.
        """
        removed = {k for window in windows for k in window}
        match self.where:
            case "all":
                healed = set(range(length))
            case "after":
                healed = set(range(min((window.stop for window in windows), default=0), length))
            case "last":
                healed = set(range(length - self.count, length))
            case "beside":
                healed = set()
                for window in windows:
                    healed |= set(range(window.start - self.count, window.start))
                    healed |= set(range(window.stop, window.stop + self.count))
        return sorted(k for k in healed - removed if 0 <= k < length)


def healing_copies(
    stack: BlockStack, windows: Sequence[range], healing: HealingConfig, *, seed: int = 0
) -> tuple[dict[int, nn.Module], dict[str, nn.Module]]:
    """Return trainable copies of the blocks to heal, by index, and of the LM head, by path.

    Copies with adapters share the frozen weights of the original blocks. `seed` initializes the adapters; the global
    random state is not changed. The second dictionary is empty unless ``healing.head``.

    Parameters
    ----------
    stack : BlockStack
        Block stack of the original model.
    windows : sequence of range
        Windows that are removed.
    healing : HealingConfig
    seed : int
        Seed of the adapters; default 0.

    Returns
    -------
    (dict of int to torch.nn.Module, dict of str to torch.nn.Module)
        Arguments `copies` and `outside` of `Student`.

    Raises
    ------
    StreamlineError
        If no block and no head is selected, an adapter cannot be added, or the LM head is tied to the embedding.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> healing = HealingConfig("partial", where="beside", count=1)
    >>> copies, outside = healing_copies(find_stack(tiny_model("llama")), [range(3, 5)], healing)
    >>> sorted(copies), outside
    ([2, 5], {})
    """
    healed_blocks = healing.blocks(len(stack), windows)
    if not healed_blocks and not healing.head:
        raise StreamlineError(
            f"HealingConfig: where={healing.where!r} selects no block: the model has {len(stack)} blocks, and "
            f"{', '.join(map(describe_blocks, windows))} are removed. Choose another where or count."
        )
    with exclusive_global_state(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        copies = {
            k: with_adapters(stack[k], healing.rank, healing.alpha, healing.dropout, healing.targets)
            if healing.method == "lora"
            else trainable_copy(stack[k])
            for k in healed_blocks
        }
    return copies, _head(stack.model) if healing.head else {}


@validate_arguments()
def student_of(
    stack: BlockStack,
    replacement_modules: Sequence[tuple[range, WindowReplacement]],
    healing: HealingConfig | None = None,
    *,
    seed: int = 0,
    task: Task | None = None,
    teacher: nn.Module | None = None,
) -> Student:
    """Return a student with replacements and with copies of the blocks to heal.

    Parameters
    ----------
    stack : BlockStack
        Block stack of the original model.
    replacement_modules : sequence of (range, WindowReplacement)
        Windows and their replacements.
    healing : HealingConfig, optional
        By default only the replacements are trained.
    seed : int
        Seed of the adapters; default 0.
    task, teacher : optional
        See `Student`.

    Returns
    -------
    Student

    Raises
    ------
    StreamlineError
        For the reasons of `Student` and `healing_copies`.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.replacements import LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> stack = find_stack(tiny_model("llama"))
    >>> student = student_of(stack, [(range(3, 5), LinearReplacement(32))], HealingConfig("partial", "last", 1))
    >>> student.windows, sorted(student.copies)
    ([range(3, 5)], [7])
    """
    options: dict[str, Any] = {"stack": stack.path, "task": task, "teacher": teacher}
    if healing is None:
        return Student(stack.model, replacement_modules, **options)
    with LayerSurgeon(stack.model, stack.path, probe=False) as surgeon:
        # A folded map or factor belongs into the copy of the block, so fold before copying.
        for window, replacement_module in replacement_modules:
            if isinstance(replacement_module, FoldedMap):
                surgeon.fold(window.start - 1, replacement_module.map)
            elif isinstance(replacement_module, ScaleFactor):
                surgeon.scale(window.stop, replacement_module.factor)
        copies, outside = healing_copies(stack, [window for window, _ in replacement_modules], healing, seed=seed)
    rate = healing.learning_rate_ratio
    return Student(stack.model, replacement_modules, copies=copies, outside=outside, rate=rate, **options)


def _head(model: nn.Module) -> dict[str, nn.Module]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    path = next((path for path, module in model.named_modules() if module is head), None)
    if head is None or path is None:
        raise StreamlineError(
            f"{type(model).__name__}.get_output_embeddings() returns no LM head. Expected one to train. Set head=False."
        )
    head_parameters = {id(parameter) for parameter in head.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in head_parameters and not name.startswith(f"{path}."):
            raise StreamlineError(
                f"The LM head of {type(model).__name__} is tied to {name}. Training a copy would add "
                f"{parameter.numel():,} parameters. Train the last blocks instead, or untie the weights first."
            )
    return {path: trainable_copy(head)}


def with_adapters(
    block: nn.Module, rank: int, alpha: float, dropout: float, targets: tuple[str, ...] = ()
) -> nn.Module:
    """Return a copy of a block with shared weights and LoRA adapters on its linear layers that end in `targets`."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise StreamlineError(
            "method='lora' needs peft, which is not installed. Install the extra `peft`: "
            'pip install "streamline_hooks[peft]"'
        ) from error
    shared: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in block.parameters() if p.is_floating_point()
    }
    duplicate = copy.deepcopy(block, shared | _quantized_weights(block))
    for position in (BEFORE, AFTER):  # modules spliced next to a block do not belong to it
        set_splices(duplicate, position, [])
    linear = [name for name, module in duplicate.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    linear = [name for name in linear if not zero_parameters(duplicate.get_submodule(name))]  # keep zeroed layers zero
    names = [name for name in linear if not targets or name.endswith(targets)]
    if not names:
        raise StreamlineError(
            f"No linear layer of {type(block).__name__} ends in {' or '.join(targets)}. Expected suffixes of "
            f"{', '.join(linear) or 'none'}. Change targets."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=isinstance(duplicate.get_submodule(names[0]), Conv1D),
    )
    try:
        adapted: nn.Module = inject_adapter_in_model(config, duplicate)
    except ValueError as error:
        raise StreamlineError(
            f"peft cannot add adapters to {', '.join(names)} of {type(block).__name__}: {error} Choose other targets, "
            "or method='partial'."
        ) from error
    return adapted


def _quantized_weights(block: nn.Module) -> dict[int, Any]:
    """Return the quantized weights of a block and their scales by id, which its copy shares.

    An 8-bit layer of bitsandbytes takes the scales from its weight in the first forward, so two layers with one weight
    would not both have them. They are therefore taken before the layer is copied.
    """
    shared_values: list[Any] = [p for p in block.parameters() if not p.is_floating_point()]
    quantized = set(map(id, shared_values))
    module: Any
    for module in block.modules():
        weight: Any = getattr(module, "weight", None)
        if weight is None or id(weight) not in quantized:
            continue
        if (take := getattr(module, "init_8bit_state", None)) is not None:
            if weight.CB is not None:
                take()
            shared_values += [module.state.CB, module.state.SCB]
        if (state := getattr(weight, "quant_state", None)) is not None:
            shared_values.append(state)
    return {id(value): value for value in shared_values}


@validate_arguments()
def freeze_all_but(model: nn.Module, modules: nn.Module | Iterable[nn.Module]) -> list[nn.Parameter]:
    """Freeze all parameters of a model except those of the given modules.

    Parameters
    ----------
    model : torch.nn.Module
    modules : torch.nn.Module or iterable of torch.nn.Module
        Submodules to train, such as the result of `LayerSurgeon.replace`. Frozen parameters of a module stay frozen.
        If all its parameters are frozen, all are trained, except the zeroed output projection of an attention or MLP.

    Returns
    -------
    list of torch.nn.Parameter
        The trainable parameters, for an optimizer.

    Raises
    ------
    StreamlineError
        If a module is not in the model (the surgeon may have inserted a copy), or no module has floating-point
        parameters.

    Examples
    --------
    >>> from streamline_hooks import LayerSurgeon
    >>> from streamline_hooks.replacements import LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> with LayerSurgeon(model) as surgeon:
    ...     module = surgeon.replace(range(2, 4), LinearReplacement(32))
    ...     [tuple(parameter.shape) for parameter in freeze_all_but(model, module)]
    [(32, 32)]
    """
    chosen_modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    model_modules = set(model.modules())
    missing = [module for module in chosen_modules if module not in model_modules]
    if missing:
        raise StreamlineError(
            f"A {type(missing[0]).__name__} to train is not in the model. Expected modules of the model. Pass the "
            "module that LayerSurgeon.replace or insert returned (it may be a copy), while the surgery is in effect."
        )
    stacks = [set(stack.blocks) for stack in find_stacks(model)]
    trained: list[nn.Parameter] = []
    for module in chosen_modules:
        floating = [p for p in module.parameters() if p.is_floating_point()]
        # Zero matrices of a block of the stack are zeroed branches; other modules may start at zero.
        is_block = any(module in blocks and sum(type(b) is type(module) for b in blocks) > 1 for blocks in stacks)
        zero_ids = zero_parameter_ids(module) if is_block else set[int]()
        trained += [p for p in floating if p.requires_grad] or [p for p in floating if id(p) not in zero_ids]
    trained = list(dict.fromkeys(trained))
    if not trained:
        raise StreamlineError(
            "There is nothing to train in "
            f"{', '.join(type(module).__name__ for module in chosen_modules) or 'no module'}. Expected modules with "
            "floating-point parameters. Pass at least one."
        )
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained
