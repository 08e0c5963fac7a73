"""Tasks of lm-eval on models in memory, which come back as they were, and lm-eval's own command on the same models."""

from __future__ import annotations

import copy
import json
import math
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
from transformers import T5Config, T5ForConditionalGeneration

from streamline_hooks import LayerSurgeon, StreamlineError, save
from streamline_hooks.evaluation import PairedScores, TaskSettings, relative_accuracy, run_tasks, task_config_from_rows
from streamline_hooks.evaluation.lm_eval_tasks import load_tasks, metrics_of
from streamline_hooks.evaluation.perplexity import NotFiniteLikelihood
from streamline_hooks.modeling import find_stack
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import PromptSkip, base_class
from tests.evaluation.local_tasks import write_questions, write_task, write_texts
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


def test_an_item_counts_once_however_many_filters_a_task_has(stories: tuple[Any, Any], tasks: Path) -> None:
    task = task_config_from_rows(
        [{"context": "Once upon a", "continuation": end} for end in ("time", "girl", "mat")], "ends"
    )
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "flexible")]
    once, twice = (run_tasks(*stories, [one])["ends"] for one in (task, {**task, "filter_list": filters}))
    assert {name.partition(",")[2] for name in twice.metrics["ends"]} == {"strict", "flexible"}
    assert twice.scores == once.scores and len(once.scores) == 3


def test_a_model_is_run_under_autocast_if_that_is_on(stories: tuple[Any, Any], tasks: Path) -> None:
    task = task_config_from_rows([{"context": "Once upon a", "continuation": "time"}] * 2, "ends")
    full = run_tasks(*stories, [task])["ends"].metrics["ends"]["perplexity"]
    with torch.autocast("cpu", torch.bfloat16):
        half = run_tasks(*stories, [task])["ends"].metrics["ends"]["perplexity"]
    assert half[0] == pytest.approx(full[0], rel=0.1) and half != full
    assert run_tasks(*stories, [task])["ends"].metrics["ends"]["perplexity"] == full


def test_metrics_and_scores(stories: tuple[Any, Any], tasks: Path) -> None:
    found = run_tasks(*stories, [str(tasks)])
    assert set(found) == {"likeliest", "texts"}
    result = found["likeliest"]
    assert result.metrics["likeliest"]["acc"] == (
        pytest.approx(2 / 3),
        pytest.approx(np.std([1, 1, 0], ddof=1) / 3**0.5),
    )
    assert (result.metric, result.scores, result.generates) == ("acc", (1.0, 1.0, 0.0), False)
    assert (result.accuracy, result.standard_error) == result.metrics["likeliest"]["acc"]
    assert result.chance == pytest.approx(1 / 3)
    assert [max(nats) == nats[ROWS[k]["gold"]] for k, nats in enumerate(result.loglikelihoods)] == [True, True, False]
    for row, counts in zip(ROWS, result.tokens, strict=True):
        texts = [row["query"], *(f"{row['query']} {choice}" for choice in row["choices"])]
        context, *wholes = (len(stories[1](text)["input_ids"]) for text in texts)
        assert list(counts) == [whole - context for whole in wholes]
    texts = found["texts"]
    assert set(texts.metrics["texts"]) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert texts.metrics["texts"]["bits_per_byte"][1] is None
    assert texts.metric == "" and texts.scores == () and math.isnan(texts.accuracy) and texts.generates
    assert (result.items, result.few_shot, result.versions) == (
        {"likeliest": 3},
        {"likeliest": 0},
        {"likeliest": "2.5"},
    )


def test_the_scores_are_what_the_statistics_need(stories: tuple[Any, Any]) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    task = task_config_from_rows(ROWS * 20, "mine")
    before = run_tasks(model, tokenizer, [task])["mine"]
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 4))
        after = run_tasks(model, tokenizer, [task])["mine"]
    kept = relative_accuracy([PairedScores("mine", before.scores, after.scores, before.chance)])["classification"]
    assert kept.ratio.value == pytest.approx(after.accuracy / before.accuracy)
    assert kept.ratio.low <= kept.ratio.value <= kept.ratio.high


def test_the_metric_that_is_asked_for(stories: tuple[Any, Any], tasks: Path) -> None:
    found = run_tasks(*stories, [str(tasks)], TaskSettings(metric="acc_norm"))
    assert (found["likeliest"].metric, found["texts"].metric) == ("acc_norm", "")
    assert found["likeliest"].accuracy == found["likeliest"].metrics["likeliest"]["acc_norm"][0]


