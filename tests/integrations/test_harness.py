"""lm-eval on models in memory and in folders, which come back as they were."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, LinearReplacement, StreamlineError, save
from streamline_hooks.integrations import HarnessResult, Measured, run_harness
from streamline_hooks.surgery.spliced_model import base_class
from tests.integrations.local_tasks import write_questions, write_task, write_texts
from tests.processes import ROOT

ROWS = [
    {"query": "Once upon a time, there was a girl named", "choices": ["Lily.", "engine.", "very."], "gold": 0},
    {"query": "The sun was", "choices": ["shining.", "a tax on the.", "up all the day and the night."], "gold": 0},
    {"query": "Tom was sad. He started to", "choices": ["cry.", "the.", "of of of."], "gold": 1},
]
TEXTS = ["Once upon a time, there was a little girl named Lily. She loved to play outside.", "The dog was happy."]


@pytest.fixture()
def tasks(tmp_path: Path) -> Iterator[Path]:
    pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
    write_questions(tmp_path / "tasks", "likeliest", ROWS)
    yield write_texts(tmp_path / "tasks", "texts", TEXTS)


def spliced(model: nn.Module) -> nn.Module:
    """The model with a map in the place of two blocks."""
    with LayerSurgeon(model) as surgeon:
        width = model.config.hidden_size
        generator = torch.Generator().manual_seed(1)
        change = 0.02 * torch.randn(width, width, generator=generator)
        surgeon.replace(range(2, 4), LinearReplacement.from_map(change))
        surgeon.commit()
    return model


def test_it_gives_what_there_is_to_know(stories: tuple[Any, Any], tasks: Path) -> None:
    result = run_harness(*stories, ["likeliest", "texts"], task_folder=tasks)
    assert set(result.tasks) == {"likeliest", "texts"}
    accuracy = result.tasks["likeliest"]["acc"]
    assert accuracy.value == pytest.approx(2 / 3)
    assert accuracy.standard_error == pytest.approx(np.std([1, 1, 0], ddof=1) / np.sqrt(3))
    assert set(result.tasks["texts"]) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert result.tasks["texts"]["bits_per_byte"].standard_error is None
    assert result.items == {"likeliest": 3, "texts": 2}
    assert result.few_shot == {"likeliest": 0, "texts": 0}
    assert result.task_versions == {"likeliest": "2.5", "texts": "2.5"}
    assert result.packages["torch"] == torch.__version__ and "lm_eval" in result.packages
    said = json.loads(json.dumps(result.to_dict()))
    assert said["tasks"]["likeliest"]["acc"]["value"] == accuracy.value
    lines = result.table().splitlines()
    assert len(lines) == 1 + 2 + 3
    assert lines[1].split() == ["likeliest", "acc", "0.6667", "±", "0.3333", "3", "0", "2.5"]


def test_limit_and_few_shot_and_bos_are_handed_on(stories: tuple[Any, Any], tasks: Path) -> None:
    write_questions(tasks, "none_ever", ROWS, num_fewshot=0)
    result = run_harness(*stories, ["likeliest", "none_ever"], task_folder=tasks, limit=2, few_shot=1)
    assert result.items == {"likeliest": 2, "none_ever": 2}
    assert result.few_shot == {"likeliest": 1, "none_ever": 0}  # lm-eval leaves a task its fixed zero
    with_bos, without = (
        run_harness(*stories, ["texts"], task_folder=tasks, add_bos=add_bos).tasks["texts"]["bits_per_byte"].value
        for add_bos in (None, False)
    )
    assert with_bos > without  # which the tokenizer puts in front, and which is then predicted too


def test_the_same_seed_draws_the_same_examples(stories: tuple[Any, Any], tasks: Path) -> None:
    rows = [{"query": f"{k} and", "choices": [str(k + 1), str(2 * k)], "gold": k % 2} for k in range(12)]
    write_questions(tasks, "sums", rows)

    def measured(seed: int) -> list[Any]:
        seen: list[Any] = []
        handle = stories[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].tolist()))
        run_harness(*stories, ["sums"], task_folder=tasks, few_shot=2, limit=3, seed=seed)
        handle.remove()
        return seen

    assert measured(1) == measured(1) != measured(2)


def test_everything_is_left_as_it_was(stories: tuple[Any, Any], tasks: Path) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), copy.deepcopy(stories[1])
    tokenizer.pad_token = None  # lm-eval chooses one
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight = nn.Parameter(1.5 * model.lm_head.weight.detach())  # lm-eval would tie it
    model.config.tie_word_embeddings = True
    held = dict(model.named_parameters(remove_duplicate=False))

    def settings() -> list[dict[str, Any]]:
        return copy.deepcopy([model.config.to_dict(), model.generation_config.to_dict(), tokenizer.special_tokens_map])

    before, weights = settings(), copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    result = run_harness(model, tokenizer, ["likeliest"], task_folder=tasks)
    assert settings() == before
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert all(held[name] is p for name, p in model.named_parameters(remove_duplicate=False))
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.config.tie_word_embeddings = False  # nothing is tied, and it was measured with what it had
    assert run_harness(model.eval(), tokenizer, ["likeliest"], task_folder=tasks).tasks == result.tasks


def test_models_with_splices_and_under_a_surgeon(stories: tuple[Any, Any], tasks: Path) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    whole = run_harness(model, tokenizer, ["texts"], task_folder=tasks)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(2, 4))
        removed = run_harness(model, tokenizer, ["texts"], task_folder=tasks)
    assert run_harness(model, tokenizer, ["texts"], task_folder=tasks).tasks == whole.tasks
    changed = run_harness(spliced(model), tokenizer, ["texts"], task_folder=tasks)
    assert type(model) is not base_class(type(model))
    assert type(model.config) is not base_class(type(model.config))
    bits = [found.tasks["texts"]["bits_per_byte"].value for found in (whole, removed, changed)]
    assert bits[0] < min(bits[1:]) and len({round(value, 6) for value in bits}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("imported", [False, True], ids=["by the code in the folder", "with the library imported"])
def test_a_saved_model_under_its_own_command_line(
    imported: bool, stories: tuple[Any, Any], tasks: Path, tmp_path: Path
) -> None:
    """Every number is the one that the model in memory gives."""
    model, tokenizer = spliced(copy.deepcopy(stories[0])), stories[1]
    folder = save(model, tmp_path / "model", tokenizer=tokenizer)
    expected = run_harness(model, tokenizer, ["likeliest", "texts"], task_folder=tasks, batch_size=2)
    start = "import runpy, sys; sys.argv[0] = 'lm_eval'; "
    start += "import streamline_hooks; " if imported else "sys.modules['streamline_hooks'] = None; "
    start += "runpy.run_module('lm_eval', run_name='__main__', alter_sys=True)"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }

    trust = "" if imported else ",trust_remote_code=True"
    command = [
        sys.executable, "-c", start, "--model", "hf", "--model_args", f"pretrained={folder}{trust}",
        "--tasks", "likeliest,texts", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "2",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    (path,) = (tmp_path / "out").glob("**/results_*.json")
    found = json.loads(path.read_text())["results"]
    for task, metrics in expected.tasks.items():
        for metric, measured in metrics.items():
            assert found[task][f"{metric},none"] == pytest.approx(measured.value, rel=1e-6), metric
    original = run_harness(*stories, ["texts"], task_folder=tasks).tasks["texts"]["bits_per_byte"].value
    assert original != pytest.approx(found["texts"]["bits_per_byte,none"], rel=1e-3)


@pytest.mark.slow
def test_unknown_tasks_and_data_that_is_missing(stories: tuple[Any, Any], tasks: Path) -> None:
    with pytest.raises(StreamlineError, match=r"'liklyest'.*'"):
        run_harness(*stories, ["texts", "liklyest"], task_folder=tasks)
    with pytest.raises(StreamlineError, match=r"'arc_eassy'.*arc_easy"):
        run_harness(*stories, ["arc_eassy"])
    with pytest.raises(StreamlineError, match=r"'0000'.*`lm-eval.*tasks`"):
        run_harness(*stories, ["0000"])
    (tasks / "texts.jsonl").unlink()
    with pytest.raises(StreamlineError, match=r"texts: .*texts.jsonl"):
        run_harness(*stories, ["texts"], task_folder=tasks)
    with pytest.raises(StreamlineError, match=r"'/no/such'.*give"):
        run_harness(*stories, ["texts"], task_folder="/no/such")


@pytest.mark.slow
def test_a_task_of_lm_evals_own_that_needs_the_network_says_so(stories: tuple[Any, Any]) -> None:
    pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
    with pytest.raises(StreamlineError, match=r"piqa.*hub"):
        run_harness(*stories, ["piqa"])


def test_your_task_goes_before_lm_evals(stories: tuple[Any, Any], tasks: Path) -> None:
    write_questions(tasks, "piqa", ROWS)
    write_task(tasks, "unused", ROWS, "multiple_choice")
    assert run_harness(*stories, ["piqa"], task_folder=tasks).items == {"piqa": 3}


def test_what_cannot_be_run(stories: tuple[Any, Any], tasks: Path) -> None:
    model, tokenizer = stories
    with pytest.raises(StreamlineError, match=r"a Linear and a .*lm-eval"):
        run_harness(nn.Linear(2, 2), tokenizer, ["texts"])
    with pytest.raises(StreamlineError, match=r"LlamaForCausalLM and a str.*lm-eval"):
        run_harness(model, "tokenizer", ["texts"])
    for wrong in ("texts", []):
        with pytest.raises(StreamlineError, match="expected a list"):
            run_harness(model, tokenizer, wrong)
    for given in ({"limit": 0}, {"few_shot": -1}, {"batch_size": 0}):
        with pytest.raises(StreamlineError, match=r"expected 1 or.*1 or.*0 or"):
            run_harness(model, tokenizer, ["texts"], **given)


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(StreamlineError, match=r'Install.*"streamline_hooks\[harness\]"'):
        run_harness(nn.Linear(2, 2), None, ["texts"])


def test_metrics_behind_filters_are_told_apart() -> None:
    from streamline_hooks.integrations.harness import metrics_of

    found = metrics_of(
        {
            "alias": "sums", "name": "sums", "sample_len": 8,
            "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1,
            "exact_match,flexible": np.float64(0.5), "exact_match_stderr,flexible": "N/A",
            "acc,none": 0, "acc_stderr,none": 0.0, "bypass,none": " ",
        }
    )  # fmt: skip
    assert found == {
        "exact_match,strict": Measured(0.25, 0.1),
        "exact_match,flexible": Measured(0.5),
        "acc": Measured(0.0, 0.0),
    }
    assert "sums  acc" in HarnessResult({"sums": found}).table()
