"""Run all assertions on one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.stack import find_stack
from streamline_hooks.testing.assertions import (
    assert_cached_generation_matches,
    assert_causal,
    assert_checkpoint_round_trip,
    assert_identity_preserves_output,
    assert_removal_equals_shorter_model,
    assert_restores,
    assert_shapes,
)
from streamline_hooks.testing.assertions.restoration import refusal

Verdict = Literal["ok", "refused", "FAILED"]


@dataclass(frozen=True)
class Check:
    """The result of one assertion: `name`, `verdict`, `seconds`, and the reason in `text`.

    "refused" means that the library names the reason why a block cannot be removed; that is no failure.
    """

    name: str
    verdict: Verdict
    seconds: float
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def run_checks(
    model: nn.Module, windows: Sequence[range] | None = None, *, stack: str | None = None
) -> Iterator[Check]:
    """Hold a causal language model against everything that surgery, caches and checkpoints must keep.

    It is run in the precision that its parameters are in, and nothing is converted. Half precision hides faults that
    float32 shows, except in the check for later tokens and other rows: give ``model.float()`` for the finest look.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers model, which is given back as it was.
    windows : sequence of range, optional
        The blocks whose removal is tried; by default the first, one and three in the middle, and the last.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Yields
    ------
    Check
        As soon as it is known.

    Raises
    ------
    StreamlineError
        If the model's stack of blocks is not found, or a window is not in it.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> for check in run_checks(tiny_model("llama", blocks=4), [range(1, 3)]):
    ...     print(check.verdict, check.name)
    ok shapes of states, logits and texts
    ok later tokens and other rows change nothing
    ok cached decoding equals the forward
    ok identities change nothing
    ok surgery leaves no trace
    ok without blocks 1 to 2 it equals the shorter model
    ok a checkpoint gives the same model
    """
    length = len(find_stack(model, stack))
    chosen = _usual(length) if windows is None else list(windows)
    for window in chosen:
        if not (0 <= window.start < window.stop <= length) or window.step != 1 or len(window) == length:
            raise StreamlineError(
                f"The window {window.start}:{window.stop} cannot be taken out of {length} blocks; give START:STOP with "
                f"0 <= START < STOP <= {length}, and not all of them."
            )
    named: list[tuple[str, Callable[[], None]]] = [
        ("shapes of states, logits and texts", lambda: assert_shapes(model, stack=stack)),
        ("later tokens and other rows change nothing", lambda: assert_causal(model, stack=stack)),
        ("cached decoding equals the forward", lambda: assert_cached_generation_matches(model, stack=stack)),
        ("identities change nothing", lambda: assert_identity_preserves_output(model, stack=stack)),
        ("surgery leaves no trace", lambda: assert_restores(model, stack=stack)),
    ]
    for window in chosen:
        blocks = f"block {window.start}" if len(window) == 1 else f"blocks {window.start} to {window.stop - 1}"
        named.append((f"without {blocks} it equals the shorter model", partial(_removed, model, window, stack)))
    named.append(("a checkpoint gives the same model", lambda: assert_checkpoint_round_trip(model)))
    for name, assertion in named:
        yield _run(name, assertion)


def _removed(model: nn.Module, window: range, stack: str | None) -> None:
    error, known = refusal(model, window, stack)
    if error is not None and known:
        raise error  # there is nothing to compare
    assert_removal_equals_shorter_model(model, window, stack=stack)
    if error is not None:  # the removal is right, but something else of the model, its cache say, does not follow it
        raise error


def _run(name: str, assertion: Callable[[], None]) -> Check:
    started = time.perf_counter()
    verdict: Verdict = "ok"
    text = ""
    try:
        with torch.random.fork_rng(devices=[]):
            assertion()
    except UnsupportedSurgery as error:
        verdict, text = "refused", str(error)
    except AssertionError as error:
        verdict, text = "FAILED", str(error)
    except Exception as error:  # what a model raises on its own is a finding about it
        verdict, text = "FAILED", f"{type(error).__name__}: {error}"
    return Check(name, verdict, time.perf_counter() - started, text)


def _usual(length: int) -> list[range]:
    """The first, one and three in the middle, the last: without those that a short stack has not."""
    middle = length // 2
    candidates = [range(1), range(middle, middle + 1), range(middle - 1, middle + 2), range(length - 1, length)]
    fitting = [w for w in candidates if w.start >= 0 and w.stop <= length and len(w) < length]
    return list(dict.fromkeys(fitting))
