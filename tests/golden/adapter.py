"""The golden runs' only access to the library: its functions, the names of its options, and the form of its reports.

A change of the public API, of the command line or of a report changes this file, and not the table of runs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import benchmarks.baselines  # noqa: F401 - some runs are of its kinds, criteria and presets
from streamline_hooks import CompressionConfig, DistillationConfig, compress, load
from streamline_hooks import sweep as run_sweep
from streamline_hooks.checkpoint import load_pretrained
from streamline_hooks.cli import COMMANDS, main, parse_healing, parse_loss, parse_replacement
from streamline_hooks.data import read_documents
from streamline_hooks.modeling import find_stacks
from streamline_hooks.pipeline import PRESETS, compress_checkpoint
from streamline_hooks.repair import REPLACEMENTS
from streamline_hooks.selection import CRITERIA, SEARCHES
from tests.configured import configured
from tests.golden import inputs
from tests.golden.store import Facts, plain
from tests.processes import ROOT, in_processes

SIZES = {"sequence_length": 16, "calibration_tokens": 1_024, "validation_tokens": 256, "test_tokens": 256}
EXAMPLES = {"calibration_examples": 24, "validation_examples": 8, "test_examples": 12}
PROJECTIONS = 3
COUNTED = ("entropy",)  # criteria that count values in intervals: one at a limit changes the score


def registered() -> dict[str, list[str]]:
    """Return the names that must each occur in a run, by the setting that names them."""
    commands = [name for name in COMMANDS if name not in ("info", "plan", "push")]  # of this machine, or of the network
    return {
        "kind": list(REPLACEMENTS),
        "search": list(SEARCHES),
        "criterion": list(CRITERIA),
        "preset": list(PRESETS),
        "command": commands,
    }


def execute(how: str, settings: Mapping[str, Any], folder: Path) -> Facts:
    """Make a run and return its facts.

    Parameters
    ----------
    how : str
        The name of a function in `HOW`.
    settings : mapping
        Its keywords, as plain data.
    folder : Path
        An empty folder.
    """
    with _same_everywhere():
        facts = HOW[how](folder, **copy.deepcopy(dict(settings)))
    return {name: plain(value) for name, value in facts.items()}


@contextlib.contextmanager
def _same_everywhere() -> Iterator[None]:
    """Compute in one thread, and from the same random numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


# Compressions by function
# ------------------------


def _compress(
    folder: Path, *, model: str = "llama", data: str = "batches", processes: int = 1, **settings: Any
) -> Facts:
    """Compress a tiny model in memory; in several processes the facts of all must be those of the first."""
    if processes > 1:
        return _in_processes(folder, processes, {"model": model, "data": data, **settings})
    original = inputs.model_named(model)
    tokenizer = inputs.tokenizer() if data == "documents" else None
    changed: Any = copy.deepcopy(original)
    result = compress(changed, _data(data), _config(settings, data), tokenizer=tokenizer)
    return facts_of(result.report(), result.model, original)


def _in_processes(folder: Path, count: int, settings: dict[str, Any]) -> Facts:
    code = """
        from pathlib import Path
        from tests.golden import adapter
        settings = json.loads(args[0])
        said["facts"] = adapter.execute("compress", settings, Path(folder))
    """
    first, *others = (said["facts"] for said in in_processes(code, folder, count, json.dumps(settings)))
    assert all(facts == first for facts in others), "the processes ended with different results"
    return {**first, "processes": count}


def _sweep(folder: Path, *, model: str = "llama", **settings: Any) -> Facts:
    remove, kinds = settings.pop("remove"), settings.pop("kinds")
    changed: Any = inputs.model_named(model)
    found = run_sweep(
        changed,
        inputs.documents(),
        _config(settings, "documents"),
        tokenizer=inputs.tokenizer(),
        remove=remove,
        repair=[parse_replacement(kind) for kind in kinds],
        speed=None,
    )
    return _points(found.report())


def _points(report: Mapping[str, Any]) -> Facts:
    return {f"{point['name']}: {key}": _value(value) for point in report["points"] for key, value in point.items()}


