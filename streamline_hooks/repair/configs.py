"""The config of each kind of replacement: its options, how it is built and fitted, and its size."""

# ruff: noqa: D102 - overridden methods are documented in ReplacementConfig

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    Batches,
    Bound,
    Config,
    Registry,
    StreamlineError,
    UnsupportedSurgery,
    exclusive_global_state,
    register_config,
)
from streamline_hooks.modeling import BlockStack, Branches, StateSource
from streamline_hooks.repair.fold import branches_before, fit_scale, fold_moments, solve_fold
from streamline_hooks.repair.inherited_blocks import inherit_blocks, inherit_without_attention, merge_blocks
from streamline_hooks.repair.placement import (
    Repair,
    ReplacementSize,
    WindowReplacement,
    blocks_of,
    fit_possible,
    hidden_size_of,
    inner_width_of,
    replacement_size,
)
from streamline_hooks.replacements import FeedForwardReplacement, LinearReplacement, MLPReplacement, SwiGLUReplacement
from streamline_hooks.statistics import WindowMoments

Fitter = Callable[..., list[Repair | UnsupportedSurgery]]
_Config = TypeVar("_Config", bound="ReplacementConfig")

REPLACEMENTS: Registry[type[ReplacementConfig]] = Registry(
    "replacement",
    "register_replacement",
    group="streamline_hooks.replacements",
    register=lambda name, config: register_replacement(config),
)
"""The config classes of all kinds of replacement, by kind."""


@dataclass(frozen=True)
class ReplacementConfig(Config):
    """Describe what replaces a window of blocks.

    Each kind is a subclass: a frozen dataclass with a class attribute `kind`, a field with a default for each option,
    and a method `make`. Register it with `register_replacement`.

    Attributes
    ----------
    seed : int, optional
        Seed of the random initial weights; by default the seed of the compression.

    Examples
    --------
    >>> from streamline_hooks import LinearConfig, SwiGLUConfig
    >>> LinearConfig(rank=64).to_dict()
    {'kind': 'linear', 'seed': None, 'rank': 64, 'diagonal': False}
    >>> str(SwiGLUConfig(width=1536, norm=False))
    'swiglu:width=1536,norm=false'
    """

    family = REPLACEMENTS
    fit: ClassVar[Fitter | None] = None
    """Function that fits the replacements instead of least squares. It takes a `StateSource`, the windows, the batches
    to fit on, the held-out batches, a probe batch and a suffix for the progress bar. It returns for each window a
    `Repair` or an UnsupportedSurgery; a module in a `Repair` is moved to the device and dtype of the window."""

    seed: int | None = field(default=None, kw_only=True)

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        """Return a new replacement for a window of the unchanged model, before fitting.

        The replacement is a module that maps (batch, tokens, features) to the same shape, or None for plain removal.
        """
        raise NotImplementedError

    def prepare(self, stack: BlockStack, window: range, probe: Batch | Tensor | None) -> WindowReplacement:
        """Return a new replacement to be fitted; `probe` is a batch for models that need one to find their branches."""
        return self.make(stack, window)

    @property
    def slots(self) -> int:
        """Number of slots that the replacement takes in the stack and in the KV cache."""
        return 0

    @property
    def is_solved(self) -> bool:
        """Whether least squares initializes the replacement; otherwise it keeps the weights that `make` gave it."""
        return True

    @property
    def replaces_branches(self) -> bool:
        """Whether this kind also replaces an attention or MLP that is removed without its block."""
        return False

    @property
    def is_meaningful_untrained(self) -> bool:
        """Whether an untrained replacement is meaningful: solved in closed form, fitted, or copied from blocks."""
        return self.is_solved or self.fit is not None or self.slots > 0

    @cached_property
    def name(self) -> str:
        """Short form for the command line: the kind and the options that differ from their defaults."""
        default, options = type(self)(), []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "seed" and value != getattr(default, f.name):
                text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
                options.append(f.name if value is True else f"{f.name}={'false' if value is False else text}")
        return self.kind + (":" if options else "") + ",".join(options)

    def __str__(self) -> str:
        return self.name

    def build(self, stack: BlockStack, window: range, *, probe: Batch | Tensor | None = None) -> WindowReplacement:
        """Return a new replacement to be fitted.

        The result depends only on the seed and the model; the global random state is not changed.

        Parameters
        ----------
        stack : BlockStack
        window : range
        probe : mapping or torch.Tensor, optional
            A batch without padding. Required only for models that cannot be probed with random tokens.

        Raises
        ------
        StreamlineError
            If the options do not suit the model or the window, or `slots` or `is_solved` does not suit the module.
        """
        with exclusive_global_state(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed or 0)
            replacement_module = self.prepare(stack, window, probe)
        slots = len(blocks_of(stack, replacement_module))
        if slots != self.slots:
            raise StreamlineError(
                f"{type(self).__name__} has slots={self.slots}, but its method make returned a "
                f"{type(replacement_module).__name__}, which takes {slots}. A module of the blocks' class takes one "
                "slot, any other module takes none. Correct the attribute slots."
            )
        must_be_solvable = self.is_solved and self.fit is None and not slots
        if must_be_solvable and isinstance(replacement_module, nn.Module) and not can_be_solved(replacement_module):
            raise StreamlineError(
                f"{type(self).__name__} has is_solved=True, but its module {type(replacement_module).__name__} has "
                "neither a method start_at(map) nor an attribute last_projection, so least squares cannot initialize "
                "it. Add one of them, or set is_solved = False in the config, so that it must be trained."
            )
        return replacement_module

    def size(self, stack: BlockStack, window: range) -> ReplacementSize:
        """Return the size of the replacement, without allocating its weights."""
        with torch.device("meta"):
            return replacement_size(stack, self.make(stack, window))

    def seeded(self: _Config, seed: int) -> _Config:
        """Return this config, with `seed` if its own seed is None."""
        return replace(self, seed=seed) if self.seed is None else self


