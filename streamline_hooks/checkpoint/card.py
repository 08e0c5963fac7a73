"""Write the model card of a compressed model: changes, measured quality, and how to load it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from streamline_hooks.core import describe_blocks
from streamline_hooks.distillation import TrainingResult
from streamline_hooks.evaluation import MEASURES, recorded_guarantees
from streamline_hooks.modeling import task_from_class_names
from streamline_hooks.selection import TargetOutcome
from streamline_hooks.surgery import MODEL_TYPE, SurgeryPlan

CARD = "README.md"
# Label of each measured stage, by its key in a report.
STAGE_LABELS = {
    "original": "original",
    "removed": "plain removal",
    "repaired": "repaired",
    "trained": "repaired and trained",
    "first_removed": "the search's first, removed",
    "first_repaired": "the search's first, repaired",
}
_GUARANTEE_NOTE = (
    "This is stated about these weights in the precision of this checkpoint, and about data from the source of the "
    "measured ones, which must not have been used to compress or to choose the model."
)
_PAPER = "https://arxiv.org/abs/2403.19135"


def model_card(config: dict[str, Any], report: dict[str, Any] | None = None, base_model: str = "") -> str:
    """Return the model card of a compressed model: Markdown with the YAML header of the hub.

    Parameters
    ----------
    config : dict
        Content of ``config.json``, or of ``streamline.json`` for a model outside Transformers.
    report : dict, optional
        Result of `CompressionResult.report`, for the measurements.
    base_model : str
        Name of the original model; by default the name in the config. The header contains a name on the hub only.

    Examples
    --------
    >>> print(model_card({"model_type": "llama"}, base_model="my-name/some-model").splitlines()[1])
    base_model: my-name/some-model
    """
    history = (config.get("streamline_hooks") or {}).get("history") or []
    report = report or {}
    base_model = base_model or (history[0].get("base_model", "") if history else "")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) is not None
    plain_name = _on_one_line(base_model.rpartition("/")[2]) or "a model"
    name = _escape_markdown(plain_name)
    custom_class = config.get("class")  # the class that the caller of `load` builds
    header: dict[str, Any] = {"base_model": base_model} if on_hub else {}
    header["library_name"] = "streamline_hooks" if custom_class else "transformers"
    architecture = custom_class or (config.get("architectures") or [""])[0]
    task = task_from_class_names([architecture.removeprefix("Streamlined")], config.get("is_encoder_decoder"))
    is_causal = not architecture or ((task or "causal-lm") == "causal-lm" and not custom_class)
    header |= {"pipeline_tag": "text-generation"} if is_causal else {}
    header |= {"tags": ["streamline_hooks", "layer-pruning"], **_metrics(plain_name, report)}
    is_shorter = any(SurgeryPlan.from_dict(entry).removed for entry in history)
    header_yaml = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=math.inf)
    title = f"# {name}, with fewer blocks" if is_shorter else f"# {name}"
    lines = ["---", *header_yaml.splitlines(), "---", "", title, ""]
    lines.append(
        f"This is {name} without some of its blocks, by the method of [LLM-Streamline]({_PAPER})."
        if is_shorter
        else f"This is {name}, from which no block was removed."
    )
    for number, entry in enumerate(history):
        lines += [
            "",
            "## Changes" + (f", {number + 1}" if len(history) > 1 else ""),
            "",
            *_surgery(entry, history[:number]),
        ]
    if report.get("target"):
        lines += ["", "## Target", "", *_target(TargetOutcome.from_dict(report["target"]))]
    if _final_perplexity(report) is not None or report.get("scores") or report.get("warnings"):
        lines += ["", "## Quality", "", *_measured(report)]
    if statements := recorded_guarantees(history):
        lines += ["", "## Guarantee", "", *(f"- Bounded losses, {text}." for text in statements), "", _GUARANTEE_NOTE]
    loading = _loading_into(config) if custom_class else _loading(config, architecture, is_causal)
    return "\n".join([*lines, "", "## Loading", "", loading, ""])


def _on_one_line(name: str) -> str:
    """Replace line breaks, control characters and repeated spaces in a name by one space."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())


