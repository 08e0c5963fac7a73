"""Changes that an intervention makes at a site: a frozen dataclass derived from `Edit` for each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamline_hooks.core import (
    StreamlineError,
)


@dataclass(frozen=True, eq=False)
class EditCall:
    """Properties of the forward pass that an edit can depend on.

    Attributes
    ----------
    name : str
        The site and the block, for messages.
    real : torch.Tensor
        Boolean mask of the real tokens, (batch, tokens).
    number : int
        Number of the forward pass since the intervention was opened, from 0.
    feature_axes : int
        Number of axes after (batch, tokens): 2 for heads, otherwise 1.

    Examples
    --------
    >>> import torch
    >>> call = EditCall("mlp.output of block 3", torch.ones(1, 2, dtype=torch.bool), number=0, feature_axes=1)
    >>> Scale(2.0).change(torch.ones(1, 2, 3), call).sum().item()
    12.0
    """

    name: str
    real: Tensor
    number: int
    feature_axes: int


class Edit(ABC):
    """A change of the tensor of a site. Subclasses are frozen dataclasses that implement `change`."""

    depends_on_pass = False
    """Whether the result depends on the number of the forward pass."""

    @property
    def can_compile(self) -> bool:
        """Whether ``torch.compile`` can trace `change`: the result depends neither on the pass nor on masked values."""
        return not self.depends_on_pass

    @abstractmethod
    def change(self, state: Tensor, call: EditCall) -> Tensor:
        """Return the tensor for all tokens, (batch, tokens, ...), without changing `state` in place.

        Tokens that are not selected keep their values.
        """


@dataclass(frozen=True, eq=False)
class Replace(Edit):
    """Replace the tensor by a value.

    Attributes
    ----------
    value : torch.Tensor
        One vector for all tokens, (features) or (heads, head size), or a tensor (batch, tokens, ...) whose sizes of 1
        are repeated.
    """

    value: Tensor

    def change(self, state: Tensor, call: EditCall) -> Tensor:  # noqa: D102
        return _fitted(self.value, state, call).expand_as(state)


@dataclass(frozen=True, eq=False)
class Add(Edit):
    """Add a value, such as a steering vector, times a factor.

    Attributes
    ----------
    value : torch.Tensor
        A value of the shapes that `Replace` accepts.
    factor : float
        Factor of the value. 1.0 by default.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.recording import Intervention
    >>> from streamline_hooks.testing import tiny_model
    >>> model, ids = tiny_model("llama"), torch.tensor([[3, 4, 5]])
    >>> with torch.no_grad(), Intervention(model, {("block.output", 2): Add(torch.ones(32), 4.0)}):
    ...     steered = model(ids).logits
    >>> torch.equal(steered, model(ids).logits)
    False
    """

    value: Tensor
    factor: float = 1.0

    def change(self, state: Tensor, call: EditCall) -> Tensor:  # noqa: D102
        return state + self.factor * _fitted(self.value, state, call)


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """Multiply by a number or a fitting tensor, such as (heads, 1) with one factor per head; see `Replace`."""

    factor: float | Tensor

    def change(self, state: Tensor, call: EditCall) -> Tensor:  # noqa: D102
        return state * (_fitted(self.factor, state, call) if isinstance(self.factor, Tensor) else self.factor)


@dataclass(frozen=True, eq=False)
class Zero(Edit):
    """Replace the tensor by zeros."""

    def change(self, state: Tensor, call: EditCall) -> Tensor:  # noqa: D102
        return torch.zeros_like(state)


@dataclass(frozen=True, eq=False)
class Mean(Edit):
    """Replace each token by the mean over tokens of other states.

    Attributes
    ----------
    states : torch.Tensor, optional
        States without padding, (..., features). Default: the real tokens of the forward pass, at least two.
    """

    states: Tensor | None = None

    @property
    def can_compile(self) -> bool:
        """Whether states are given."""
        return self.states is not None

    def change(self, state: Tensor, call: EditCall) -> Tensor:  # noqa: D102
        return _pool(self.states, state, call).mean(dim=0).expand_as(state)


@dataclass(frozen=True, eq=False)
class Resample(Edit):
    """Replace each real token by that of another state, drawn at random.

    Attributes
    ----------
    states : torch.Tensor, optional
        As in `Mean`.
    seed : int
        The draw depends on the seed, the forward pass and the number of states, and not on the padding. Sites with the
        same seed draw the same tokens.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.recording import Intervention
    >>> from streamline_hooks.testing import tiny_model
    >>> model, ids = tiny_model("llama"), torch.tensor([[3, 4, 5]])
    >>> edits = {("mlp.output", 2): Resample(torch.zeros(4, 32), seed=1)}
    >>> with torch.no_grad(), Intervention(model, edits):
    ...     resampled = model(ids).logits
    >>> with torch.no_grad(), Intervention(model, {("mlp.output", 2): Zero()}):
    ...     torch.equal(model(ids).logits, resampled)
    True
    """

    states: Tensor | None = None
    seed: int = 0
    depends_on_pass = True

    def change(self, state: Tensor, call: EditCall) -> Tensor:  # noqa: D102
        pool = _pool(self.states, state, call)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + call.number) % 2**63)
        drawn = torch.randint(len(pool), (int(call.real.sum()),), generator=generator).to(pool.device)
        result = state.clone()
        result[call.real] = pool[drawn]
        return result


@dataclass(frozen=True, eq=False)
class Patch(Edit):
    """Replace each token by the same token of a recording.

    Attributes
    ----------
    states : torch.Tensor or sequence of torch.Tensor
        ``record[site][k]``, or one tensor of it, (batch or 1, tokens, ...). Of a sequence with several tensors, the
        i-th forward pass inside the intervention uses the i-th.
    """

    states: Tensor | Sequence[Tensor]

    @property
    def depends_on_pass(self) -> bool:  # type: ignore[override]
        """Whether there are several states."""
        return not isinstance(self.states, Tensor) and len(self.states) > 1

    def change(self, state: Tensor, call: EditCall) -> Tensor:  # noqa: D102
        states = [self.states] if isinstance(self.states, Tensor) else self.states
        number = 0 if len(states) == 1 else call.number
        if number >= len(states):
            raise StreamlineError(
                f"Patch at {call.name} has {len(states)} recorded states, but forward pass {number} runs. Expected one "
                "state, or one for each forward pass. Pass steps='prefill' to patch the prompt only, or record as "
                "many passes."
            )
        value = states[number]
        value = value[None] if value.ndim == state.ndim - 1 and len(state) == 1 else value
        if value.ndim != state.ndim or value.shape[1:] != state.shape[1:] or len(value) not in (1, len(state)):
            raise StreamlineError(
                f"Patch at {call.name} has a recorded state of shape {tuple(value.shape)}. Expected "
                f"{tuple(state.shape)}, or a batch of 1. Record a prompt with as many tokens, without selecting tokens."
            )
        return value.to(state).expand_as(state)


def _fitted(value: Tensor, state: Tensor, call: EditCall) -> Tensor:
    """Return a value on the device and in the dtype of a state, if it fits without ambiguity."""
    features = state.shape[-call.feature_axes :]
    is_vector = value.ndim <= call.feature_axes
    sizes = features[len(features) - value.ndim :] if is_vector else state.shape
    if len(sizes) != value.ndim or any(n not in (1, size) for n, size in zip(value.shape, sizes, strict=True)):
        raise StreamlineError(
            f"A value of shape {tuple(value.shape)} does not fit {call.name}, whose tensor has the shape "
            f"{tuple(state.shape)}. Expected {tuple(features)} for all tokens, or {tuple(state.shape)} with sizes of 1 "
            "where it is repeated. Reshape the value."
        )
    return value.to(state)


def _pool(states: Tensor | None, state: Tensor, call: EditCall) -> Tensor:
    """Return the states from which an ablation takes its values, (states, ...)."""
    features = state.shape[-call.feature_axes :]
    if states is None:
        pool = state[call.real]
        if len(pool) < 2:
            raise StreamlineError(
                f"The ablation at {call.name} takes its values from the tokens of the forward pass, which has "
                f"{len(pool)}. Expected at least two. Pass recorded states, or steps='prefill'."
            )
        return pool
    if states.shape[-call.feature_axes :] != features:
        raise StreamlineError(
            f"The states of the ablation at {call.name} have the shape {tuple(states.shape)}. Expected "
            f"(..., {', '.join(map(str, features))}). Record them at this site."
        )
    return states.reshape(-1, *features).to(state)