def can_be_solved(module: nn.Module) -> bool:
    """Whether a module has a method or attribute by which least squares initializes it."""
    return hasattr(module, "start_at") or getattr(module, "last_projection", None) is not None


_Replacement = TypeVar("_Replacement", bound=type[ReplacementConfig])


def register_replacement(config: _Replacement) -> _Replacement:
    """Register a kind of replacement for `compress`, config files and the command line.

    A module returned by the config's `make` is initialized by least squares in one of two ways. If the module has a
    method ``start_at(map)``, it receives the closed-form W of h + hW. If it has an attribute ``last_projection``, the
    path of an ``nn.Linear`` in it, that layer is solved by least squares. A module with neither keeps its initial
    weights; its config sets the class attribute ``is_solved = False``. To save the module in checkpoints, register its
    class with `register_module`.

    Parameters
    ----------
    config : type
        A frozen dataclass that derives from `ReplacementConfig`.

    Returns
    -------
    type
        The same class, so this function can be used as a decorator.

    Raises
    ------
    StreamlineError
        If the class is not such a dataclass, a field has no default, or its kind is invalid or already registered.

    Examples
    --------
    >>> from torch import nn
    >>> from streamline_hooks.repair import hidden_size_of
    >>> @register_replacement
    ... @dataclass(frozen=True)
    ... class DoctestConfig(ReplacementConfig):
    ...     kind = "doctest-plain"
    ...     is_solved = False
    ...     bias: bool = False
    ...
    ...     def make(self, stack, window):
    ...         return nn.Linear(hidden_size_of(stack), hidden_size_of(stack), self.bias)
    >>> ReplacementConfig.from_dict({"kind": "doctest-plain", "bias": True})
    DoctestConfig(seed=None, bias=True)
    """
    return register_config(ReplacementConfig, config)  # type: ignore[no-any-return]


@register_replacement
@dataclass(frozen=True)
class NoneConfig(ReplacementConfig):
    """Remove the window without a replacement."""

    kind = "none"

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        return None


