"""Bypassing is the truth, a shorter model only a claim: run both on a few tokens and compare.

Named hazards are found by looking (`hazards`). What depends on a block's number in a way that nobody looked for shows
here: other logits, a failing forward, or a cache that no longer fits.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.batch import takes_use_cache
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.bypass import bypass
from streamline_hooks.surgery.capture import captures
from streamline_hooks.surgery.forward_state import evaluation_mode, preserve_forward_state
from streamline_hooks.surgery.probe_inputs import TOKENS, probe_inputs
from streamline_hooks.surgery.splice import AFTER, run_after, run_before, spliced

CACHE = "decoding with a cache no longer equals the full forward"
_STEPS = 2
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative; 1e-4 for anything wider


@dataclass(frozen=True)
class Truth:
    """What the model without a window must give.

    Attributes
    ----------
    given : dict of str to torch.Tensor
        What it was called with.
    logits : torch.Tensor
        With the window bypassed, usually of shape (rows, tokens, vocabulary).
    cached : bool
        Whether the model's own cached decoding equals its full forward, so that it can be asked for afterwards.
    runs : bool
        Whether it runs as users call it, with whatever it keeps for the next token; asked where `cached` is not.
    """

    given: dict[str, Tensor]
    logits: Tensor
    cached: bool
    runs: bool = False


def observe(stack: BlockStack, window: range, going: Sequence[nn.Module] = ()) -> Truth | None:
    """Run the model with a window's output thrown away for its input.

    Parameters
    ----------
    stack : BlockStack
    window : range
        Blocks that are in the model now.
    going : sequence of torch.nn.Module
        Of the modules spliced after the window's last block, those that go with it.

    Returns
    -------
    Truth or None
        None where the model cannot be run without a batch, or does not give the same twice; a warning says so.
    """
    model = stack.model
    first, last = stack[window.start], stack[window.stop - 1]
    called: list[nn.Module] = []

    def replacement(state: Tensor) -> Tensor:
        for stays in spliced(last, AFTER):
            state = state if any(stays is module for module in going) else stays(state)
        return state

    def attach() -> list[RemovableHandle]:
        called.clear()
        return [
            first.register_forward_pre_hook(lambda block, _: called.append(block)),
            *bypass(first, last, replacement),
        ]

    what = f"Removals in this {type(model).__name__} are not held against the same blocks bypassed"
    truth = observe_hooked(model, attach, what, frames=6, runs=first)
    if truth is not None and not called:
        raise UnsupportedSurgery(
            f"Block {window.start} cannot go: a forward of {' and '.join(truth.given)} alone does not run it, so that "
            "nothing shows whether the model is right without it. Choose others.",
            "not-run",
        )
    return truth


def observe_hooked(
    model: nn.Module,
    attach: Callable[[], Iterable[RemovableHandle]],
    what: str,
    frames: int,
    runs: nn.Module | None = None,
) -> Truth | None:
    """Run the model with hooks that make it what it must become.

    Parameters
    ----------
    model : torch.nn.Module
    attach : callable
        Registers the hooks and gives their handles.
    what : str
        What the warning says where nothing can be held against the model.
    frames : int
        How many calls up from here the warning points at.
    runs : torch.nn.Module, optional
        A part of the model that is to be run, if it can be.

    Returns
    -------
    Truth or None
        None where the model cannot be run without a batch, or does not give the same twice; a warning says so.
    """
    with undisturbed(model):
        try:
            given = given_to_probe(model, runs)
            whole, again = logits_of_probe(model, given), logits_of_probe(model, given)
            reason = "" if same_logits(whole, again) else "it does not give the same twice"
        except NotRun as error:
            reason = f"it cannot be run without a batch ({error})"
        if reason:
            warnings.warn(f"{what}: {reason}.", stacklevel=frames + 1)
            return None
        cached = cache_fits(model, whole, given)
        as_called = not cached and not failure_as_called(model, given)
        handles = attach()
        try:
            return Truth(given, logits_of_probe(model, given), cached, as_called)
        finally:
            for handle in handles:
                handle.remove()


def shortfall(truth: Truth, model: nn.Module, than: str = "with them bypassed") -> str | None:
    """What a model does otherwise than it must, with a cache or without; None where it is right.

    Parameters
    ----------
    truth : Truth
    model : torch.nn.Module
        After the surgery.
    than : str
        What the truth is, in words.
    """
    with undisturbed(model):
        try:
            claim = logits_of_probe(model, truth.given)
        except NotRun as error:
            return f"the model fails ({error})"
        if not same_logits(claim, truth.logits):
            return f"the model gives other logits than {than}"
        if truth.cached and not cache_fits(model, claim, truth.given):
            return CACHE
        failure = failure_as_called(model, truth.given) if truth.runs else ""
        return f"the model fails where it keeps a state for the next token ({failure})" if failure else None


def gives(truth: Truth, model: nn.Module) -> bool:
    """Whether a model's full forward gives the truth."""
    with undisturbed(model):
        try:
            return same_logits(logits_of_probe(model, truth.given), truth.logits)
        except NotRun:
            return False