@pytest.mark.parametrize(("yes", "items", "chance"), [(3, 4, 2 / 3), (2, 4, 0.5), (1, 1, 0.5), (4, 4, 1.0)])
def test_chance_of_questions_with_the_same_choices(
    yes: int, items: int, chance: float, stories: tuple[Any, Any]
) -> None:
    """The share of "yes" among the other items, because the share among all is above 0.5 if few are drawn of many."""
    rows = [{"query": f"Is it {k}?", "choices": ["no", "yes"], "gold": int(k < yes)} for k in range(items)]
    assert run_tasks(*stories, [task_config_from_rows(rows, "mine")])["mine"].chance == pytest.approx(chance)


def test_a_group_is_one_task(stories: tuple[Any, Any], tasks: Path) -> None:
    write_questions(tasks, "more", ROWS[:2])
    aggregate = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "both", "task": ["likeliest", "more"], "aggregate_metric_list": aggregate}
    (tasks / "both.yaml").write_text(json.dumps(group))
    found = run_tasks(*stories, [str(tasks)])
    assert set(found) == {"both", "texts"}
    both = found["both"]
    assert set(both.metrics) == {"both", "likeliest", "more"} and both.items == {"likeliest": 3, "more": 2}
    assert both.scores == (1.0, 1.0, 0.0, 1.0, 1.0) and both.accuracy == pytest.approx(both.metrics["both"]["acc"][0])
    assert set(run_tasks(*stories, [str(tasks / "more.yaml")])) == {"more"}


def test_chance_of_a_group_counts_the_same_choices_together(stories: tuple[Any, Any], tasks: Path) -> None:
    def write(name: str, choices: list[str], answers: list[int]) -> None:
        rows = [{"query": f"Is it {k}?", "choices": choices, "gold": gold} for k, gold in enumerate(answers)]
        write_questions(tasks, name, rows)

    write("yes", ["no", "yes"], [1] * 18 + [0] * 2)
    write("true", ["false", "true"], [0] * 9)
    write("more_true", ["false", "true"], [1] * 9 + [0])
    group = {"group": "all", "task": ["yes", "true", "more_true"]}
    (tasks / "all.yaml").write_text(json.dumps({**group, "aggregate_metric_list": [{"metric": "acc"}]}))
    expected = (20 * 17 / 19 + 19 * 0.5) / 39
    assert run_tasks(*stories, [str(tasks)])["all"].chance == pytest.approx(expected)


def test_items_few_shot_and_bos(stories: tuple[Any, Any], tasks: Path) -> None:
    write_questions(tasks, "none_ever", ROWS, num_fewshot=0)
    files = [str(tasks / f"{name}.yaml") for name in ("likeliest", "none_ever")]
    found = run_tasks(*stories, files, TaskSettings(items=2, few_shot=1))
    assert [found[name].items[name] for name in found] == [2, 2]
    assert [found[name].few_shot[name] for name in found] == [1, 0]  # lm-eval leaves a task its fixed zero
    with_bos, without = (
        run_tasks(*stories, [str(tasks / "texts.yaml")], TaskSettings(add_bos=add_bos))["texts"]
        for add_bos in (None, False)
    )
    bits = [one.metrics["texts"]["bits_per_byte"][0] for one in (with_bos, without)]
    assert bits[0] > bits[1]  # the tokenizer puts BOS in front, and it is then predicted too


def test_a_subset_is_seeded_and_the_same_for_all_models(stories: tuple[Any, Any]) -> None:
    rows = [{"query": f"{k} and", "choices": [str(k + 1), str(2 * k)], "gold": k % 2} for k in range(12)]
    task = task_config_from_rows(rows, "sums")
    whole = run_tasks(*stories, [task])["sums"]
    some = [run_tasks(*stories, [task], TaskSettings(items=5, seed=seed))["sums"] for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2] and len(some[0].scores) == 5
    places = [
        [round(nats[0], 3) for nats in whole.loglikelihoods].index(round(one[0], 3)) for one in some[0].loglikelihoods
    ]
    assert places == sorted(places) and [whole.scores[k] for k in places] == list(some[0].scores)