@register_replacement
@dataclass(frozen=True)
class LinearConfig(ReplacementConfig):
    """Replace the window by h + hW, with W solved by least squares.

    Attributes
    ----------
    rank : int, optional
        Rank of W; by default full.
    diagonal : bool
        Restrict W to a diagonal matrix: one factor per feature.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> print(LinearConfig(rank=4).size(find_stack(tiny_model("llama")), range(2, 5)))
    256 parameters, 512 FLOPs per token, no slot
    """

    kind = "linear"
    bounds: ClassVar[Mapping[str, Bound]] = {"rank": 1}
    rank: int | None = None
    diagonal: bool = False

    @property
    def replaces_branches(self) -> bool:
        return self.rank is None and not self.diagonal

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        return LinearReplacement(hidden_size_of(stack), self.rank, self.diagonal)


@register_replacement
@dataclass(frozen=True)
class MLPConfig(ReplacementConfig):
    """Replace the window by an MLP with a residual connection (LLM-Streamline, arXiv 2403.19135).

    Attributes
    ----------
    width : int, optional
        Number of hidden units; by default see `MLPReplacement`.
    activation : str
        Name of the activation function in Transformers.
    bias : bool
        Whether the layers have biases.
    linear : bool
        Whether to add a parallel linear map, solved by least squares; the last layer of the MLP then starts at zero.

    Examples
    --------
    >>> str(MLPConfig(width=256, activation="silu"))
    'mlp:width=256,activation=silu'
    """

    kind = "mlp"
    bounds: ClassVar[Mapping[str, Bound]] = {"width": 1}
    width: int | None = None
    activation: str = "gelu"
    bias: bool = False
    linear: bool = True

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        return MLPReplacement(hidden_size_of(stack), self.width, self.activation, self.bias, self.linear)


@register_replacement
@dataclass(frozen=True)
class SwiGLUConfig(ReplacementConfig):
    """Replace the window by a SwiGLU feed-forward network with a residual connection.

    Attributes
    ----------
    width : int, optional
        Number of hidden units; by default the width of the model's MLPs.
    norm : bool
        Whether an RMS norm precedes the network.
    linear : bool
        Whether to add a parallel linear map, solved by least squares; the last layer of the network then starts at
        zero.

    Examples
    --------
    >>> str(SwiGLUConfig(width=1536, norm=False))
    'swiglu:width=1536,norm=false'
    """

    kind = "swiglu"
    bounds: ClassVar[Mapping[str, Bound]] = {"width": 1}
    width: int | None = None
    norm: bool = True
    linear: bool = True

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        width = inner_width_of(stack, window.start) if self.width is None else self.width
        return SwiGLUReplacement(hidden_size_of(stack), width, self.norm, self.linear)


@register_replacement
@dataclass(frozen=True)
class BlockConfig(ReplacementConfig):
    """Replace the window by copies of its first blocks, each in a slot of the stack.

    LLM-Streamline (arXiv 2403.19135) proposes one inherited block as an alternative to the MLP.

    Attributes
    ----------
    count : int
        Number of blocks.
    solve : bool
        Whether to solve the last projection by least squares; otherwise the blocks start as copies.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> type(BlockConfig().build(find_stack(tiny_model("llama")), range(2, 5))).__name__
    'LlamaDecoderLayer'
    """

    kind = "block"
    bounds: ClassVar[Mapping[str, Bound]] = {"count": 1}
    count: int = 1
    solve: bool = True

    @property
    def slots(self) -> int:
        return self.count

    @property
    def is_solved(self) -> bool:
        return self.solve

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        return inherit_blocks(stack, window, self.count)


@register_replacement
@dataclass(frozen=True)
class SilencedConfig(ReplacementConfig):
    """Replace the window by its first block with a zero attention output projection; saves a plain checkpoint."""

    kind = "silenced"
    slots = 1

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        return inherit_blocks(stack, window)

    def prepare(self, stack: BlockStack, window: range, probe: Batch | Tensor | None) -> WindowReplacement:
        return inherit_without_attention(stack, window, probe)


@register_replacement
@dataclass(frozen=True)
class MergedConfig(ReplacementConfig):
    """Replace the window by one block merged from all its blocks (LaCo, arXiv 2402.11187).

    Attributes
    ----------
    weight : float
        Weight of the differences between the later blocks and the first; 1 by default.
    solve : bool
        Whether to solve the last projection by least squares.

    Examples
    --------
    >>> from streamline_hooks import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> type(MergedConfig(weight=0.5).build(find_stack(tiny_model("llama")), range(2, 5))).__name__
    'LlamaDecoderLayer'
    """

    kind = "merged"
    slots = 1
    weight: float = 1.0
    solve: bool = False

    @property
    def is_solved(self) -> bool:
        return self.solve

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        return merge_blocks(stack, window, self.weight)


