"""Turn the states of a batch into the rows that an `ActivationStore` stores, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from streamline_hooks.core import StreamlineError, suggest
from streamline_hooks.modeling import all_finite
from streamline_hooks.recording.recorder import RecordedBatch
from streamline_hooks.recording.sites import BLOCK_SITES, BlockSite
from streamline_hooks.recording.token_columns import TOKEN_COLUMNS

# Of stored and repeated states, relative to the norm, as the median over tokens: rounding in bfloat16 can change the
# experts of a few tokens, and thereby these tokens by much more.
MAX_DIFFERENCE = 0.05


def sorted_block_sites(sites: Sequence[str]) -> list[BlockSite]:
    """Return the sites in alphabetical order; raise if one is unknown."""
    for site in sites:
        if site not in BLOCK_SITES:
            raise StreamlineError(
                f"sites: {site!r} is unknown. Expected one of {', '.join(BLOCK_SITES)}. "
                f"{suggest(site, BLOCK_SITES, 'Store other states with append().')}"
            )
    if not sites:
        raise StreamlineError(f"sites is empty. Expected at least one of {', '.join(BLOCK_SITES)}. Name a site.")
    return sorted({site for site in BLOCK_SITES if site in sites})


def recorded_rows(batch: RecordedBatch, columns: Mapping[str, Tensor], sites: Sequence[BlockSite]) -> dict[str, Tensor]:
    """Return the columns of the real tokens of a batch; raise if the model read another mask than the batch's."""
    mask = columns["mask"]
    if not torch.equal(batch.real.cpu(), mask):
        raise StreamlineError(
            f"The model read a mask of real tokens of shape {tuple(batch.real.shape)} that differs from the batch's, "
            f"of shape {tuple(mask.shape)}. Expected attention_mask with one entry per token. Compute the states "
            "yourself and use append()."
        )
    values = {**_states(batch, sites), **columns}
    return {name: _select(value, mask) for name, value in values.items() if name != "mask"}


def _states(batch: RecordedBatch, sites: Sequence[BlockSite]) -> dict[str, Tensor]:
    """Return the recorded states of a batch by column, (batch, tokens, features)."""
    read = {"block.input": batch.entering, "block.output": batch.leaving}
    return {
        f"{site}.{k}": read[site](k) if site in read else batch.record[site][k][0].flatten(2)
        for site in sites
        for k in batch.record.blocks
    }


def _select(values: Tensor, mask: Tensor) -> Tensor:
    """Return the rows of real tokens."""
    return values.flatten(0, 1) if bool(mask.all()) else values[mask]


def appended_rows(
    states: Mapping[str, Tensor], tokens: Tensor, positions: Tensor, document_ids: Tensor, mask: Tensor | None
) -> dict[str, Tensor]:
    """Return the columns of the real tokens of a batch given to `ActivationStore.append`, as copies on the CPU."""
    shape = tokens.shape
    if document_ids.shape == shape[:1] and len(shape) == 2:
        document_ids = document_ids[:, None].expand(shape)
    integers = {"tokens": tokens, "positions": positions, "document_ids": document_ids}
    for name, value in integers.items():
        is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if value.shape != shape or len(shape) not in (1, 2) or not is_integer:
            raise StreamlineError(
                f"append: {name} is a {value.dtype} tensor of shape {tuple(value.shape)}. Expected integers of "
                f"shape (batch, tokens) or (tokens,), the same for all, here {tuple(shape)}. Pass such a tensor."
            )
    for name, state in states.items():
        if name in TOKEN_COLUMNS or not state.is_floating_point() or state.shape[:-1] != shape:
            raise StreamlineError(
                f"append: states[{name!r}] is a {state.dtype} tensor of shape {tuple(state.shape)}. Expected a "
                f"floating-point tensor of shape {(*shape, 'features')} under a name other than "
                f"{', '.join(TOKEN_COLUMNS)}. Pass one state per token."
            )
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise StreamlineError(
            f"append: mask is a {mask.dtype} tensor of shape {tuple(mask.shape)}. Expected a boolean tensor of "
            f"shape {tuple(shape)}, False for padding. Pass attention_mask.bool()."
        )
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu()
    columns = {**states, **{name: value.long() for name, value in integers.items()}}
    rows = {name: value.detach().to("cpu", copy=True)[mask] for name, value in columns.items()}
    for name in states:
        if not all_finite([rows[name]]):
            raise StreamlineError(
                f"append: states[{name!r}] contains NaN or infinite values. Expected finite states of real tokens. "
                "Check the model's weights and inputs, or exclude the tokens by mask."
            )
    return rows


def require_same_states(computed: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path) -> None:
    """Raise unless the states of computed and stored rows are equal up to rounding."""
    for name, value in computed.items():
        if name in TOKEN_COLUMNS:
            continue
        norm = stored[name].float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        difference = ((value.float() - stored[name].float()).norm(dim=-1) / norm).median()
        if not bool(difference <= MAX_DIFFERENCE):
            raise StreamlineError(
                f"{folder} contains other states of the first batch: those of {name} differ by "
                f"{float(difference):.0%} of their norm (median of the tokens). Expected at most "
                f"{MAX_DIFFERENCE:.0%}, which rounding does not reach. Use the same hooks and interventions as "
                "when the folder was written, or choose another folder."
            )
