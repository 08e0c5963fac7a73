"""The base of the configs of replacements, and the registry of their kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.core.config import Config, Registry, register_config
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.repair.stand_in import Repair, StandIn, StandInSize, blocks_of, size_of
from streamline_hooks.stack import BlockStack

Fitter = Callable[..., list[Repair | UnsupportedSurgery]]


_Same = TypeVar("_Same", bound="ReplacementConfig")

REPLACEMENTS: Registry[type[ReplacementConfig]] = Registry("replacement", "register_replacement")
"""The config classes of all kinds of replacement, by kind."""


@dataclass(frozen=True)
class ReplacementConfig(Config):
    """Describe what replaces a window of blocks.

    Each kind is a subclass: a frozen dataclass with a class attribute `kind`, its options as fields with defaults, and
    a method `make`. `register_replacement` makes it known by its name.

    Attributes
    ----------
    seed : int, optional
        Seed of the weights that are random at first; by default the seed of the compression.

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
    """Fits the replacement instead of least squares. Takes a stack, windows, the two parts of the calibration text, a
    probe batch and the text of the progress bar; returns for each window a `Repair`, or the reason why there is none. A
    module in it is moved to the device and the precision of the window."""

    seed: int | None = field(default=None, kw_only=True)

    def make(self, stack: BlockStack, window: range) -> StandIn:
        """Return a new replacement for a window, of its final size and not yet initialised from data.

        Parameters
        ----------
        stack : BlockStack
            Of a model that no surgeon has changed.
        window : range

        Returns
        -------
        torch.nn.Module or None
            Maps (batch, tokens, features) to the same shape. None removes the window.
        """
        raise NotImplementedError

    def prepare(self, stack: BlockStack, window: range, probe: Batch | Tensor | None) -> StandIn:
        """Return a new replacement that is to be fitted. `probe` is a batch for models that need one to be run."""
        return self.make(stack, window)

    @property
    def slots(self) -> int:
        """Number of slots in the stack, and so in the KV cache, that the replacement takes."""
        return 0

    @property
    def is_solved(self) -> bool:
        """Whether least squares initialises the replacement. Otherwise it starts as it was made."""
        return True

    @property
    def replaces_branches(self) -> bool:
        """Whether a linear map also replaces an attention or an MLP that is removed alone."""
        return False

    @property
    def is_meaningful_untrained(self) -> bool:
        """Whether an untrained replacement is solved in closed form, fitted, or copied from blocks, and not random."""
        return self.is_solved or self.fit is not None or self.slots > 0

    @cached_property
    def name(self) -> str:
        """The short form of the command line: the kind, and the options that differ from their defaults."""
        default = type(self)()
        written = [
            f.name if value is True else f"{f.name}={_short(value)}"
            for f in fields(self)
            if f.name != "seed" and (value := getattr(self, f.name)) != getattr(default, f.name)
        ]
        return self.kind + (":" if written else "") + ",".join(written)

    def __str__(self) -> str:
        return self.name

    def build(self, stack: BlockStack, window: range, *, probe: Batch | Tensor | None = None) -> StandIn:
        """Return a new replacement that is to be fitted, the same for the same seed; the global random state is kept.

        `probe` is a batch without padding for models that cannot be probed otherwise. Raises StreamlineError if the
        options do not fit the model or the window.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed or 0)
            made = self.prepare(stack, window, probe)
        taken = len(blocks_of(stack, made))
        if taken != self.slots:
            raise StreamlineError(
                f"{type(self).__name__} has slots={self.slots} and made a {type(made).__name__}, which takes {taken}. "
                "A module of the blocks' own class takes one slot, any other takes none. Correct `slots`."
            )
        return made

    def size(self, stack: BlockStack, window: range) -> StandInSize:
        """Return what the replacement costs, without allocating its weights."""
        with torch.device("meta"):
            return size_of(stack, self.make(stack, window))

    def seeded(self: _Same, seed: int) -> _Same:
        """Return this config with a seed, if it has none of its own."""
        return replace(self, seed=seed) if self.seed is None else self


_Replacement = TypeVar("_Replacement", bound=type[ReplacementConfig])


def register_replacement(config: _Replacement) -> _Replacement:
    """Make a kind of replacement known by its name, for `compress`, config files and the command line.

    Parameters
    ----------
    config : type
        A frozen dataclass that derives from `ReplacementConfig`. A module that it makes starts as it is made if it has
        no method ``start_at(map)``, which is given the closed-form W of h + hW, and no attribute ``last_projection``,
        the path of an ``nn.Linear`` below it that is solved by least squares. For checkpoints, register the module's
        class with `register_module`.

    Returns
    -------
    type
        The same class, so that this can be used as a decorator.

    Raises
    ------
    StreamlineError
        If the class is no such dataclass, its fields have no defaults, or its kind is no name or another class's.

    Examples
    --------
    >>> from torch import nn
    >>> from streamline_hooks.repair import features_of
    >>> @register_replacement
    ... @dataclass(frozen=True)
    ... class DoctestConfig(ReplacementConfig):
    ...     kind = "doctest-plain"
    ...     bias: bool = False
    ...
    ...     def make(self, stack, window):
    ...         return nn.Linear(features_of(stack), features_of(stack), self.bias)
    >>> ReplacementConfig.from_dict({"kind": "doctest-plain", "bias": True})
    DoctestConfig(seed=None, bias=True)
    """
    return register_config(ReplacementConfig, config)  # type: ignore[no-any-return]


def _short(value: Any) -> str:
    """Return an option's value as `parse_replacement` reads it."""
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return "false" if value is False else str(value)
