"""Calls that cannot work: each raises StreamlineError with what was given, and leaves the model as it was."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import streamline_hooks as s
from streamline_hooks import StreamlineError
from streamline_hooks.checkpoint import compare_blocks, read_plans
from streamline_hooks.cli import parse_loss, parse_replacement
from streamline_hooks.core import HardwareConfig
from streamline_hooks.distillation import Loss, Objective, freeze_all_but, register_loss, student_of
from streamline_hooks.evaluation import (
    Suite,
    agreement,
    embedding_similarity,
    embeddings,
    measure_speed,
    recall_at,
    sliding_perplexity,
)
from streamline_hooks.modeling import Task, find_stacks
from streamline_hooks.pipeline import EvaluationConfig
from streamline_hooks.recording import RecordingConfig
from streamline_hooks.repair import NoneConfig, ReplacementConfig, insert_replacement, register_replacement
from streamline_hooks.replacements import LinearReplacement, register_module
from streamline_hooks.selection import SearchProblem, Selection, WindowSearch, combine_criteria, score_windows
from streamline_hooks.statistics import measure_branches, measure_moments
from streamline_hooks.surgery import resume
from streamline_hooks.training import HiddenStateMonitor, ProgressiveRemoval, StochasticDepth
from tests.configured import configured
from tests.tiny_models import WIDTH, padded, tiny_config, tiny_model, tokens

MODEL, OTHER = tiny_model("llama"), tiny_model("llama")
META = copy.deepcopy(MODEL).to("meta")
EMPTY = transformers.AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=0))
SINGLE = transformers.AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=1))
PARTS = {name: [tokens(2, 8, seed)] for seed, name in enumerate(("calibration", "validation", "test"))}
GOOD = [padded([8, 6], "right")]
IDS = GOOD[0]["input_ids"]
PROFILE = s.profile(MODEL, GOOD)
WINDOWS = [range(1, 3)]
MAP = LinearReplacement(WIDTH)

# Values that no argument of a sort takes. `None` and what a function takes besides are left out where it is called.
NO_MODEL = [None, "model", 3, transformers.LlamaForCausalLM]
NO_INT = [None, "2", 1.5, True, math.nan, math.inf, [1], {}]
NO_FLOAT = [None, "0.5", True, math.nan, [1.0], {}]
NO_TEXT = [None, 3, [], {}]
NO_STACK = [3, 1.5, ["model.layers"], "nonsense", "", True]
NO_BLOCKS = [1, "1", [1.5], [True], [99], [-99], ["1"], [math.nan], [{}], [[1]], {"a": 1}, [None]]
NO_WINDOWS = [None, 1, [{}], ["1"], [[1.5]], [[True]], [range(90, 99)], [range(0)], [1, 2], [[1, 3]], [range(-2, 0)]]
NO_BATCHES = [
    None, 3, "text", [], [{}], {}, [None], [[1, 2]], ["text"], iter(()), [IDS[0]], [IDS[:, :0]], [IDS[:0]],
    [IDS.float()], [IDS.bool()], [IDS + 1_000], [IDS - 1_000], [{"input_ids": IDS.tolist()}], [{"input_ids": IDS[0]}],
    [{"nonsense": IDS}], [{"input_ids": IDS, "attention_mask": torch.ones(2, 3)}],
    [{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}],
]  # fmt: skip
NO_TEXTS = [None, 3, "one text", [], [{}], [None], [1, 2], {}, {"a": 1}, [["a"]], [b"a"]]
NO_STATES = [None, "x", [[1.0]], torch.zeros(WIDTH), torch.zeros(2, 8, 7), torch.zeros(3, 8, WIDTH), IDS]


class NoTokenizer:
    """A tokenizer that is never called, since something else is wrong."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError


def surgery(method: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> None:
        with s.LayerSurgeon(MODEL) as surgeon:
            getattr(surgeon, method)(**arguments)

    call.__name__ = method
    return call


def opened(kind: Any) -> Callable[..., Any]:
    def call(**arguments: Any) -> None:
        with kind(**arguments):
            pass

    call.__name__ = kind.__name__
    return call


def placed(**arguments: Any) -> None:
    with s.LayerSurgeon(MODEL) as surgeon:
        insert_replacement(surgeon, **arguments)


def compressed(**arguments: Any) -> None:
    """Call `compress`, whose model and data have no names."""
    s.compress(*[arguments.pop(name) for name in ("model", "data") if name in arguments], **arguments)


def searched(**arguments: Any) -> None:
    WindowSearch().find(SearchProblem(**arguments))


def settings(kind: Any, wrong: list[Any], *names: str) -> tuple[Any, dict[str, Any], dict[str, list[Any]]]:
    return kind, {}, dict.fromkeys(names, wrong)


Row = tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]


