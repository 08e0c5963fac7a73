"""The sections that tell of an evaluation: perplexity, accuracy, agreement, generations, speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from streamline_hooks.report.parts import Column, Part, SideBySide, Table
from streamline_hooks.report.row_figures import accuracy, perplexity, speed
from streamline_hooks.report.values import DASH, SPACE, finite, number, percent, ratio, whole

_PHASES = {"prefill": "first token", "decode": "further token"}


def perplexity_parts(evaluation: Mapping[str, Any]) -> list[Part]:
    """Perplexity by domain."""
    own, other = _both(evaluation, "perplexity")
    if not own:
        return []
    compared = bool(other)
    columns = [Column("domain", text=True), Column("tokens")]
    columns += [Column("original")] * compared + [Column("this model")] + [Column(f"×{SPACE}original")] * compared
    columns += [Column("bits a byte, original")] * compared + [Column("bits a byte")]
    rows = []
    for name, one in own.items():
        before = other.get(name) or {}
        value, bits = number(one.get("value")), number(one.get("bits_per_byte"), 3)
        rows.append(
            [
                name, whole(one.get("tokens")), number(before.get("value")), value,
                number(ratio(one.get("value"), before.get("value"))), number(before.get("bits_per_byte"), 3), bits,
            ]
            if compared
            else [name, whole(one.get("tokens")), value, bits]
        )  # fmt: skip
    return _with(perplexity(evaluation), Table("Perplexity by domain", columns, rows))


def accuracy_parts(evaluation: Mapping[str, Any]) -> list[Part]:
    """Accuracy by task, and what is left of it."""
    own, other = _both(evaluation, "accuracy")
    parts: list[Part] = []
    if own:
        compared = bool(other)
        columns = [Column("task", text=True), Column("measure", text=True), Column("questions")]
        columns += [Column("chance (%)")] + [Column("original (%)")] * compared + [Column("this model (%)")]
        rows = []
        for name, one in own.items():
            before = [_with_error(other.get(name) or {})] if compared else []
            rows.append(
                [
                    name, str(one.get("metric") or "accuracy"), whole(one.get("items")), percent(one.get("chance")),
                    *before, _with_error(one),
                ]
            )  # fmt: skip
        title = "Accuracy by task, ± one standard error"
        parts += _with(accuracy(evaluation), Table(title, columns, rows))
    return [*parts, *_retained(evaluation), *_stability(evaluation), *_harness(evaluation)]


def _retained(evaluation: Mapping[str, Any]) -> list[Part]:
    """What is left of the accuracy, and which tasks do not count."""
    rows, without = [], []
    for name, said in (evaluation.get("retained") or {}).items():
        shares = [_interval(said.get(key) or {}) for key in ("ratio", "above_chance")]
        if any(share != DASH for share in shares):
            rows.append([name, *shares])
            without += [f"{task}, {reason}" for task, reason in (said.get("left_out") or {}).items()]
    if not rows:
        return []
    columns = [Column("tasks", text=True), Column("of the accuracy (%)"), Column("of that above chance (%)")]
    note = f"Left out of what is above chance: {'; '.join(without)}." if without else ""
    return [Table("What is left of the original's accuracy, with its interval", columns, rows, note=note)]


def _stability(evaluation: Mapping[str, Any]) -> list[Part]:
    """Whether both models are right and wrong about the same questions."""
    rows = [
        [name, percent(said.get("value")), percent(said.get("share"))]
        for name, said in (evaluation.get("stability") or {}).items()
    ]
    columns = [Column("task", text=True), Column("weighted (%)"), Column("equal weights (%)")]
    note = "Questions that both models answer right, or both wrong; weighted by how sure the original is of them."
    return [Table("Stability", columns, rows, note=note)] if rows else []


def _harness(evaluation: Mapping[str, Any]) -> list[Part]:
    """What lm-eval measured."""
    known = evaluation.get("harness") or {}
    own, other = known.get("tasks") or {}, (evaluation.get("harness_original") or {}).get("tasks") or {}
    rows = []
    for task, metrics in own.items():
        about = [str((known.get(name) or {}).get(task, "")) for name in ("items", "few_shot", "task_versions")]
        for metric, said in metrics.items():
            before = [_measured((other.get(task) or {}).get(metric) or {})] if other else []
            rows.append([task, metric, *before, _measured(said), *about])
    columns = [Column("task", text=True), Column("metric", text=True), *([Column("original")] if other else [])]
    columns += [Column("this model"), Column("items"), Column("few-shot"), Column("version")]
    return [Table("lm-eval, ± one standard error", columns, rows)] if rows else []


def _measured(said: Mapping[str, Any]) -> str:
    error = finite(said.get("standard_error"))
    return number(said.get("value"), 4) + ("" if error is None else f" ± {number(error, 4)}")


def agreement_parts(evaluation: Mapping[str, Any]) -> list[Part]:
    """How far the next-token distributions are those of the original."""
    said = evaluation.get("agreement") or {}
    rows = [["KL, mean (nats a token)", number(said["kl"], 4)]] if "kl" in said else []
    for quantile, value in (said.get("quantiles") or {}).items():
        rows.append([f"KL, {100 * float(quantile):g} % of the tokens are below (nats)", number(value, 4)])
    by_domain = said.get("kl_by_domain") or {}
    rows += [[f"KL, {name} (nats a token)", number(value, 4)] for name, value in by_domain.items()]
    if "top1" in said:
        rows.append(["same first choice (% of tokens)", percent(said["top1"])])
    if finite(said.get("match_length")) is not None:
        rows.append(["tokens written alike before the first difference", number(said["match_length"], 1)])
    return [Table("Agreement with the original", [Column("", text=True), Column("")], rows)] if rows else []


_WRITING: dict[str, tuple[str, Callable[[Any], str]]] = {
    "repetition": ("repeated runs of four tokens (%)", percent),
    "length": ("length (tokens)", lambda value: number(value, 1)),
    "ended": ("came to an end (%)", percent),
}


def writing_parts(evaluation: Mapping[str, Any]) -> list[Part]:
    """What the models write, side by side."""
    own, other = _both(evaluation, "writing")
    parts: list[Part] = []
    if own:
        rows = []
        for key, value in own.items():
            name, say = _WRITING.get(key, (key.replace("_", " "), number))
            rows.append([name, *([say(other.get(key))] if other else []), say(value)])
        columns = [Column("", text=True), *([Column("original")] if other else []), Column("this model")]
        parts.append(Table("How they write", columns, rows))
    others = {one["prompt"]: one["text"] for one in (evaluation.get("original") or {}).get("samples") or ()}
    for sample in evaluation.get("samples") or ():
        reference = sample.get("reference")
        reference = others.get(sample["prompt"]) if reference is None else reference
        written = [("original", reference)] if reference is not None else []
        parts.append(SideBySide(sample["prompt"], [*written, ("this model", sample["text"])]))
    return parts


def speed_parts(evaluation: Mapping[str, Any]) -> list[Part]:
    """How fast they are."""
    said = evaluation.get("speed") or {}
    timings = said.get("timings") or {}
    rows = []
    for name, timing in timings.items():
        for phase, words in _PHASES.items():
            if timing.get(phase):
                memory = number(ratio(timing.get("peak_memory"), 1e6), 1)
                rows.append([f"{name}, {words}", *_timed(said, name, phase, timing[phase]), memory])
    if not rows:
        return []
    columns = [
        Column("model", text=True), Column("time (ms)"), Column("quartiles (ms)"), Column("tokens/s"),
        Column(f"×{SPACE}first"), Column("quartiles (×)"), Column("peak memory (MB)"),
    ]  # fmt: skip
    first = next(iter(timings.values()))
    rounds = len(first.get("prefill") or ())
    conditions = [
        f"{whole(said.get('batch'))} × {whole(said.get('tokens'))} tokens and {whole(said.get('new_tokens'))} more",
        f"median of {rounds} rounds in turn", str(first.get("dtype") or ""), str(first.get("device") or ""),
        f"{whole(said.get('threads'))} threads", str(said.get("machine") or ""),
    ]  # fmt: skip
    return _with(speed(evaluation), Table("Speed", columns, rows, note=", ".join(c for c in conditions if c) + "."))


def _timed(said: Mapping[str, Any], name: str, phase: str, times: Sequence[Any]) -> list[str]:
    """The cells of a model's phase."""
    known = [seconds for seconds in map(finite, times) if seconds is not None]
    low, median, high = np.percentile(known, [25, 50, 75]).tolist() if known else (None, None, None)
    at_once = (finite(said.get("batch")) or 1) * ((finite(said.get("tokens")) or 1) if phase == "prefill" else 1)
    spread = ((said.get("ratios") or {}).get(name) or {}).get(phase) or {}
    return [
        number(ratio(median, 1e-3), 1),
        f"{number(ratio(low, 1e-3), 1)} to {number(ratio(high, 1e-3), 1)}",
        number(ratio(at_once, median), 1),
        number(spread.get("median"), 3),
        f"{number(spread.get('low'), 3)} to {number(spread.get('high'), 3)}",
    ]


def _both(evaluation: Mapping[str, Any], section: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """A section, and that of the original."""
    return evaluation.get(section) or {}, (evaluation.get("original") or {}).get(section) or {}


def _with(figure: Part | None, table: Table) -> list[Part]:
    return [table] if figure is None else [figure, table]


def _with_error(said: Mapping[str, Any]) -> str:
    error = finite(said.get("standard_error"))
    return percent(said.get("value")) + ("" if error is None else f" ± {percent(error)}")


def _interval(said: Mapping[str, Any]) -> str:
    low, high = finite(said.get("low")), finite(said.get("high"))
    between = "" if low is None or high is None else f" ({percent(low)} to {percent(high)})"
    return percent(said.get("value")) + between