def _blockwise(folder: Path, *, model: str = "llama", **settings: Any) -> Facts:
    """Compress a checkpoint with one block in memory at a time."""
    source = inputs.write_model(model, folder / "model")
    result = compress_checkpoint(
        source,
        inputs.documents(),
        _config({**settings, "state_memory": 2**16}, "documents"),
        tokenizer=inputs.tokenizer(),
        output=folder / "out",
    )
    return facts_of(result.report(), load(folder / "out"), inputs.model_named(model))


def _real(folder: Path, *, text: str, **settings: Any) -> Facts:
    """Compress SmolLM2-135M-Instruct; `text` is a path below the data folder, which is that of `data_folder`."""
    data = Path(os.environ.get("STREAMLINE_DATA") or ROOT.parent / "shared" / "data")
    changed, tokenizer = load_pretrained("smollm2")
    texts = read_documents([str(data / text)])
    original = {name: value.clone() for name, value in changed.state_dict().items()}
    result = compress(changed, texts, _config(settings, "batches"), tokenizer=tokenizer)
    return facts_of(result.report(), result.model, original)


def _originals(folder: Path, *, models: list[str]) -> Facts:
    """Return the weights of the tiny models, which those that a compression keeps are compared with."""
    return {
        f"{model}: {fact}": row
        for model in models
        for fact, row in weight_facts(inputs.model_named(model).state_dict()).items()
    }


def _data(name: str) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "batches": inputs.token_batches,
        "few batches": lambda: {part: batches[:1] for part, batches in inputs.token_batches().items()},
        "documents": inputs.documents,
        "pairs": inputs.pair_batches,
        "images": inputs.image_batches,
        "text batches": inputs.text_batches,
    }
    return makers[name]()


def _config(settings: dict[str, Any], data: str) -> CompressionConfig:
    """Return the config of settings in plain data."""
    options: dict[str, Any] = {"speed": False, "generation": False, **(SIZES if data == "documents" else {})}
    base = PRESETS[settings.pop("preset")].config if "preset" in settings else None
    if base is not None and data != "documents" and "repeated_context" in settings:
        options["repeated_context"] = settings.pop("repeated_context")
    if "training" in settings:
        training = settings.pop("training")
        options["distillation"] = DistillationConfig(parse_loss(training.pop("objective")), **training)
    if "healing" in settings:
        options["healing"] = parse_healing(settings.pop("healing").replace("rate=", "learning_rate_ratio="))
    names = {"kind": "repair", "parts": "windows"}
    return configured(base, **options, **{names.get(name, name): value for name, value in settings.items()})


# The command line
# ----------------


def _command(
    folder: Path, *, command: str, model: str = "llama", made: dict[str, Any] | None = None, **options: Any
) -> Facts:
    """Run a command in this process on a tiny model, or on what ``compress`` made of it with the options `made`.

    Values in capitals are files of the run: MODEL, MADE, OUT, TEXT, PAIRS, IMAGES, QUESTIONS.
    """
    files = _Files(folder, model)
    original = inputs.model_named(model)
    if made is not None:
        _call("compress", ["MODEL"], {"output": "MADE", **made}, files)
    subject = "MADE" if made is not None else "MODEL"
    positional = {"diff": ["MODEL", "MADE"], "generate": [subject, options.pop("prompt", "")]}.get(command, [subject])
    printed = _call(command, positional, options, files)
    if command in ("compress", "export"):
        report = json.loads((folder / "out" / "report.json").read_text()) if command == "compress" else {}
        return facts_of(report, load(folder / "out"), original)
    if command == "evaluate":
        return _flat({k: v for k, v in json.loads(printed).items() if k not in _UNSTABLE})
    if command == "sweep":
        return _points(json.loads((folder / "out" / "sweep.json").read_text()))
    if command == "check":
        return {one["name"]: one["verdict"] for one in json.loads(printed)}
    if command in ("rank", "inspect"):
        return _flat(json.loads(printed))
    return {f"line {k:02}": line for k, line in enumerate(printed.splitlines()) if line.strip()}


_UNSTABLE = ("seconds", "speed", "model", "reference", "versions", "packages", "key", "keys")


