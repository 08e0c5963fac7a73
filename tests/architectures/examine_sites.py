"""Read and change the standard sites of one architecture, and compare them with the blocks and the logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from streamline_hooks import HiddenStateRecorder, StreamlineError, find_stack
from streamline_hooks.core import prepare_inputs
from streamline_hooks.modeling import BlockSites, block_sites_in, observe_blocks
from streamline_hooks.recording import MODEL_SITES, Intervention, Scale
from streamline_hooks.testing import tiny_inputs

CONTRIBUTIONS = ("attention.output", "mlp.output")
READ_ONLY = "can be recorded but not changed"
WITH_NORMS = "with norms"
SITES = (*CONTRIBUTIONS, "attention.input", "mlp.input", "attention.heads", *MODEL_SITES)
TOLERANCE = 1e-5


def examine_sites(model: nn.Module) -> dict[str, str]:
    """Return, for each of `SITES`, "ok", the reason of its refusal, or "WRONG" with the failed check.

    A site of a block is ok if all blocks have it. The reason of a site that can be read in all blocks, but not changed
    in all, contains `READ_ONLY`. For blocks with a norm after each sum, the result of an ok contribution is
    `WITH_NORMS`.
    """
    inputs = prepare_inputs(model, tiny_inputs(model, tokens=12))
    if fault_of(model, SITES, inputs) == "":
        results = dict.fromkeys(SITES, "ok")
    else:
        results = {site: fault_of(model, (site,), inputs) or "ok" for site in SITES}
    with observe_blocks(find_stack(model), [0], inputs) as calls:
        block = block_sites_in(calls[0])
    if isinstance(block, BlockSites) and block.post_norm:
        results |= {site: WITH_NORMS for site in CONTRIBUTIONS if results[site] == "ok"}
    return results


@torch.no_grad()
def fault_of(model: nn.Module, sites: tuple[str, ...], inputs: dict[str, Any]) -> str:
    """Return why the sites cannot be read, or the check that fails, or an empty string.

    Each site is recorded once in each forward pass. The contributions sum to the output of each block. An intervention
    that scales the sites by one does not change the logits.
    """
    names = ["block.input", *CONTRIBUTIONS, "block.output"] if set(CONTRIBUTIONS) & set(sites) else []
    try:
        with HiddenStateRecorder(model, sites=[*sites, *names]) as record:
            expected = model(**inputs)[0]
        edits = {
            key: Scale(1.0)
            for site in sites
            for key in ([site] if site in MODEL_SITES else [(site, k) for k in range(len(find_stack(model)))])
        }
        with Intervention(model, edits):
            changed = model(**inputs)[0]
    except StreamlineError as error:
        return str(error)
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"[:200]
    states = cast("Any", record)
    visits = [v for s in sites for v in ([states[s]] if s in MODEL_SITES else states[s].values())]
    if not all(len(calls) == 1 and bool(torch.isfinite(calls[0]).all()) for calls in visits):
        return "WRONG: not recorded once"
    for k in record.blocks if names else ():
        before, attention, mlp, after = (states[name][k][0] for name in names)
        if float((before + attention + mlp - after).abs().max()) > TOLERANCE * float(after.abs().max()):
            return f"WRONG: the contributions of block {k} do not sum to its output"
    return "" if torch.equal(changed, expected) else "WRONG: scaled by one, the logits change"