def test_the_same_seed_draws_the_same_examples(stories: tuple[Any, Any], tasks: Path) -> None:
    rows = [{"query": f"{k} and", "choices": [str(k + 1), str(2 * k)], "gold": k % 2} for k in range(12)]
    write_questions(tasks, "sums", rows)

    def measured(seed: int) -> list[Any]:
        seen: list[Any] = []
        handle = stories[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].tolist()))
        run_tasks(*stories, [str(tasks / "sums.yaml")], TaskSettings(few_shot=2, items=3, seed=seed))
        handle.remove()
        return seen

    assert measured(1) == measured(1) != measured(2)


def test_prompts_of_different_length_generate_as_each_alone(stories: tuple[Any, Any], tasks: Path) -> None:
    """Padded on the left, a short prompt gives the same text as without padding."""
    rows = [{"prompt": prompt, "answer": "x"} for prompt in ("Once upon a time, there was a little girl", "The dog")]
    generation = {"until": ["\n"], "do_sample": False, "max_gen_toks": 12}
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    given = {"doc_to_text": "prompt", "doc_to_target": "answer", "metric_list": metrics}
    texts = []
    for size in (1, 2):
        write_task(tasks, "write", rows, "generate_until", generation_kwargs=generation, **given)
        (task,) = load_tasks([str(tasks / "write.yaml")], TaskSettings(batch_size=size)).values()
        assert task.run(*stories).generates
        (inner,) = task.tasks.values()
        texts.append([instance.resps for instance in inner.instances])
    assert texts[0] == texts[1] and len(set(map(str, texts[0]))) == 2


def test_a_digest_sees_data_settings_and_config(stories: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"

    def digest(rows: list[dict[str, Any]] = ROWS, **settings: Any) -> str:
        path.write_text("\n".join(map(json.dumps, rows)))
        (task,) = load_tasks([str(path)], TaskSettings(**settings)).values()
        return task.digest()

    first = digest()
    assert digest() == first
    others = [digest(ROWS[:2]), digest([*ROWS[:2], ROWS[2] | {"gold": 0}]), digest(few_shot=1), digest(items=2)]
    assert len({first, *others, digest(metric="acc_norm")}) == 6


def test_a_log_likelihood_that_is_not_finite_is_no_answer(stories: tuple[Any, Any]) -> None:
    model = copy.deepcopy(stories[0])
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NotFiniteLikelihood, match=r"mine: .*item 0.*nan"):
        run_tasks(model, stories[1], [task_config_from_rows(ROWS, "mine")])


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
    result = run_tasks(model, tokenizer, [str(tasks / "likeliest.yaml")])
    assert settings() == before
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert all(held[name] is p for name, p in model.named_parameters(remove_duplicate=False))
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.config.tie_word_embeddings = False  # nothing is tied, and it was measured with what it had
    assert run_tasks(model.eval(), tokenizer, [str(tasks / "likeliest.yaml")]) == result


def test_models_with_splices_and_under_a_surgeon(stories: tuple[Any, Any], tasks: Path) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    whole = run_tasks(model, tokenizer, [str(tasks / "texts.yaml")])
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(2, 4))
        removed = run_tasks(model, tokenizer, [str(tasks / "texts.yaml")])
    assert run_tasks(model, tokenizer, [str(tasks / "texts.yaml")]) == whole
    changed = run_tasks(spliced(model), tokenizer, [str(tasks / "texts.yaml")])
    assert type(model) is not base_class(type(model))
    assert type(model.config) is not base_class(type(model.config))
    bits = [found["texts"].metrics["texts"]["bits_per_byte"][0] for found in (whole, removed, changed)]
    assert bits[0] < min(bits[1:]) and len({round(value, 6) for value in bits}) == 3


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_head_runs_from_the_first_scored_token_of_a_batch(
    batch_size: int, stories: tuple[Any, Any], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    settings = TaskSettings(batch_size=batch_size)
    found = run_tasks(model, tokenizer, [tasks / "likeliest.yaml", tasks / "texts.yaml"], settings)
    lengths: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda head, args: lengths.append(args[0].shape[1]))
    assert run_tasks(model, tokenizer, [tasks / "likeliest.yaml"], settings)["likeliest"] == found["likeliest"]
    if batch_size == 1:
        expected = []
        for row in ROWS:
            context = len(tokenizer(row["query"]).input_ids)
            expected += [len(tokenizer(f"{row['query']} {end}").input_ids) - context for end in row["choices"]]
        assert sorted(set(lengths)) == sorted(set(expected))
    forward = type(model).forward

    def without_limit(self: Any, input_ids: Any, **settings: Any) -> Any:
        """Compute the logits of all tokens."""
        return forward(self, input_ids, **settings)

    monkeypatch.setattr(type(model), "forward", without_limit)
    whole = run_tasks(model, tokenizer, [tasks / "likeliest.yaml", tasks / "texts.yaml"], settings)
    for name, result in found.items():
        assert whole[name].scores == result.scores and whole[name].items == result.items
        flat = [[nat for item in r.loglikelihoods for nat in item] for r in (whole[name], result)]
        torch.testing.assert_close(*flat, rtol=1e-5, atol=1e-4)


