"""Assert that what is recorded at a site is what the model computes with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import Batch, UnsupportedSurgery, prepare_inputs
from streamline_hooks.modeling import find_stack
from streamline_hooks.recording import BLOCK_SITES, MODEL_SITES, HiddenStateRecorder, Intervention, Patch
from streamline_hooks.testing.compare import (
    assert_outputs_match,
    make_batches,
    output_tensor,
    padding_suffix,
    reproducible_eval,
)


def assert_recording_is_faithful(
    model: nn.Module,
    batch: Batch | Tensor | None = None,
    *,
    sites: Iterable[str] | None = None,
    blocks: Iterable[int] | None = None,
    tolerance: float | None = None,
    stack: str | None = None,
) -> None:
    """Assert that recorded tensors are those with which the model computes its output.

    Each site is recorded. Recording must not change the output. If the recorded tensors replace the model's own in all
    blocks, the output must stay the same; if those of one block are first exchanged among the rows and tokens, it must
    change. The first fails for a tensor that is read at the wrong place or time, the second for a tensor that the model
    does not use.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers model, or any model together with a batch.
    batch : mapping or torch.Tensor, optional
        Inputs of the model's forward. Default for a Transformers model: random tokens, with and without left padding.
    sites : iterable of str, optional
        Sites of `HiddenStateRecorder`. Default: all that the model has and that can be changed.
    blocks : iterable of int, optional
        Default: all blocks.
    tolerance : float, optional
        Allowed difference of the output relative to one plus its largest element. Default: that of the dtype, 0 on the
        CPU for float32.
    stack : str, optional
        Path of the block stack, see `find_stack`.

    Raises
    ------
    AssertionError
        If recording changes the output, replaying a recording does, or an exchanged recording does not. The message
        contains the site and the block.
    UnsupportedSurgery
        If one of `sites` cannot be recorded or changed.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> assert_recording_is_faithful(tiny_model("llama", blocks=2))
    """
    chosen = (*BLOCK_SITES, *MODEL_SITES) if sites is None else tuple(sites)
    indices = range(len(find_stack(model, stack))) if blocks is None else tuple(blocks)
    for inputs in make_batches(model, batch, left_padded=True):
        prepared = prepare_inputs(model, inputs)
        for site in chosen:
            try:
                with reproducible_eval(model):
                    _check_site(model, prepared, site, indices, tolerance, stack)
            except UnsupportedSurgery:
                if sites is not None:
                    raise


def _check_site(
    model: nn.Module,
    inputs: Mapping[str, Any],
    site: str,
    blocks: Iterable[int],
    tolerance: float | None,
    stack: str | None,
) -> None:
    def run() -> Tensor:
        return output_tensor(model(**inputs))

    expected = run()
    with HiddenStateRecorder(model, blocks, sites=[site], stack=stack) as record:
        output = run()
    _require_same(model, inputs, output, expected, f"recording {site}", "a hook changes the tensor", tolerance)
    recorded = dict(_recorded(record, site))
    with Intervention(model, {key: Patch(state) for key, state in recorded.items()}, stack=stack):
        output = run()
    cause = "the recorded tensor is not the one that the model computes with"
    _require_same(model, inputs, output, expected, f"replaying the recorded {site}", cause, tolerance)
    for key, state in recorded.items():
        exchanged = state.roll((1, 1), (0, 1))
        if not torch.equal(exchanged, state):
            with Intervention(model, {key: Patch(exchanged)}, stack=stack):
                output = run()
            if torch.equal(output, expected):
                name = site if isinstance(key, str) else f"{site} of block {key[1]}"
                raise AssertionError(
                    f"Exchanging the rows and tokens of {name}{padding_suffix(inputs)} does not change the output of "
                    f"{type(model).__name__}. Expected another output. Likely cause: the model does not use the tensor "
                    "that is recorded."
                )


def _recorded(record: HiddenStateRecorder, site: str) -> Iterator[tuple[Any, Tensor]]:
    """Yield the key of an intervention and the tensor of each place of a site."""
    states: Any = record[site]  # type: ignore[call-overload]
    by_key = {site: states} if site in MODEL_SITES else {(site, k): calls for k, calls in states.items()}
    for key, calls in by_key.items():
        if len(calls) != 1:
            raise UnsupportedSurgery(
                f"{site} is computed {len(calls)} times in a forward pass, so that a recording cannot be replayed. "
                "Expected once. Choose other sites or blocks."
            )
        yield key, calls[0]


def _require_same(
    model: nn.Module,
    inputs: Mapping[str, Any],
    output: Tensor,
    expected: Tensor,
    action: str,
    cause: str,
    tolerance: float | None,
) -> None:
    what = f"{action[0].upper()}{action[1:]} changes the output of {type(model).__name__}"
    assert_outputs_match(model, inputs, output, expected, what, cause, tolerance)
