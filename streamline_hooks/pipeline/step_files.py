"""Save the results of the steps of a compression to files, for resuming an interrupted run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from streamline_hooks.core import read_file, write_file
from streamline_hooks.modeling import BlockStack
from streamline_hooks.repair import BranchLinear, FoldedMap, Repair, ReplacementConfig, ScaleFactor, WindowReplacement
from streamline_hooks.selection import Selection, VerifiedSelection
from streamline_hooks.surgery import match_block

_NUMBERS = ("removal_error", "repaired_error", "ridge")
_FACTOR, _MAP = "factor", "map"
_BRANCH_VALUES = ("block", "branch", "is_first", "ridge", "held_out_error", "removal_error")


def write_verified(verified: list[VerifiedSelection], file: Path) -> None:
    """Write verified selections and the weights of their replacements."""
    tensors: dict[str, Tensor] = {}
    rows = []
    for k, selection in enumerate(verified):
        repairs = []
        for number, repair in enumerate(selection.repairs):
            module = repair.replacement_module
            if isinstance(module, nn.Module):
                tensors |= {f"{k}.{number}.{name}": value.cpu() for name, value in module.state_dict().items()}
            numbers = {name: getattr(repair, name) for name in _NUMBERS}
            if isinstance(module, FoldedMap):
                tensors[f"{k}.{number}.{_MAP}"] = module.map.cpu()
            elif isinstance(module, ScaleFactor):
                numbers[_FACTOR] = module.factor
            repairs.append(numbers)
        distance = selection.distance if math.isfinite(selection.distance) else None
        maps = [{name: getattr(branch, name) for name in _BRANCH_VALUES} for branch in selection.maps]
        tensors |= {f"{k}.{_MAP}.{number}": branch.map.cpu() for number, branch in enumerate(selection.maps)}
        content = {**_selection_values(selection), "distance": distance, "refused": selection.refused}
        rows.append({**content, "repairs": repairs, "maps": maps})
    # Selections share replacements, but no two tensors of a safetensors file may share memory.
    write_file(file, {name: value.clone() for name, value in tensors.items()}, {"verified": rows})


def read_verified(stack: BlockStack, kind: ReplacementConfig, file: Path) -> list[VerifiedSelection]:
    """Read the selections of `write_verified`."""
    tensors, values = read_file(file, "verified selections")
    return [_selection(stack, kind, row, f"{k}.", tensors) for k, row in enumerate(values["verified"])]


def _selection(
    stack: BlockStack, kind: ReplacementConfig, row: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]
) -> VerifiedSelection:
    plain = _plain_selection(row)
    windows = plain.windows
    repairs = []
    for number, numbers in enumerate(row["repairs"]):
        window, start = windows[number], f"{prefix}{number}."
        removal_error, repaired_error, ridge = (numbers[name] for name in _NUMBERS)
        module = _build(stack, kind, window)
        if isinstance(module, nn.Module):
            module.load_state_dict({n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)})
        elif _FACTOR in numbers:
            module = ScaleFactor(window, numbers[_FACTOR], repaired_error, removal_error)
        elif start + _MAP in tensors:
            module = FoldedMap(window, tensors[start + _MAP], ridge, repaired_error, removal_error)
        repairs.append(Repair(window, module, removal_error, repaired_error, ridge))
    distance = math.inf if row["distance"] is None else row["distance"]
    maps = tuple(
        BranchLinear(**values, map=tensors[f"{prefix}{_MAP}.{number}"]) for number, values in enumerate(row["maps"])
    )
    values = windows, plain.zeroed, plain.score
    return VerifiedSelection(*values, repairs=tuple(repairs), maps=maps, distance=distance, refused=row["refused"])


def write_selections(selections: list[Selection], file: Path) -> None:
    """Write the selections of a search."""
    write_file(file, {}, {"selections": [_selection_values(selection) for selection in selections]})


def read_selections(file: Path) -> list[Selection]:
    """Read what `write_selections` wrote."""
    return [_plain_selection(row) for row in read_file(file, "selections")[1]["selections"]]


def _selection_values(selection: Selection) -> dict[str, Any]:
    windows = [[window.start, window.stop] for window in selection.windows]
    zeroed = [list(branch) for branch in selection.zeroed]
    return {"windows": windows, "silenced": zeroed, "score": selection.score}


def _plain_selection(row: Mapping[str, Any]) -> Selection:
    windows, zeroed = (range(*window) for window in row["windows"]), ((k, branch) for k, branch in row["silenced"])
    return Selection(tuple(windows), tuple(zeroed), row["score"])


def write_perplexities(values: dict[str, float], file: Path) -> None:
    """Write perplexities by name."""
    write_file(file, {}, values)


def read_perplexities(file: Path) -> dict[str, float]:
    """Read the perplexities of `write_perplexities`."""
    return {name: float(value) for name, value in read_file(file, "perplexities")[1].items()}


def _build(stack: BlockStack, kind: ReplacementConfig, window: range) -> WindowReplacement:
    """Build a replacement, whose weights are loaded afterwards."""
    module = kind.build(stack, window)
    if isinstance(module, nn.Module):
        match_block(module, stack[window.start])
    return module
