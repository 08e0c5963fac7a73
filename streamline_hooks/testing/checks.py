"""Run all assertions on one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from streamline_hooks.core import StreamlineError, UnsupportedSurgery, describe_blocks
from streamline_hooks.modeling import find_stack
from streamline_hooks.testing.cached_generation import assert_cached_generation_matches
from streamline_hooks.testing.causality import assert_causal
from streamline_hooks.testing.checkpoint_round_trip import assert_checkpoint_round_trip
from streamline_hooks.testing.faithful_recording import assert_recording_is_faithful
from streamline_hooks.testing.restoration import assert_restores, removal_error
from streamline_hooks.testing.shapes import assert_shapes
from streamline_hooks.testing.surgery_assertions import (
    assert_identity_preserves_output,
    assert_removal_equals_shorter_model,
)

Verdict = Literal["ok", "refused", "FAILED"]


@dataclass(frozen=True)
class Check:
    """Result of an assertion: `name`, `verdict`, `seconds`, and the reason in `text`.

    The verdict "refused" means that the library reports why a block cannot be removed. It is not a failure.
    """

    name: str
    verdict: Verdict
    seconds: float
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def run_checks(
    model: nn.Module, windows: Sequence[range] | None = None, *, stack: str | None = None
) -> Iterator[Check]:
    """Run every assertion on a causal language model.

    The model runs in the dtype of its parameters. Half precision hides faults that float32 reveals, except in the check
    of later tokens and other rows. Pass ``model.float()`` for the most precise comparison.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers model. It is restored after each check.
    windows : sequence of range, optional
        Windows to remove. Default: the first block, one and three blocks in the middle, and the last block.
    stack : str, optional
        Path of the block stack, see `find_stack`.

    Yields
    ------
    Check
        The result of each assertion as soon as it is finished.

    Raises
    ------
    StreamlineError
        If the model has no block stack, or a window is out of range.

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
    ok recorded activations are those of the forward
    ok without blocks 1 to 2 it equals the shorter model
    ok a checkpoint gives the same model
    """
    length = len(find_stack(model, stack))
    chosen_windows = _default_windows(length) if windows is None else list(windows)
    for window in chosen_windows:
        if not (0 <= window.start < window.stop <= length) or window.step != 1 or len(window) == length:
            raise StreamlineError(
                f"The window {window.start}:{window.stop} cannot be removed from {length} blocks. Expected 0 <= START "
                f"< STOP <= {length}, and at least one remaining block. Choose another window."
            )
    checks: list[tuple[str, Callable[[], None]]] = [
        ("shapes of states, logits and texts", lambda: assert_shapes(model, stack=stack)),
        ("later tokens and other rows change nothing", lambda: assert_causal(model, stack=stack)),
        ("cached decoding equals the forward", lambda: assert_cached_generation_matches(model, stack=stack)),
        ("identities change nothing", lambda: assert_identity_preserves_output(model, stack=stack)),
        ("surgery leaves no trace", lambda: assert_restores(model, stack=stack)),
        (
            "recorded activations are those of the forward",
            lambda: assert_recording_is_faithful(model, blocks={0, length // 2, length - 1}, stack=stack),
        ),
    ]
    for window in chosen_windows:
        checks.append(
            (
                f"without {describe_blocks(window)} it equals the shorter model",
                partial(_check_removal, model, window, stack),
            )
        )
    checks.append(("a checkpoint gives the same model", lambda: assert_checkpoint_round_trip(model)))
    for name, assertion in checks:
        yield _run(name, assertion)


def _check_removal(model: nn.Module, window: range, stack: str | None) -> None:
    error, known = removal_error(model, window, stack)
    if error is not None and known:
        raise error  # nothing to compare
    assert_removal_equals_shorter_model(model, window, stack=stack)
    if error is not None:  # the removal is correct, but something else is not, such as the cache
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
    except Exception as error:
        verdict, text = "FAILED", f"{type(error).__name__}: {error}"
    return Check(name, verdict, time.perf_counter() - started, text)


def _default_windows(length: int) -> list[range]:
    """Return the first, the middle, three middle and the last block, as far as the stack has them."""
    middle = length // 2
    candidates = [range(1), range(middle, middle + 1), range(middle - 1, middle + 2), range(length - 1, length)]
    windows = [w for w in candidates if w.start >= 0 and w.stop <= length and len(w) < length]
    return list(dict.fromkeys(windows))