def test_choices_of_an_encoder_decoder(stories: tuple[Any, Any], tasks: Path) -> None:
    tokenizer = stories[1]
    config = T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=len(tokenizer), decoder_start_token_id=0
    )
    model: Any = T5ForConditionalGeneration(config).eval()
    settings = TaskSettings(batch_size=1)
    found = run_tasks(model, tokenizer, [tasks / "likeliest.yaml"], settings)["likeliest"].loglikelihoods
    context = tokenizer(ROWS[1]["query"], return_tensors="pt").input_ids
    ids = tokenizer(" shining.", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        nats = model(input_ids=context, labels=ids).logits[0].log_softmax(dim=-1)
    assert found[1][0] == pytest.approx(float(nats.gather(1, ids[0][:, None]).sum()), rel=1e-4)


@pytest.mark.parametrize(("committed", "last_tokens"), [(False, 1), (False, 2), (True, 2)])
def test_contexts_of_choices_skip_blocks(
    committed: bool, last_tokens: int, stories: tuple[Any, Any], tasks: Path
) -> None:
    """The expected likelihoods come from a forward pass per choice, in which all but the context's last tokens skip."""
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    full = run_tasks(model, tokenizer, [tasks / "likeliest.yaml"])["likeliest"].loglikelihoods
    blocks = len(find_stack(model))
    with PromptSkip(model, range(blocks - 2, blocks), last_tokens=last_tokens) as skip:
        if committed:
            skip.commit()
        found = run_tasks(model, tokenizer, [tasks / "likeliest.yaml"])["likeliest"].loglikelihoods
        expected = []
        for row in ROWS:
            context = tokenizer(row["query"]).input_ids
            for choice in row["choices"]:
                ids = tokenizer(f"{row['query']} {choice}", return_tensors="pt").input_ids
                with torch.no_grad(), skip.marked(torch.arange(ids.shape[1])[None] < len(context) - last_tokens):
                    nats = model(ids).logits[0].log_softmax(dim=-1)
                scored = range(len(context), ids.shape[1])
                expected.append(float(sum(nats[k - 1, ids[0, k]] for k in scored)))
    torch.testing.assert_close([nat for item in found for nat in item], expected, rtol=0, atol=1e-3)
    assert not any(abs(a - b) < 1e-3 for x, y in zip(found, full, strict=True) for a, b in zip(x, y, strict=True))


def test_documents_have_no_prompt(stories: tuple[Any, Any], tasks: Path) -> None:
    model, tokenizer = stories
    full = run_tasks(model, tokenizer, [tasks / "texts.yaml"])["texts"].metrics
    with PromptSkip(model, range(2, 4), last_tokens=1):
        assert run_tasks(model, tokenizer, [tasks / "texts.yaml"])["texts"].metrics == full


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "imported",
    [pytest.param(False, marks=pytest.mark.long), True],
    ids=["by the code in the folder", "with the library imported"],
)
def test_a_saved_model_under_its_own_command_line(
    imported: bool, stories: tuple[Any, Any], tasks: Path, tmp_path: Path
) -> None:
    """Every number is the one that the model in memory gives."""
    model, tokenizer = spliced(copy.deepcopy(stories[0])), stories[1]
    folder = save(model, tmp_path / "model", tokenizer=tokenizer)
    expected = run_tasks(model, tokenizer, [str(tasks)], TaskSettings(batch_size=2))
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
    for task, result in expected.items():
        for metric, (value, _) in result.metrics[task].items():
            assert found[task][f"{metric},none"] == pytest.approx(value, rel=1e-6), metric
    original = run_tasks(*stories, [str(tasks / "texts.yaml")])["texts"].metrics["texts"]["bits_per_byte"][0]
    assert original != pytest.approx(found["texts"]["bits_per_byte,none"], rel=1e-3)