def rows() -> Iterator[Row]:
    """A function, arguments that it takes, and by argument what it does not take."""
    run: dict[str, list[Any]] = {"model": [*NO_MODEL, META], "batches": NO_BATCHES}
    given: dict[str, Any] = {"model": MODEL, "batches": GOOD}
    yield (
        s.profile,
        given,
        run | {"protect": NO_BLOCKS, "skip": [*NO_INT, -1], "replicates": [*NO_INT, -1], "stack": NO_STACK},
    )
    yield measure_moments, given | {"windows": WINDOWS}, run | {"windows": NO_WINDOWS, "stack": NO_STACK}
    yield measure_branches, given, run | {"blocks": NO_BLOCKS}
    yield s.perplexity, given, run
    both = run | {"original": [*NO_MODEL, META], "task": [3, "nonsense", []]}
    yield agreement, given | {"original": OTHER}, both
    yield embedding_similarity, given | {"original": OTHER}, both
    yield embeddings, given, run
    yield (
        score_windows,
        given | {"windows": WINDOWS, "criterion": "kl"},
        run | {"windows": NO_WINDOWS, "criterion": NO_TEXT},
    )
    resumed = {"model": MODEL, "k": 2, "states": torch.zeros(2, 8, WIDTH), "batch": GOOD[0]}
    yield (
        resume,
        resumed,
        {"model": [*NO_MODEL, META], "k": [*NO_INT, -1, 7], "states": NO_STATES, "batch": [None, {}, 3]},
    )
    yield s.find_stack, {"model": MODEL}, {"model": [*NO_MODEL, EMPTY], "path": NO_STACK}
    yield find_stacks, {"model": MODEL}, {"model": NO_MODEL}
    fitted = {"model": MODEL, "windows": WINDOWS, "replacement": s.LinearConfig(), "fit": GOOD, "held_out": GOOD}
    yield s.fit_windows, fitted, {
        "model": [*NO_MODEL, META], "windows": NO_WINDOWS, "replacement": [None, 3, "linear", {}], "fit": NO_BATCHES,
        "held_out": NO_BATCHES,
    }  # fmt: skip
    selections = [Selection((range(1, 3),))]
    yield s.verify_shortlist, {**fitted, "validation": GOOD, "selections": selections} | {"windows": None}, {
        "selections": [None, "x", [{}], [range(1, 3)], [Selection((range(90, 99),))]], "validation": NO_BATCHES,
    }  # fmt: skip
    yield searched, {"candidates": WINDOWS, "length": 6, "profile": PROFILE}, {
        "candidates": [*NO_WINDOWS, []], "length": [*NO_INT, 0], "best": [*NO_INT, 0], "profile": ["x", {}],
    }  # fmt: skip
    yield combine_criteria, {"parts": {"cosine": 1.0, "kl": 1.0}}, {
        "parts": [None, {}, ["cosine"], {"cosine": "1"}, {"cosine": math.nan}, {"cosine": math.inf}, {"cosine": True},
                  {"nonsense": 1.0}, {3: 1.0}],
        "by": [*NO_TEXT, "vote"],
    }  # fmt: skip
    yield s.Target, {"blocks": 2}, {"blocks": [None, "2", True, [1], {}, 0], "fraction": [0.5, "x", math.nan]}
    yield s.Target.of, {"remove": 2}, {"remove": [None, "2", True, [1], {}, 0, math.nan, 2.5]}
    yield Task, {"name": "causal-lm"}, {"name": [*NO_TEXT, "nonsense"], "pooling": [3, "nonsense"]}
    yield Selection, {"windows": (range(1, 3),)}, {"windows": [None, 1, (), ({},), ("1",), ([1.5],), (range(0),)]}
    no_loss = [None, "kl", {}, {"kld": 1.0}, *({"kl": weight} for weight in [*NO_FLOAT, math.inf, -1.0, 0.0])]
    yield Objective, {}, {"weights": no_loss}
    yield parse_loss, {"text": "kl"}, {"text": ["", "nan*kl", "inf*kl", "-1*kl", "0*kl", "1e999*kl"]}
    rates = ("weight_decay", "warmup_ratio", "min_lr_ratio", "max_grad_norm", "epochs", "checkpoint_minutes")
    yield settings(s.DistillationConfig, [*NO_FLOAT, math.inf, -1.0], "learning_rate", *rates)
    counts = ("gradient_accumulation_steps", "validations", "patience")
    yield settings(s.DistillationConfig, [*NO_INT, -1], *counts)
    yield s.DistillationConfig, {}, {
        "loss": no_loss, "betas": [None, (0.9,), ("a", "b"), (2.0, 3.0), 0.9],
        "seed": ["2", 1.5, True, [1]], "max_minutes": ["1", math.nan, math.inf, 0.0, -1.0],
    }  # fmt: skip
    yield HardwareConfig, {}, {
        "autocast": ["bf16", 1, torch.bfloat16], "state_memory": [*NO_INT, -1], "state_dtype": ["half", 1],
    }  # fmt: skip
    yield settings(s.HealingConfig, [*NO_FLOAT, math.inf, -1.0], "learning_rate_ratio", "alpha", "dropout")
    yield s.HealingConfig, {}, {
        "rank": [*NO_INT, 0], "method": [*NO_TEXT, "full"], "where": [*NO_TEXT, "before"], "count": [*NO_INT, 1, -1],
        "head": [None, "yes"], "targets": [None, "q", (1,)],
    }  # fmt: skip
    yield Loss, {"name": "mine", "function": torch.sub, "compares": "states"}, {
        "name": NO_TEXT, "function": [None, 3, "kl"], "compares": [*NO_TEXT, "weights"], "paper": NO_TEXT,
    }  # fmt: skip
    yield register_loss, {}, {
        "loss": [None, "kl", torch.sub, Loss("kl", torch.sub, "states"), Loss("a b", torch.sub, "states")],
    }  # fmt: skip
    yield parse_replacement, {"text": "linear"}, {
        "text": ["linaer", "linear:rank=0", "linear:rank=1.5", "merged:weight=nan"],
    }  # fmt: skip
    yield s.CompressionConfig.preset, {"name": "best"}, {"name": [*NO_TEXT, "bets"]}
    yield register_replacement, {}, {"config": [None, "linear", nn.Linear, s.LinearConfig()]}
    yield ReplacementConfig.from_dict, {}, {"values": [None, "linear", {"kind": 3}, {"kind": "linear", "rank": "4"}]}
    yield register_module, {}, {"kind": NO_TEXT}
    yield (
        LinearReplacement,
        {"features": 4},
        {"features": [*NO_INT, -1, 0], "rank": [1.5, True, 0, 5, "1"], "diagonal": ["x"]},
    )
    yield freeze_all_but, {"model": OTHER}, {"modules": [None, "x", [{}], 3, nn.Linear(2, 2)]}
    yield compare_blocks, {"first": MODEL, "second": OTHER}, {"first": [*NO_MODEL, META], "second": [*NO_MODEL, META]}
    yield recall_at, {"queries": torch.eye(4), "documents": torch.eye(4)}, {"queries": [None, "x"], "k": [*NO_INT, 0]}
    yield read_plans, {}, {"model": [None, 3, {}, MODEL, "no-such-folder"]}
    yield measure_speed, {"models": {"m": MODEL}, "repeats": 1}, {
        "models": [None, {}, {"m": "x"}, {"m": META}, MODEL, [MODEL]], "tokens": [*NO_INT, 0],
    }  # fmt: skip
    yield opened(s.HiddenStateRecorder), {"model": MODEL}, {
        "model": NO_MODEL, "blocks": NO_BLOCKS, "tokens": [3, "x"], "sites": [3, "x", []], "config": [3, "x"],
    }  # fmt: skip
    yield RecordingConfig, {}, {"device": ["nonsense", [1]], "dtype": ["half", 3]}
    yield opened(HiddenStateMonitor), {"model": MODEL}, {"model": NO_MODEL, "every": [*NO_INT, 0], "log": [3, "x"]}
    yield opened(StochasticDepth), {"model": MODEL}, {
        "model": NO_MODEL, "rate": [*NO_FLOAT, 2.0, [math.nan] * 6, [True] * 6], "protect": NO_BLOCKS, "seed": NO_INT,
    }  # fmt: skip
    yield ProgressiveRemoval, {"model": OTHER}, {
        "schedule": [None, {}, [1], {"5": [1]}, {5.5: [1]}, {True: [1]}, {5: [1.5]}, {5: [True]}, {5: 1}, {5: [{}]}],
    }  # fmt: skip
    yield opened(s.LayerSurgeon), {}, {"model": [*NO_MODEL, EMPTY]}
    yield opened(s.LayerSurgeon), {"model": MODEL}, {"stack": NO_STACK}
    for method in ("remove", "check"):
        yield surgery(method), {}, {"window": [*NO_BLOCKS, None, []]}
    yield surgery("replace"), {"window": [1]}, {"module": ["x", nn.Identity, len, [{}]]}
    yield surgery("insert"), {"module": nn.Identity()}, {"k": [*NO_INT, -1, 7]}
    yield surgery("zero_branch"), {"branch": "mlp"}, {"k": [*NO_INT, -1, 6]}
    yield (
        placed,
        {"window": range(1, 3), "replacement_module": MAP},
        {"window": NO_BLOCKS, "replacement_module": ["linear", 3, {}]},
    )
    folder = str(Path(tempfile.gettempdir()) / "never-written")
    yield (
        s.save,
        {"model": MODEL, "folder": folder},
        {"model": [*NO_MODEL, META], "folder": [None, 3], "tokenizer": ["x", 3]},
    )
    yield s.load, {}, {"folder": [None, 3, ["x"], "no-such-folder", __file__]}
    stack = s.find_stack(MODEL)
    yield student_of, {"stack": stack, "replacement_modules": [(range(1, 3), MAP)]}, {
        "stack": [None, MODEL, "x"], "replacement_modules": [None, [{}], [range(1, 3)], [([1.5], MAP)],
        [(range(90, 99), MAP)]], "healing": ["lora", 3], "teacher": ["x", 3],
    }  # fmt: skip
    student = student_of(stack, [(range(1, 3), MAP)])
    yield s.train, {"student": student, "batches": GOOD, "validation": GOOD}, {
        "student": [None, "x", MODEL], "batches": NO_BATCHES, "validation": NO_BATCHES, "config": ["x", {}],
        "hardware": ["x", {}], "checkpoint_file": [3, []], "callbacks": [None, 3, [print]],
    }  # fmt: skip
    yield s.CompressionConfig, {}, {
        "remove": [None, True, math.nan, math.inf, -1, 0, [1], "1e-9", "nonsense", 1.5], "repair": [None, "linear", {}],
        "search": [None, "window", {}], "data": [None, {}], "distillation": ["kl", {}, True], "healing": [3, "lora"],
        "evaluation": [None, {}, True], "hardware": [None, "bfloat16"], "rounds": [*NO_INT, 0, 2],
        "train_until": ["1", True, math.nan, 1.0], "seed": NO_INT, "task": ["causal-lm"], "stack": [3, ["x"]],
    }  # fmt: skip
    yield s.DataConfig, {}, {
        "sequence_length": [*NO_INT, 0], "calibration_tokens": [*NO_INT, 1], "fitting_tokens": [1, True, "2"],
        "validation_tokens": [*NO_INT, 1], "test_tokens": [*NO_INT, 1], "repeated_context": [*NO_FLOAT, -0.1, 1.1],
    }  # fmt: skip
    yield EvaluationConfig, {}, {"speed": [None, "yes", 1], "generation": [None, "yes", 1]}
    yield s.CompressionConfig.from_dict, {}, {"values": [None, 3, "remove", {"remvoe": 1}, {"schema": 99}]}
    yield s.CompressionConfig.load, {}, {"path": ["no-such-file", __file__]}
    config = s.CompressionConfig(remove=1, search=WindowSearch(shortlist=1))
    whole: dict[str, Any] = {"model": MODEL, "data": PARTS, "config": config}
    no_parts = [{**PARTS, "test": []}, {**PARTS, "test": [{}]}, {"calibration": GOOD}]
    wrong = [
        replace(config, remove=1e-9),
        replace(config, stack="nowhere"),
        replace(config, search=WindowSearch(protect=(9,))),
    ]
    yield compressed, whole, {
        "model": [*NO_MODEL, META, EMPTY, SINGLE], "data": [*NO_TEXTS, *no_parts, [GOOD[0]]], "tokenizer": ["x", 3],
        "config": [3, "best", {}, {"remove": 1}, *wrong], "output": [3, []], "inplace": [None, "x"],
        "options": [3, "x", {}, s.RunOptions(checkpoint_file="kept"), s.RunOptions(resume=True)],
        "remove": ["x", -1], "keep": [1],
    }  # fmt: skip
    yield s.RunOptions, {}, {
        "teacher": ["x", META], "profile": ["x"], "checkpoint_file": [3, []], "callbacks": [None, 3, [print]],
        "resume": [None, "x"], "overwrite": [None, 1], "test_texts": [3, "a", [3]],
    }  # fmt: skip
    tokenizer = NoTokenizer()
    plain = NoneConfig()
    yield s.sweep, {"model": MODEL, "tokenizer": tokenizer, "data": ["a"], "remove": [1], "repair": [plain]}, {
        "model": [*NO_MODEL, META], "tokenizer": [None], "data": [None, 3, "a"], "config": [3, {}],
        "repair": [None, [], plain, ["none"], [{}]], "remove": [None, [], 1, "1", [{}]], "speed": [3, True, {}],
    }  # fmt: skip
    yield sliding_perplexity, {"model": MODEL, "tokenizer": tokenizer, "texts": ["a"]}, {
        "model": [*NO_MODEL, META], "texts": NO_TEXTS, "batch_size": [*NO_INT, 0],
    }  # fmt: skip
    yield s.evaluate, {"model": MODEL, "tokenizer": tokenizer, "suite": Suite(text={"a": ["b"]})}, {
        "model": [*NO_MODEL, META], "suite": [None, {}, Suite(text=["no-such-file"])], "reference": ["x", META],
    }  # fmt: skip
    yield Suite, {}, {
        "text": [None, 3, "a", [{}], {"a": "b"}, {"a": [1]}], "timed": [3, (1,), ("a",) * 3],
        "batch_size": [*NO_INT, 0], "probes": [*NO_INT, -1], "temperature": [*NO_FLOAT, -1.0],
        "tasks": [None, "a", [1]],
    }  # fmt: skip