class _Files:
    """The files that a command reads and writes, made where they are named."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self._model = folder, model

    def path(self, word: str) -> Path:
        path = self.folder / word.lower()
        if not path.exists() and word not in ("OUT", "MADE"):
            makers: dict[str, Callable[[Path], Path]] = {
                "MODEL": lambda path: inputs.write_model(self._model, path),
                "TEXT": inputs.write_documents,
                "PAIRS": inputs.write_pairs,
                "IMAGES": inputs.write_images,
                "QUESTIONS": inputs.write_questions,
            }
            path = path.with_suffix({"TEXT": ".txt", "PAIRS": ".jsonl", "QUESTIONS": ".jsonl"}.get(word, ""))
            return path if path.exists() else makers[word](path)
        return path


def _call(command: str, positional: list[str], options: Mapping[str, Any], files: _Files) -> str:
    """Run a command; what it printed, if it ended well."""
    arguments = [command, *positional]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            arguments += [option] if one is True else [option, str(one)]
    given = [str(files.path(word)) if word.isupper() and word.isalpha() else word for word in arguments]
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with mock.patch.object(sys, "argv", ["streamline-hooks", *given]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stopped:
                code = stopped.code or 0
    assert code == 0, f"streamline-hooks {' '.join(given)} ended with {code}:\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue()


HOW: dict[str, Callable[..., Facts]] = {
    "compress": _compress,
    "sweep": _sweep,
    "blockwise": _blockwise,
    "real": _real,
    "originals": _originals,
    "command": _command,
}


# Facts
# -----


def facts_of(report: Mapping[str, Any], model: nn.Module, original: nn.Module | Mapping[str, Tensor]) -> Facts:
    """Return the facts of a compression: its selection with the margin, its metrics, and its weights.

    Parameters
    ----------
    report : mapping
        What `CompressionResult.report` gives; empty where there is none.
    model : torch.nn.Module
        The compressed model.
    original : torch.nn.Module or mapping of str to torch.Tensor
        Weights that were kept as they are, to the bit, are counted, and not stored.
    """
    state = original.state_dict() if isinstance(original, nn.Module) else original
    lengths = {stack.path: len(stack) for stack in find_stacks(model)}  # type: ignore[arg-type]
    facts: Facts = {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    facts |= {f"blocks of {path}": count for path, count in lengths.items()}
    kept = None
    if report:
        facts |= _selection_facts(report)
        kept = [slot["source"] for slot in report["plan"]["slots"]]
    return facts | weight_facts(model.state_dict(), state, kept, report["plan"]["stack"] if report else "")


def _selection_facts(report: Mapping[str, Any]) -> Facts:
    facts: Facts = {name: report[name] for name in ("kind", "criterion", "search", "task", "measure")}
    facts["plan"] = _plan(report["plan"])
    candidates = {_name(row): row for row in report["candidates"]}
    chosen = next(iter(candidates))
    facts["selection"] = chosen
    prefix = "counted " if report["criterion"] in COUNTED else ""
    distances = {name: row["distance"] for name, row in candidates.items() if row["distance"] is not None}
    scores = {name: row["score"] for name, row in candidates.items()}
    is_judged = chosen == min(distances, key=distances.__getitem__, default=None)
    facts["selection by"] = report["measure"] if is_judged else "score"
    if len(candidates) > 1:
        ranking = distances if is_judged else {name: -score for name, score in scores.items()}
        facts["selection margin"] = _margin(chosen, ranking)
        if report["search"] == "window":
            first = max(scores, key=scores.__getitem__)
            facts["first by the criterion"] = first
            facts[f"{prefix}first by the criterion, margin"] = _margin(
                first, {name: -score for name, score in scores.items()}
            )
    for name, row in candidates.items():
        facts[f"candidate {name}: distance"] = _value(row["distance"])
        facts[f"{prefix}candidate {name}: score"] = float(row["score"])
        if row["refused"]:
            facts[f"candidate {name}: refused"] = "yes"
        for k, repair in enumerate([*row["repairs"], *row["maps"]]):
            for key in ("removal_error", "repaired_error", "ridge"):
                if repair[key] is not None:
                    facts[f"candidate {name}: {key} {k}"] = float(repair[key])
    facts |= {f"perplexity {label}": float(value) for label, value in report["perplexity"].items()}
    for label, scored in report["scores"].items():
        facts |= {f"score {label}: {measure}": float(value) for measure, value in scored.items()}
    facts |= {f"round {k}: removed": str(one["removed"]) for k, one in enumerate(report["rounds"])}
    if report["training"] is not None:
        training = report["training"]
        facts |= {
            f"training: {key}": training[key] for key in ("steps", "distance_before", "distance") if key in training
        }
    return facts


def _name(row: Mapping[str, Any]) -> str:
    """The blocks and branches of a candidate."""
    parts = [str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in row["windows"]]
    return ", ".join([*parts, *(f"{branch} of {k}" for k, branch in row["silenced"])])


def _margin(chosen: str, losses: Mapping[str, float]) -> float | str:
    """How far the least loss is from the next one, relative to the larger of the two."""
    others = [loss for name, loss in losses.items() if name != chosen and math.isfinite(loss)]
    if not others:
        return "inf"
    best, next_one = losses[chosen], min(others)
    scale = max(abs(best), abs(next_one))
    return (next_one - best) / scale if scale else 0.0


def _plan(plan: Mapping[str, Any]) -> str:
    """The new blocks by their old numbers, with what was put between them."""
    said = []
    for new, slot in enumerate([*plan["slots"], None]):
        said += [f"<{splice['module']}>" for splice in plan["splices"] if splice["before"] == new]
        if slot is not None:
            marks = [f"-{branch}" for branch in slot["silenced"]] + [f"*{branch}" for branch in slot["folded"]]
            said.append("".join(["new" if slot["source"] is None else str(slot["source"]), *marks]))
    return " ".join(said)


def weight_facts(
    state: Mapping[str, Tensor],
    original: Mapping[str, Tensor] | None = None,
    kept: list[int | None] | None = None,
    stack: str = "",
) -> Facts:
    """Return a row for each weight tensor: shape, norm, and products with random vectors, relative to the norm.

    Parameters
    ----------
    state : mapping of str to torch.Tensor
    original : mapping of str to torch.Tensor, optional
        Tensors that are equal to the one that they were are counted instead.
    kept : list of int or None, optional
        The old number of each block.
    stack : str
        The path of the blocks.
    """
    facts: Facts = {}
    same = 0
    for name, tensor in state.items():
        old = original.get(_old_name(name, kept, stack)) if original is not None else None
        if old is not None and torch.equal(old, tensor):
            same += 1
        else:
            facts[f"weight {name}"] = _row(name, tensor)
    return facts if original is None else {**facts, "weights kept": f"{same} of {len(state)}"}


def _old_name(name: str, kept: list[int | None] | None, stack: str) -> str:
    """The name that a tensor had in the original; of a new block none."""
    found = re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.*)", name) if kept is not None else None
    return name if found is None else f"{stack}.{kept[int(found[1])]}.{found[2]}"  # type: ignore[index]


def _row(name: str, tensor: Tensor) -> list[Any]:
    flat = tensor.detach().double().flatten()
    norm = float(flat.norm())
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    products = [
        float(flat @ torch.randn(len(flat), generator=generator, dtype=torch.float64)) for _ in range(PROJECTIONS)
    ]
    return [list(tensor.shape), norm, *(product / norm if norm else 0.0 for product in products)]


def _value(value: Any) -> Any:
    """A value of a report as a fact."""
    return value if isinstance(value, (str, float, int)) and not isinstance(value, bool) else json.dumps(value)


def _flat(value: Any, name: str = "") -> Facts:
    """Nested JSON values by their paths, without times."""
    if isinstance(value, dict):
        parts = [(key, part) for key, part in value.items() if key not in _UNSTABLE]
    elif isinstance(value, list) and any(isinstance(part, (dict, list, float)) for part in value):
        parts = [(f"{k:02}", part) for k, part in enumerate(value)]
    else:
        return {name: _value(value)}
    return {
        key: fact for part_name, part in parts for key, fact in _flat(part, f"{name}/{part_name}".lstrip("/")).items()
    }
