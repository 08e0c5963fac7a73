"""The model card: what a folder holds, how it came about, what it lost, and how it is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from streamline_hooks.evaluation import MEASURES
from streamline_hooks.result import LABELS
from streamline_hooks.surgery import SurgeryPlan
from streamline_hooks.surgery.spliced_model import MODEL_TYPE
from streamline_hooks.task import task_of_classes

FILE = "README.md"
_PAPER = "https://arxiv.org/abs/2403.19135"


def model_card(config: dict[str, Any], report: dict[str, Any] | None = None, base_model: str = "") -> str:
    """Write the card of a compressed model.

    Parameters
    ----------
    config : dict
        What is in its ``config.json``, or in its ``streamline.json`` where it is no Transformers model.
    report : dict, optional
        `CompressionResult.report`, for what was measured.
    base_model : str
        The model that it was made from, by default the one that its configuration names. A name on the hub,
        ``organisation/model``, goes to the header.

    Returns
    -------
    str
        Markdown, with the YAML header that the hub reads.

    Examples
    --------
    >>> print(model_card({"model_type": "llama"}, base_model="somebody/some-model").splitlines()[1])
    base_model: somebody/some-model
    """
    said = config.get("streamline_hooks") or {}
    history = said.get("history") or []
    base_model = base_model or (history[0].get("base_model", "") if history else "")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) is not None
    plain = _on_one_line(base_model.rpartition("/")[2]) or "a model"
    name = _escaped(plain)
    built = config.get("class")  # by whom loads it
    library = "streamline_hooks" if built else "transformers"
    header: dict[str, Any] = {"base_model": base_model} if on_hub else {}
    header["library_name"] = library
    architecture = built or (config.get("architectures") or [""])[0]
    known = task_of_classes([architecture.removeprefix("Streamlined")], config.get("is_encoder_decoder"))
    causal = not architecture or ((known or "causal-lm") == "causal-lm" and not built)
    header |= {"pipeline_tag": "text-generation"} if causal else {}
    header |= {"tags": ["streamline_hooks", "layer-pruning"], **_metrics(plain, report)}
    fewer = any(SurgeryPlan.from_dict(entry).removed for entry in history)
    written = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=math.inf)
    lines = ["---", *written.splitlines(), "---", "", f"# {name}, with fewer blocks" if fewer else f"# {name}", ""]
    lines.append(
        f"This is {name} without some of its blocks, by the method of [LLM-Streamline]({_PAPER})."
        if fewer
        else f"This is {name}, of which no block was removed."
    )
    for number, entry in enumerate(history):
        lines += ["", "## What was done" + (f", {number + 1}" if len(history) > 1 else ""), "", *_surgery(entry)]
    if _final(report or {}) is not None or (report or {}).get("scores") or (report or {}).get("warnings"):
        lines += ["", "## What it lost", "", *_measured(report or {})]
    loading = _loading_into(config) if built else _loading(config, architecture, causal)
    lines += ["", "## How it is loaded", "", *loading]
    return "\n".join([*lines, ""])


def _on_one_line(name: str) -> str:
    """Replace line breaks and control characters of a name, and repeated spaces, by one space."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())


def _escaped(name: str) -> str:
    """Escape what Markdown or HTML would read as markup in a name."""
    return re.sub(r"([\\`*\[\]<>&|~]|(?<!\w)_|_(?!\w))", r"\\\1", name)


def _metrics(name: str, report: dict[str, Any] | None) -> dict[str, Any]:
    """The perplexity for the hub's table of results."""
    value = _final(report or {})
    if value is None:
        return {}
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": "text that nothing was chosen or fitted on", "type": "text"},
        "metrics": [{"type": "perplexity", "value": round(value, 4)}],
    }
    return {"model-index": [{"name": f"{name}, with fewer blocks", "results": [result]}]}


def _final(report: dict[str, Any]) -> float | None:
    """The perplexity of the model as it was saved."""
    found = report.get("perplexity") or {}
    return next((found[label] for label in ("trained", "repaired", "removed") if label in found), None)