def _escape_markdown(name: str) -> str:
    """Escape Markdown and HTML markup in a name."""
    return re.sub(r"([\\`*\[\]<>&|~]|(?<!\w)_|_(?!\w))", r"\\\1", name)


def _metrics(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """Return the perplexity as the `model-index` entry of the header."""
    value = _final_perplexity(report)
    if value is None:
        return {}
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": "test text that was not used for selection or fitting", "type": "text"},
        "metrics": [{"type": "perplexity", "value": round(value, 4)}],
    }
    return {"model-index": [{"name": f"{name}, with fewer blocks", "results": [result]}]}


def _final_perplexity(report: dict[str, Any]) -> float | None:
    """Return the perplexity of the saved model, or None."""
    perplexities = report.get("perplexity") or {}
    return next((perplexities[label] for label in ("trained", "repaired", "removed") if label in perplexities), None)


def _surgery(entry: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines about one surgery; `earlier` are the records of the surgeries before it."""
    plan = SurgeryPlan.from_dict(entry)
    kept = Counter(splice.module for before in earlier[-1:] for splice in SurgeryPlan.from_dict(before).splices)
    removed = ", ".join(map(str, plan.removed))
    lines = [f"- Blocks: {plan.old_length} before, {len(plan.slots)} now. Removed: {removed or 'none'}."]
    zeroed, folded = (
        ", ".join(f"{branch} of {k}" for k, branches in of.items() for branch in branches)
        for of in (plan.zeroed, plan.folded)
    )
    if zeroed:
        lines.append(f"- Zeroed: {zeroed} (block numbers before the surgery).")
    if folded:
        lines.append(
            f"- A linear map was folded into the output projection of: {folded} (block numbers before the surgery)."
        )
    for splice in plan.splices:
        position = f"replaces {describe_blocks(range(*splice.replaces))}" if splice.replaces else "is inserted"
        if not splice.replaces and kept[splice.module]:
            position, kept[splice.module] = "is of the change before", kept[splice.module] - 1
        lines.append(f"- {splice.module} {position}, runs before block {splice.before} and takes no cache slot.")
    inserted = [f"{number} ({slot.module})" for number, slot in enumerate(plan.slots) if slot.source is None]
    if inserted:
        lines.append(f"- Inserted blocks: {', '.join(inserted)}.")
    # Older records have no "repaired".
    fitting = entry.get("repaired", "trained" if entry.get("training") else "in closed form")
    if entry.get("kind", "none") != "none" and fitting:
        lines.append(f"- Repaired by: `{entry['kind']}`, {fitting}.")
    lines += _training(entry)
    data = {key: value for key, value in (entry.get("calibration") or {}).items() if value not in ([], "", None)}
    if data:
        data_texts = [
            f"{key.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{key} {value}"
            for key, value in data.items()
            if key != "source"
        ]
        if source := data.get("source"):
            mixture_texts = [f"{part['share']:.1%} {', '.join(part['sources'])}" for part in source.get("mixture", ())]
            data_texts.insert(0, f"text of {', '.join(mixture_texts or source.get('sources', ()))}")
        lines.append(f"- Calibration: {', '.join(data_texts)}.")
    versions = entry.get("versions") or {}
    if versions:
        lines.append("- Made with " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".")
    return lines


def _training(entry: dict[str, Any]) -> list[str]:
    """Return the line about a training run; none for records without it, or with other fields."""
    config = entry.get("config") or {}
    try:
        result = TrainingResult(**(entry.get("training") or {}))
    except TypeError:
        return []
    weights = (config.get("distillation") or {}).get("loss") or {}
    loss = " + ".join(name if weight == 1 else f"{weight:g}*{name}" for name, weight in weights.items())
    healing = (config.get("healing") or {}).get("method")
    healed = f" and `{healing}` healing of kept blocks" if healing else ""
    line = f"- Training{f' with the loss `{loss}`' if loss else ''}{healed}: {result}."
    return [line if result.best_step else f"{line} The initial weights are kept."]


def _target(outcome: TargetOutcome) -> list[str]:
    """Return the predicted and the measured values of the target as a table."""
    values = outcome.formatted()
    reached = "was reached" if outcome.is_reached else "was not reached"
    return [
        "| target | " + " | ".join(values) + " |",
        "|---" * (len(values) + 1) + "|",
        f"| {outcome.target} | " + " | ".join(values.values()) + " |",
        "",
        f"The target {reached}. The prediction was made before the compression, the measurement after it"
        + (" on the machine that compressed it." if outcome.target.is_timed else "."),
    ]


def _measured(report: dict[str, Any]) -> list[str]:
    lines = _scores(report["scores"]) if report.get("scores") else _perplexities(report.get("perplexity") or {})
    sizes = report.get("parameters") or {}
    size_text = f" {sizes['before'] / 1e6:.1f} M parameters before, {sizes['after'] / 1e6:.1f} M now." if sizes else ""
    test_counts = {k.removeprefix("test_"): v for k, v in (report.get("data") or {}).items() if k.startswith("test_")}
    count_text = "".join(f" ({count:,} {unit})" for unit, count in test_counts.items())
    kind = "data" if report.get("scores") else "text"
    warnings = [f"- {text}" for text in report.get("warnings") or ()]
    return [
        *lines,
        *(["", *warnings] if warnings else []),
        "",
        f"Measured on test {kind} that was not used for selection or fitting{count_text}.{size_text} Other abilities "
        "were not measured here: evaluate the model on your task.",
    ]


def _perplexities(perplexities: dict[str, float]) -> list[str]:
    original = perplexities.get("original")
    lines = ["| | perplexity | ratio |", "|---|---|---|"]
    for label, stage in STAGE_LABELS.items():
        if label in perplexities:
            lines.append(
                f"| {stage} | {perplexities[label]:.2f} | "
                f"{f'{perplexities[label] / original:.2f}' if original else ''} |"
            )
    return lines


def _scores(scores: dict[str, dict[str, float]]) -> list[str]:
    measures = {
        name: title for name, title in MEASURES.items() if any(name in stage_scores for stage_scores in scores.values())
    }
    lines = ["| | " + " | ".join(measures.values()) + " |", "|---" * (len(measures) + 1) + "|"]
    for label, title in STAGE_LABELS.items():
        if label in scores:
            cells = (f"{scores[label][name]:.4f}" if name in scores[label] else "" for name in measures)
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _loading_into(config: dict[str, Any]) -> str:
    lengths: dict[str, int] = {}
    for plan in map(SurgeryPlan.from_dict, config["streamline_hooks"]["history"]):
        lengths.setdefault(plan.stack, plan.old_length)
    blocks = " and ".join(f"{length} blocks in `{stack}`" for stack, length in lengths.items())
    return f"""\
Build the original architecture, a `{config["class"]}` with {blocks}, and load the checkpoint into it:

```python
import streamline_hooks

model = ...  # the original architecture, newly built
model = streamline_hooks.load(folder, into=model)
```

`load` removes the blocks, inserts the replacements and loads the weights; another architecture is refused."""


def _loading(config: dict[str, Any], architecture: str, causal: bool) -> str:
    if not causal:
        return f"Load it with streamline_hooks: `streamline_hooks.load(folder)` returns a {architecture}."
    code = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""
    if config.get("model_type") != MODEL_TYPE:
        return (
            "This is a plain checkpoint of its architecture with the same requirements as the original model:\n\n"
            f"```python\n{code}"
        )
    trust = (
        """\
Without streamline_hooks, load it with the code in this folder, if you trust that code:

```python
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
```

Loading it in any other way fails, so the replacements cannot be lost silently."""
        if config.get("auto_map")
        else "A replacement is of a custom class: import the module that registers it before loading."
    )
    return f"""\
The model has modules that its architecture does not have. Load it with streamline_hooks installed:

```python
import streamline_hooks  # registers the model type
{code}

{trust}"""