def given_to_probe(model: Any, runs: nn.Module | None = None) -> dict[str, Tensor]:
    """The first of the ways to call a model that it can be called in; the only one, where there is one, untried.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    runs : torch.nn.Module, optional
        A part of it, such as a block of its vision tower: the first way that runs it, if there is one.

    Raises
    ------
    NotRun
        If there is none, with what was said of the first.
    """
    ways = probe_inputs(model, inspect.signature(model.forward).parameters)
    first, second = next(ways), next(ways, None)
    if second is None:
        return first
    refusal: NotRun | None = None
    found: dict[str, Tensor] | None = None
    called: list[nn.Module] = []
    handle = None if runs is None else runs.register_forward_pre_hook(lambda module, _: called.append(module))
    try:
        for given in chain((first, second), ways):
            try:
                logits_of_probe(model, given)
            except NotRun as error:
                refusal = refusal or error
                called.clear()
                continue
            if called or runs is None:
                return given
            found = found or given
    finally:
        if handle is not None:
            handle.remove()
    if found is None:
        raise refusal or NotRun("nothing is known of what it takes")
    return found


def logits_of_probe(model: Any, given: dict[str, Tensor] | None = None) -> Tensor:
    """What a model says when it is called as it is probed, without a cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    given : dict, optional
        What to call it with; by default the first of the ways that it can be called in.
    """
    asked: dict[str, Any] = dict(given_to_probe(model) if given is None else given)
    if takes_use_cache(inspect.signature(model.forward).parameters):
        asked["use_cache"] = False
    answer = _answer(_run(model, asked))
    if not torch.isfinite(answer).all():
        raise NotRun("its answer is not finite")
    return answer


def failure_as_called(model: Any, given: dict[str, Tensor]) -> str:
    """What a model raises that is called as users call it, with a cache where it is usual; empty where nothing."""
    try:
        _run(model, dict(given))
    except NotRun as error:
        return str(error)
    return ""


def cache_fits(model: Any, whole: Tensor, given: dict[str, Tensor]) -> bool:
    """Whether the last tokens, decoded one by one, have the logits of the full forward."""
    decoded = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    name = next((n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters), None)
    if name is None or decoded not in given or whole.ndim < 3 or whole.shape[1] != TOKENS:
        return False
    ids, cache = given[decoded], None
    for end in range(TOKENS - _STEPS, TOKENS + 1):
        piece = ids[:, :end] if cache is None else ids[:, end - 1 : end]
        asked = {**given, decoded: piece, "use_cache": True, **({} if cache is None else {name: cache})}
        try:
            output = _run(model, asked)
        except NotRun:
            return False
        cache = getattr(output, name, None)
        if cache is None or not same_logits(_answer(output)[:, -1:], whole[:, end - 1 : end]):
            return False
    return True


class NotRun(Exception):
    """The model, not this file, could not do something."""


def _run(model: Any, given: dict[str, Any]) -> Any:
    """One forward. Only what the model raises is its own failure; a fault in the probing itself must show."""
    try:
        return model(**given)
    except Exception as error:
        raise NotRun(f"{type(error).__name__}: {error}") from error


def _answer(output: Any) -> Tensor:
    """The logits, of towers those of their pairs, or the last state of a model without a head."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        answer = getattr(output, name, None)
        if isinstance(answer, Tensor):
            return answer
    raise NotRun(f"it returns a {type(output).__name__} without logits")


def same_logits(a: Tensor, b: Tensor) -> bool:
    """Whether two answers are equal up to what their precision makes of the order of sums."""
    tolerance = _TOLERANCE.get(a.dtype, 1e-4)
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run without gradients, without dropout, unseen by hooks, and leave the random numbers as they were.

    So is what a forward changes in the model, see `preserve_forward_state`: BigBird replaces its attention modules for
    a short text.

    Hooks by which Transformers collects states stay: LLaVA's own forward works with what they collect.

    A forward that accelerate has wrapped for mixed precision is run as it was: what it answers is float32, and no more
    exact than bfloat16.
    """
    original: Any = model.__dict__.get("_original_forward")
    wrapped = None if original is None else model.__dict__.get("forward")
    stashed: list[tuple[dict[int, Any], dict[int, Any]]] = []
    ours: tuple[Callable[..., Any], ...] = (run_before, run_after)
    with (
        evaluation_mode(model),
        preserve_forward_state(model),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            if wrapped is not None:
                model.forward = original
            for module in model.modules():
                for hooks in (module._forward_hooks, module._forward_pre_hooks):
                    others = [key for key, hook in hooks.items() if hook not in ours and not captures(hook)]
                    if others:
                        stashed.append((hooks, dict(hooks)))
                    for key in others:
                        del hooks[key]
            yield
        finally:
            for hooks, content in stashed:
                hooks.clear()
                hooks.update(content)
            if wrapped is not None:
                model.forward = wrapped
