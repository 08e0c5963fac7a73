"""Read and change the standard sites of one architecture, and compare them with the blocks and the logits."""

from __future__ import annotations

import torch
from torch import nn

from streamline_hooks import HiddenStateRecorder, UnsupportedSurgery
from streamline_hooks.modeling import find_stack
from streamline_hooks.recording import Intervention, Scale
from streamline_hooks.testing import tiny_inputs

BRANCH_SITES = ("attention.input", "attention.output", "mlp.input", "mlp.output")
SITES = (*BRANCH_SITES, "attention.heads", "embeddings", "final_norm", "logits")
TOLERANCE = 1e-5


def examine_sites(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Return, for each of `SITES`, "ok", "refused" or "WRONG", and the reasons of the refusals.

    A site of a block is ok if all blocks have it. The contributions must sum to the output of each block, and an
    intervention that scales the site by one must not change the logits.
    """
    batch = tiny_inputs(model, tokens=12)
    results, reasons = dict[str, str](), dict[str, str]()
    for site in SITES:
        try:
            results[site] = "ok" if is_faithful(model, site, batch) else "WRONG"
        except UnsupportedSurgery as error:
            results[site], reasons[site] = "refused", str(error)
        except Exception as error:
            results[site], reasons[site] = "WRONG", f"{type(error).__name__}: {error}"[:200]
    return results, reasons


@torch.no_grad()
def is_faithful(model: nn.Module, site: str, batch: dict[str, torch.Tensor]) -> bool:
    """Whether a site is recorded in each forward pass, sums to the output, and can be scaled by one."""
    is_contribution = site in ("attention.output", "mlp.output")
    sums = ["block.input", "attention.output", "mlp.output", "block.output"] if is_contribution else []
    with HiddenStateRecorder(model, sites=[site, *sums]) as record:
        expected = model(**batch)[0]
    visits = [record[site]] if site in ("embeddings", "final_norm", "logits") else list(record[site].values())  # type: ignore[call-overload]
    if not all(len(states) == 1 and torch.isfinite(states[0]).all() for states in visits):
        return False
    for k in record.blocks if sums else ():
        before, attention, mlp, after = (record[name][k][0] for name in sums)  # type: ignore[call-overload]
        if float((before + attention + mlp - after).abs().max()) > TOLERANCE * float(after.abs().max()):
            return False
    keys = (
        [site] if site in ("embeddings", "final_norm", "logits") else [(site, k) for k in range(len(find_stack(model)))]
    )
    try:
        with Intervention(model, dict.fromkeys(keys, Scale(1.0))):
            return torch.equal(model(**batch)[0], expected)
    except UnsupportedSurgery:  # a contribution that is only read; the row is about reading
        return True
