"""The file of golden facts, one fact a line, and the comparison of new facts with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("golden.json")
METRIC, WEIGHT = 1e-6, 1e-5  # relative tolerances
ZERO = 5e-7  # metrics closer than this are equal: a KL is a difference of float32 numbers around 1
COUNTED = 1e-3  # the same for a metric of counts, which one value at a limit between two of them changes
MARGIN = 1e-4  # the least relative distance of a selection to its runner-up

Facts = dict[str, Any]
"""By name: a str or int is compared exactly, a float is a metric, and a list is a weight tensor: its shape, its norm,
and its products with random vectors relative to the norm. A name that ends in ``margin`` is the relative distance of a
selection to the runner-up; one that begins with ``counted`` is of counts."""


def read(file: Path = FILE) -> dict[str, Facts]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(runs: Mapping[str, Facts], file: Path = FILE) -> None:
    """Write all runs, one fact a line, in order."""
    parts = []
    for name in sorted(runs):
        facts = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(runs[name].items()))
        parts.append(f" {json.dumps(name)}: {{\n{facts}\n }}")
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Return a fact as it is stored: floats with ten digits, infinite ones as words."""
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else str(value)
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def differences(run: str, stored: Facts, new: Facts, metric: float = METRIC, weight: float = WEIGHT) -> Iterator[str]:
    """Yield a line for each fact that is missing, unknown, or differs by more than its relative tolerance."""
    for name in sorted(stored.keys() | new.keys()):
        if name not in new:
            yield f"{run}: {name}: stored {stored[name]!r}, new: missing"
        elif name not in stored:
            yield f"{run}: {name}: stored: missing, new {new[name]!r}"
        elif apart := _apart(name, stored[name], new[name], metric, weight):
            yield f"{run}: {name}: stored {stored[name]!r}, new {new[name]!r} ({apart})"


def narrow_margins(facts: Facts) -> list[str]:
    """Return the names of the selections whose runner-up is too close for the selection to be compared exactly."""
    return [name for name, value in facts.items() if name.endswith("margin") and not _is_wide(value)]


def _is_wide(margin: float | str) -> bool:
    return float(margin) >= MARGIN


def _apart(name: str, stored: Any, new: Any, metric: float, weight: float) -> str:
    """Say how two values differ; empty where they are equal within the tolerance."""
    if isinstance(stored, list) and isinstance(new, list):
        return _weights_apart(stored, new, weight)
    if isinstance(stored, float) and isinstance(new, float):
        if name.startswith("counted"):
            is_near = name.endswith("margin") or abs(stored - new) <= COUNTED
            return "" if is_near else f"they may differ by {COUNTED:.0e}"
        if name.endswith("margin"):  # a difference of two metrics, relative to one of them
            limit = max(4 * metric, MARGIN / 4)  # small KLs differ by 1e-7 between processors
            return "" if abs(stored - new) <= limit else f"they may differ by {limit:.0e}"
        relative = abs(stored - new) / max(abs(stored), abs(new), ZERO)
        is_near = relative <= metric or abs(stored - new) <= ZERO
        return "" if is_near else f"relative difference {relative:.1e}, tolerance {metric:.0e}"
    return "" if type(stored) is type(new) and stored == new else "compared exactly"


def _weights_apart(stored: list[Any], new: list[Any], tolerance: float) -> str:
    (shape, norm, *products), (new_shape, new_norm, *new_products) = stored, new
    if shape != new_shape:
        return "the shape differs"
    scale = max(norm, new_norm)
    worst = max(abs(norm - new_norm) / scale if scale else 0.0, *map(abs, _minus(products, new_products)))
    return "" if worst <= tolerance else f"relative difference {worst:.1e}, tolerance {tolerance:.0e}"


def _minus(one: list[float], other: list[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]