def fit_folded(
    source: StateSource,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
    desc: str,
) -> list[Repair | UnsupportedSurgery]:
    """Fit a folded map for each window in one pass over each part of the data.

    The result of a window that cannot be folded is the error with the reason.
    """
    branches_by_window = dict(zip(windows, branches_before(source.stack, windows, probe), strict=True))
    results: dict[range, Repair | UnsupportedSurgery] = {
        window: error for window, error in branches_by_window.items() if isinstance(error, UnsupportedSurgery)
    }

    def fit_part(part: Sequence[range]) -> list[Repair | UnsupportedSurgery]:
        parts = [(f"fit{desc}", fit), (f"held-out moments{desc}", held_out)]
        branches = {w.start - 1: b for w in part if isinstance(b := branches_by_window[w], Branches)}
        repairs: dict[int, Repair | UnsupportedSurgery] = {}
        with fold_moments(source, parts, part, branches) as window_moments:
            for number, moments in window_moments:
                fit_moments, held_out_moments = (sums or WindowMoments(0) for sums in moments)
                del moments  # before the moments of the next window are summed
                repairs[number] = _solve_folded(part[number], fit_moments, held_out_moments)
                del fit_moments, held_out_moments
        return [repairs[number] for number in range(len(part))]

    remaining = [window for window in windows if window not in results]
    if remaining and source.in_memory:
        results.update(zip(remaining, fit_possible(remaining, fit_part), strict=True))
    elif remaining:  # a second pass for some of the windows would read the blocks again
        try:
            results.update(zip(remaining, fit_part(remaining), strict=True))
        except UnsupportedSurgery as error:
            results.update(dict.fromkeys(remaining, error))
    return [results[window] for window in windows]


def _solve_folded(window: range, fit: WindowMoments, held_out: WindowMoments) -> Repair | UnsupportedSurgery:
    if not fit.xx.any():
        return UnsupportedSurgery(
            "Cannot fold a map into the block before this window: the output of its MLP is zero. Choose another window "
            "or kind.",
            "fold",
        )
    folded_map = solve_fold(window, fit, held_out)
    return Repair(window, folded_map, folded_map.removal_error, folded_map.held_out_error, folded_map.ridge)


def fit_scaled(
    source: StateSource,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
    desc: str,
) -> list[Repair | UnsupportedSurgery]:
    """Measure the scale factor of each window in one pass over all batches."""
    factors = fit_scale(source, windows, [*fit, *held_out], desc=desc)
    return [Repair(scale.window, scale, scale.removal_error, scale.scaled_error, None) for scale in factors]


@register_replacement
@dataclass(frozen=True)
class FoldedConfig(NoneConfig):
    """Fold a linear map into the MLP output projection of the block before the window; adds no parameters."""

    kind = "folded"
    fit = staticmethod(fit_folded)


@register_replacement
@dataclass(frozen=True)
class ScaleConfig(NoneConfig):
    """Fold one factor for the hidden state into the weights (Prune&Comp, arXiv 2507.18212); adds no parameters."""

    kind = "scale"
    fit = staticmethod(fit_scaled)


@register_replacement
@dataclass(frozen=True)
class FeedForwardConfig(ReplacementConfig):
    """Replace the window by a random feed-forward network without a residual connection, which must be trained.

    Attributes
    ----------
    width : int, optional
        Number of hidden units; by default see `FeedForwardReplacement`.

    Examples
    --------
    >>> config = FeedForwardConfig(width=128)
    >>> str(config), config.is_meaningful_untrained
    ('feed_forward:width=128', False)
    """

    kind = "feed_forward"
    bounds: ClassVar[Mapping[str, Bound]] = {"width": 1}
    is_solved = False
    width: int | None = None

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        initializer_range = getattr(stack.config, "initializer_range", None)
        return FeedForwardReplacement(
            hidden_size_of(stack), self.width, 0.02 if initializer_range is None else initializer_range
        )