TABLE = list(rows())


@pytest.mark.parametrize("row", TABLE, ids=[f"{k}-{row[0].__name__}" for k, row in enumerate(TABLE)])
def test_what_cannot_work_raises_and_leaves_the_model_as_it_was(row: Row) -> None:
    function, given, wrong = row
    given = {name: value for name, value in given.items() if value is not None or name == "tokenizer"}
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    unexpected = []
    for name, values in wrong.items():
        for value in values:
            try:
                function(**given | {name: value})
            except StreamlineError as error:
                assert str(error)
            except Exception as error:
                unexpected.append(f"{name}={value!r:.60}: {type(error).__name__}: {error}")
            else:
                unexpected.append(f"{name}={value!r:.60} was accepted")
    assert not unexpected, "\n".join(unexpected)
    after = MODEL.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(s.find_stack(MODEL)) == MODEL.config.num_hidden_layers == 6
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in MODEL.modules())


@pytest.mark.parametrize(
    ("call", "value", "remedy"),
    [
        (lambda: s.profile(META, GOOD), "meta device", "from_pretrained"),
        (lambda: s.profile(MODEL, GOOD, protect=[1.5]), r"protect=\[1.5\]", "block numbers"),
        (lambda: surgery("remove")(window=[True]), r"\[True\]", "range"),
        (lambda: s.profile(MODEL, [IDS[0]]), r"\(8,\)", r"ids\[None\]"),
        (lambda: s.profile(MODEL, [IDS + 1_000]), "10", "tokenizer of this model"),
        (lambda: s.profile(MODEL, iter(())), "batches", "Pass a list"),
        (lambda: s.compress(MODEL, PARTS, configured(remove=1e-9)), "1e-09", "remove=1 "),
        (lambda: parse_loss("nan*kl"), "'nan' of 'kl'", "a number above 0"),
        (lambda: s.perplexity("model", GOOD), "model='model'", "from_pretrained"),  # type: ignore[arg-type]
    ],
)
def test_the_text_names_the_value_and_the_remedy(call: Callable[[], Any], value: str, remedy: str) -> None:
    with pytest.raises(StreamlineError, match=f"(?s){value}.*{remedy}"):
        call()


def test_what_can_be_gone_through_once_is_taken() -> None:
    again = s.profile(MODEL, iter(GOOD), protect=iter([0]))  # type: ignore[arg-type]
    assert again.tokens == PROFILE.tokens
    assert s.find_stack(model=MODEL).path == "model.layers"


def test_a_call_that_does_not_match_the_signature_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        s.profile(MODEL, GOOD, nonsense=1)  # type: ignore[call-arg]