@pytest.mark.slow
def test_unknown_tasks_and_data_that_is_missing(stories: tuple[Any, Any], tasks: Path) -> None:
    with pytest.raises(StreamlineError, match=r"'arc_eassy'.*arc_easy"):
        run_tasks(*stories, ["arc_eassy"])
    with pytest.raises(StreamlineError, match=r"'0000'.*`lm-eval.*tasks`"):
        run_tasks(*stories, ["0000"])
    (tasks / "texts.jsonl").unlink()
    with pytest.raises(StreamlineError, match=r"texts.*texts.jsonl"):
        run_tasks(*stories, [str(tasks / "texts.yaml")])
    with pytest.raises(StreamlineError, match=r"piqa.*hub"):
        run_tasks(*stories, ["piqa"])


@pytest.mark.long
def test_what_cannot_be_run(stories: tuple[Any, Any], tasks: Path) -> None:
    model, tokenizer = stories
    file = str(tasks / "likeliest.yaml")
    with pytest.raises(StreamlineError, match=r"a Linear and a .*lm-eval"):
        run_tasks(nn.Linear(2, 2), tokenizer, [file])
    with pytest.raises(StreamlineError, match=r"LlamaForCausalLM and a str.*lm-eval"):
        run_tasks(model, "tokenizer", [file])
    for wrong in (file, []):
        with pytest.raises(StreamlineError, match="Expected a list"):
            run_tasks(model, tokenizer, wrong)
    for given in ({"items": 0}, {"few_shot": -1}, {"batch_size": 0}):
        with pytest.raises(StreamlineError, match=r"=(0|-1) is out of range.*at least"):
            TaskSettings(**given)
    (tasks / "empty").mkdir()
    for name in ("empty", "absent.yaml"):
        with pytest.raises(StreamlineError, match=rf"{name}.*Expected"):
            run_tasks(model, tokenizer, [str(tasks / name)])
    with pytest.raises(StreamlineError, match=r"absent.jsonl cannot be read"):
        run_tasks(model, tokenizer, [str(tasks / "absent.jsonl")])


def test_a_choice_that_is_longer_than_the_positions(stories: tuple[Any, Any]) -> None:
    rows = [{"query": "One", "choices": ["a", "cat " * 600], "gold": 0}]
    with pytest.raises(StreamlineError, match=r"cat cat.*tokens.*512 positions"):
        run_tasks(*stories, [task_config_from_rows(rows, "mine")])


def test_without_lm_eval_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(StreamlineError, match=r'Install.*"streamline_hooks\[tasks\]"'):
        run_tasks(nn.Linear(2, 2), None, ["piqa"])


def test_metrics_behind_filters() -> None:
    found = metrics_of(
        {
            "alias": "sums", "name": "sums", "sample_len": 8,
            "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1,
            "exact_match,flexible": np.float64(0.5), "exact_match_stderr,flexible": "N/A",
            "acc,none": 0, "acc_stderr,none": 0.0, "bypass,none": " ",
        }
    )  # fmt: skip
    assert found == {
        "exact_match,strict": (0.25, 0.1), "exact_match,flexible": (0.5, None), "acc": (0.0, 0.0),
    }  # fmt: skip


def test_no_question_is_an_example_of_itself(stories: tuple[Any, Any], tasks: Path) -> None:
    rows = [{"query": f"{k} and", "choices": [str(k + 1), str(2 * k)], "gold": k % 2} for k in range(5)]
    write_questions(tasks, "sums", rows)
    for source in (task_config_from_rows(rows, "sums"), str(tasks / "sums.yaml")):
        (task,) = load_tasks([source], TaskSettings(few_shot=4))["sums"].tasks.values()
        task.set_fewshot_seed(0)
        for row in task.eval_docs:
            context = task.fewshot_context(row, 4)
            assert context.count(row["query"]) == 1 and context.endswith(row["query"])
            assert sum(other["query"] in context for other in rows) == 5
