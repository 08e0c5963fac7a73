"""Assert that no token depends on a later one, and no row of a batch on another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.generation import seeded
from streamline_hooks.hidden_state import padded, require_batch_first
from streamline_hooks.layouts import by_token
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.stack import find_stack
from streamline_hooks.testing.assertions.difference import UNTOUCHED, token_difference
from streamline_hooks.testing.assertions.running import (
    answer_of,
    axes_of,
    batches_for,
    called_on,
    features_of,
    is_model,
    precision_of,
    quietly,
    real_places,
    states_for,
)

_LATER = "looks at later tokens: pass a causal mask"
_ROWS = "mixes the rows of a batch: take sums and means over features or earlier tokens only, not over axis 0"


@dataclass(frozen=True)
class _Trial:
    """One change of the input: its description, the new input, which results must stay, and the fault if not."""

    what: str
    changed: Tensor
    kept: Tensor
    fault: str


def assert_causal(
    model_or_module: nn.Module,
    batch: Batch | Tensor | None = None,
    *,
    features: int | None = None,
    tokens: int = 12,
    changed_tokens: Iterable[int] | None = None,
    tolerance: float | None = None,
    stack: str | None = None,
) -> None:
    """Assert that no token's result depends on a later token, nor a row's result on another row.

    Tokens are changed, one at a time, and what comes out before them must stay; then one row at a time, and the other
    rows must stay. In a padded batch what lies in the padding is changed too, and no real token may see it.

    The shapes stay the same, and so do the random numbers that are drawn, so that a healthy model gives the same bits
    again. By how much it does not is found out by running it twice on the unchanged input; by more no token may move,
    measured by its own norm. That holds in half precision too. A module may work on its input in place: it is given a
    copy. Of an encoder with a decoder the decoder's tokens are changed.

    Parameters
    ----------
    model_or_module : torch.nn.Module
        A model is a Transformers model, or what comes with a batch; anything else is a module that maps states of
        (batch, tokens, features).
    batch : mapping or torch.Tensor, optional
        What a model's forward takes. Made up for a Transformers model.
    features : int, optional
        Width of a module's states; by default its own attribute ``features``.
    tokens : int
        How many tokens a module is run on.
    changed_tokens : iterable of int, optional
        Which tokens are changed; by default the second, one in the middle, and the last.
    tolerance : float, optional
        Fraction of a token's norm by which it may move besides the model's own noise; by default 1e-5 for float32 and
        1e-4 for half precision. A mixture of experts whose kernels depend on how many tokens each expert gets may need
        more.
    stack : str, optional
        Path of the stack, see `find_stack`; in it the first block that is at fault is looked for.

    Raises
    ------
    AssertionError
        With the block or module, the largest difference and where it is.
    StreamlineError
        If a module's width is not known, a token is out of range, or a model gives no result for each token, as a
        classifier does.

    Examples
    --------
    >>> from torch import nn
    >>> from streamline_hooks.testing import assert_causal, tiny_model
    >>> assert_causal(nn.Linear(8, 8), features=8)
    >>> assert_causal(tiny_model("llama", blocks=3))
    >>> class Mean(nn.Module):
    ...     def forward(self, state):
    ...         return state + state.mean(dim=1, keepdim=True)
    >>> assert_causal(Mean(), features=8)
    Traceback (most recent call last):
    ...
    AssertionError: Token 1 of 12 was changed, and what Mean gives before it changed: ... looks at later tokens...
    """
    if not is_model(model_or_module, batch):
        _hold_module(model_or_module, features_of(model_or_module, features), tokens, changed_tokens, tolerance)
        return
    require_batch_first(find_stack(model_or_module, stack)[0])
    for given in batches_for(model_or_module, batch, left_padded=False):
        _hold_model(model_or_module, given, changed_tokens, tolerance, stack)


def _hold_module(
    module: nn.Module, features: int, tokens: int, chosen: Iterable[int] | None, tolerance: float | None
) -> None:
    dtype, name = precision_of(module), type(module).__name__
    states = states_for(module, 2, tokens, features, dtype)
    with quietly(module):
        expected = called_on(module, states.clone())
        if not isinstance(expected, Tensor) or expected.shape[:2] != states.shape[:2]:
            raise AssertionError(
                f"{name} does not give one result a token for states of shape {tuple(states.shape)} (batch, tokens, "
                "features). Likely cause: see assert_shapes(module)."
            )
        again = called_on(module, states.clone())
        for trial in _trials(states, _other_input(states), None, chosen):
            got = called_on(module, trial.changed.clone())
            found = token_difference(got, expected, again, trial.kept, tolerance)
            if found is not None:
                raise AssertionError(f"{trial.what % name}: {found}. Likely cause: {name} {trial.fault}.")


def _hold_model(
    model: nn.Module,
    batch: Mapping[str, Any],
    chosen: Iterable[int] | None,
    tolerance: float | None,
    stack: str | None,
) -> None:
    given = prepare(model, batch)
    name = _input_name(model, given)
    before = given[name]
    other = _other_input(before)

    def answer(values: Tensor) -> Tensor:
        with seeded(values.device, "assertion"):  # what one run draws, the next draws too
            return answer_of(model(**{**given, name: values.clone()}))

    with quietly(model):
        expected = answer(before)
        if expected.ndim < 3 or expected.shape[:2] != before.shape[:2]:
            raise StreamlineError(
                f"A {type(model).__name__} answers with shape {tuple(expected.shape)} to {name} of shape "
                f"{tuple(before.shape)}: that is no result for each token, (batch, tokens, ...), so that none can be "
                "seen to depend on a later one. A classifier gives one answer a sequence; give the model inside it, "
                "which gives a state for each token."
            )
        again = answer(before)
        real = real_places(given, expected)
        for trial in _trials(before, other, real, chosen):
            got = answer(trial.changed)
            found = token_difference(got, expected, again, trial.kept, tolerance, axes_of(model))
            if found is not None:
                guilty = _first_guilty(model, given, name, trial, tolerance, stack)
                raise AssertionError(
                    f"{trial.what % type(model).__name__}: {found}. {guilty}. Likely cause: what runs there "
                    f"{trial.fault}."
                )


def _trials(before: Tensor, other: Tensor, real: Tensor | None, chosen: Iterable[int] | None) -> Iterator[_Trial]:
    rows, length = before.shape[:2]
    whole = torch.ones(rows, length, dtype=torch.bool) if real is None else real.cpu()
    places = (1, length // 2, length - 1) if chosen is None else tuple(chosen)
    for t in dict.fromkeys(places):
        if not 0 <= t < length:
            raise StreamlineError(f"Token {t} cannot be changed: there are {length} tokens, 0 to {length - 1}.")
        earlier = whole.clone()
        earlier[:, t:] = False
        changed = before.clone()
        changed[:, t] = other[:, t]
        if bool(earlier.any()):
            yield _Trial(
                f"Token {t} of {length} was changed, and what %s gives before it changed", changed, earlier, _LATER
            )
    for row in range(rows if rows > 1 else 0):
        others = whole.clone()
        others[row] = False
        changed = before.clone()
        changed[row] = other[row]
        yield _Trial(
            f"Row {row} of the batch was changed, and what %s gives for another row changed", changed, others, _ROWS
        )
    if not bool(whole.all()):
        padding = ~whole.to(before.device)
        changed = torch.where(padding[(...,) + (None,) * (before.ndim - 2)], other, before)
        yield _Trial("The padding was changed, and what %s gives for real tokens changed", changed, whole, _PADDING)


_PADDING = "takes padding for tokens: hand the attention mask on, 1 (or True) for a real token"


def _input_name(model: nn.Module, given: Mapping[str, Any]) -> str:
    """The argument that holds the tokens, or the states that stand for them; of two texts, those of what is written."""
    for name in ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids"):
        if isinstance(given.get(name), Tensor):
            return name
    for name, value in given.items():
        if isinstance(value, Tensor) and value.ndim >= 2 and "mask" not in name:
            return name
    raise StreamlineError(
        f"Nothing in this batch ({', '.join(given)}) holds tokens for a {type(model).__name__}: expected a tensor of "
        "shape (batch, tokens) or (batch, tokens, features) that is no mask."
    )


def _other_input(before: Tensor) -> Tensor:
    """Something else at every place: other tokens of those that are there, or other random states."""
    if before.is_floating_point():
        generator = torch.Generator().manual_seed(1)
        return before + 10 * torch.randn(before.shape, generator=generator).to(before)  # whatever was drawn before
    vocabulary = before.unique()
    if len(vocabulary) < 2:
        raise StreamlineError("All tokens of the batch are the same one, so that changing one shows nothing.")
    ids: Tensor = before
    following = vocabulary[(torch.searchsorted(vocabulary, ids) + len(vocabulary) // 2) % len(vocabulary)]
    return following


def _first_guilty(
    model: nn.Module,
    given: Mapping[str, Any],
    name: str,
    trial: _Trial,
    tolerance: float | None,
    stack: str | None,
) -> str:
    """Which block is the first to let the change through."""

    def recorded(values: Tensor) -> HiddenStateRecorder:
        with HiddenStateRecorder(model, stack=stack) as record, seeded(values.device, "assertion"):
            model(**{**given, name: values.clone()})
        return record

    records = [recorded(values) for values in (trial.changed, given[name], given[name])]
    blocks, tokens = records[0].stack, trial.kept.shape[1]

    def parted(k: int, states: Callable[[HiddenStateRecorder], dict[int, list[Tensor]]]) -> bool:
        for visit in zip(*(states(record)[k] for record in records), strict=True):
            got, expected, again = (by_token(padded(state, tokens), blocks[k]) for state in visit)
            # Finer than the answer was looked at: a token of a very large norm hides what later norms bring out.
            fraction = UNTOUCHED.get(got.dtype, 0.0) / 100 if tolerance is None else tolerance
            if token_difference(got, expected, again, trial.kept, fraction) is not None:
                return True
        return False

    for k in range(len(blocks)):
        for what, states in (("enters", _inputs), ("leaves", _outputs)):
            if parted(k, states):
                between = " (what is spliced in before it, or what runs before the stack)" if what == "enters" else ""
                return f"The first state to change is the one that {what} block {k} ({blocks.path}.{k}){between}"
    return "No block's state changed; it happens after the stack, in the final norm or the head"


def _inputs(record: HiddenStateRecorder) -> dict[int, list[Tensor]]:
    return record.inputs


def _outputs(record: HiddenStateRecorder) -> dict[int, list[Tensor]]:
    return record.outputs