def _surgery(entry: dict[str, Any]) -> list[str]:
    plan = SurgeryPlan.from_dict(entry)
    lines = [f"- Blocks: {plan.old_length} before, {len(plan.slots)} now. Removed: {_numbers(plan.removed) or 'none'}."]
    silenced = [f"{branch} of {k}" for k, branches in plan.silenced.items() for branch in branches]
    if silenced:
        lines.append(f"- Silenced: {', '.join(silenced)} (in the numbering before).")
    folded = [f"{branch} of {k}" for k, branches in plan.folded.items() for branch in branches]
    if folded:
        lines.append(f"- A map was multiplied into the output projection of {', '.join(folded)} (numbering before).")
    for splice in plan.splices:
        place = f"in the place of {splice.replaces[0]} to {splice.replaces[1] - 1}" if splice.replaces else "put in"
        lines.append(f"- {splice.module}, {place}, runs before block {splice.before}; it takes no cache slot.")
    new = [f"{number} ({slot.module})" for number, slot in enumerate(plan.slots) if slot.source is None]
    if new:
        lines.append(f"- Blocks that were put in: {', '.join(new)}.")
    how = entry.get("repaired", "trained" if entry.get("training") else "in closed form")  # earlier ones do not say it
    if "kind" in entry and how:
        lines.append(f"- Repaired by: `{entry['kind']}`, {how}.")
    data = {key: value for key, value in (entry.get("calibration") or {}).items() if value not in ([], "", None)}
    if data:
        said = (
            f"{key.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{key} {value}"
            for key, value in data.items()
        )
        lines.append(f"- Calibration: {', '.join(said)}.")
    versions = entry.get("versions") or {}
    if versions:
        lines.append("- Made with " + ", ".join(f"{package} {said}" for package, said in versions.items()) + ".")
    return lines


def _numbers(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))


def _measured(report: dict[str, Any]) -> list[str]:
    lines = _scores(report["scores"]) if report.get("scores") else _perplexities(report.get("perplexity") or {})
    sizes = report.get("parameters") or {}
    told = f" {sizes['before'] / 1e6:.1f} M parameters before, {sizes['after'] / 1e6:.1f} M now." if sizes else ""
    tested = {k.removeprefix("test_"): v for k, v in (report.get("data") or {}).items() if k.startswith("test_")}
    on = "".join(f" ({count:,} {unit})" for unit, count in tested.items())
    what = "data" if report.get("scores") else "text"
    warned = [f"- {text}" for text in report.get("warnings") or ()]
    return [
        *lines,
        *(["", *warned] if warned else []),
        "",
        f"On {what} that nothing was chosen or fitted on{on}.{told} What else it lost was not measured here: evaluate "
        "it on what you need it for.",
    ]


def _perplexities(found: dict[str, float]) -> list[str]:
    original = found.get("original")
    lines = ["| | perplexity | ratio |", "|---|---|---|"]
    for label, words in LABELS.items():
        if label in found:
            lines.append(f"| {words} | {found[label]:.2f} | {f'{found[label] / original:.2f}' if original else ''} |")
    return lines


def _scores(found: dict[str, dict[str, float]]) -> list[str]:
    measures = {name: words for name, words in MEASURES.items() if any(name in one for one in found.values())}
    lines = ["| | " + " | ".join(measures.values()) + " |", "|---" * (len(measures) + 1) + "|"]
    for label, words in LABELS.items():
        if label in found:
            cells = (f"{found[label][name]:.4f}" if name in found[label] else "" for name in measures)
            lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return lines


def _loading_into(config: dict[str, Any]) -> list[str]:
    first: dict[str, int] = {}
    for plan in map(SurgeryPlan.from_dict, config["streamline_hooks"]["history"]):
        first.setdefault(plan.stack, plan.old_length)
    blocks = " and ".join(f"{length} blocks in `{stack}`" for stack, length in first.items())
    return [
        f"Its weights are put into the original architecture, a `{config['class']}`, built as it was before, with "
        f"{blocks}:",
        "",
        "```python",
        "import streamline_hooks",
        "",
        "model = ...  # the original architecture, built anew",
        "model = streamline_hooks.load(folder, into=model)",
        "```",
        "",
        "It is shortened and given what stands between its blocks; an architecture that is another one is refused.",
    ]


def _loading(config: dict[str, Any], architecture: str, causal: bool) -> list[str]:
    if not causal:
        return [f"With streamline_hooks: `streamline_hooks.load(folder)`, which gives a {architecture}."]
    automatic = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    model, tokenizer = (f"{cls}.from_pretrained(folder{{}})" for cls in ("AutoModelForCausalLM", "AutoTokenizer"))
    end = [f"model = {model}", f"tokenizer = {tokenizer}".format("")]
    if config.get("model_type") != MODEL_TYPE:
        said = "It is a plain checkpoint of its architecture, which needs nothing but what the original needs:"
        return [said, "", "```python", automatic, "", end[0].format(""), end[1], "```"]
    lines = [
        "It has modules that its architecture has not. It is loaded with streamline_hooks installed:",
        "",
        "```python",
        "import streamline_hooks  # makes the model's type known",
        automatic,
        "",
        end[0].format(""),
        end[1],
        "```",
    ]
    if not config.get("auto_map"):
        return [
            *lines,
            "",
            "One of them is of a class that its author registers: import that module too, before loading.",
        ]
    return [
        *lines,
        "",
        "Without it, the code in this folder does the same, once you trust it:",
        "",
        "```python",
        end[0].format(", trust_remote_code=True"),
        "```",
        "",
        "Loading it in any other way fails, so that the repair cannot get lost unnoticed.",
    ]
