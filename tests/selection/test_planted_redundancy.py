"""A run of blocks that does next to nothing is found, by every criterion that should find it."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch import nn

from streamline_hooks.evaluation import task_config_from_rows
from streamline_hooks.selection.accuracy import accuracy_drop
from streamline_hooks.selection.criteria import CRITERIA, combine_criteria
from streamline_hooks.selection.scoring import score_windows
from streamline_hooks.statistics import profile
from tests.evaluation.number_tasks import number_tokenizer, rows_of
from tests.tiny_models import VOCABULARY, tiny_config

LENGTH = 8
FINDS = {
    "cosine",
    "angular",
    "last_angular",
    "block_influence",
    "relative_magnitude",
    "cosine_and_magnitude",
    "perplexity",
    "kl",
    "repaired_residual",
    "taylor",
}
CANNOT = {
    "random": "looks at nothing",
    "last_n": "looks at the place alone",
    "last_n_but_final": "looks at the place alone",
}
RUNS = [range(1, 4), range(2, 5), range(3, 6), range(4, 8), range(0, 2)]


@functools.cache
def planted(run: range, seed: int) -> tuple[nn.Module, list[torch.Tensor]]:
    """A random model in which a run of blocks hardly writes to the residual stream, and text of its own.

    Of any other text a random model knows nothing: its perplexity may fall when a block goes that does much.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=LENGTH)).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        for k in run:
            model.model.layers[k].self_attn.o_proj.weight.data.mul_(1e-3)
            model.model.layers[k].mlp.down_proj.weight.data.mul_(1e-3)
        first = torch.randint(3, VOCABULARY, (16, 1))
        text = model.generate(
            first, do_sample=True, top_k=0, max_new_tokens=23, min_new_tokens=23, pad_token_id=0, use_cache=True
        )
    return model, list(text.split(8))


def best(scores: list[float], windows: list[range]) -> range:
    return windows[max(range(len(windows)), key=scores.__getitem__)]


def all_of(length: int) -> list[range]:
    return [range(a, a + length) for a in range(LENGTH - length + 1)]


def test_every_criterion_is_in_one_of_the_two_lists() -> None:
    own = {name for name, criterion in CRITERIA.items() if criterion.score.__module__.startswith("streamline_hooks.")}
    assert own == FINDS | set(CANNOT)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_it_is_found(run: range) -> None:
    windows = all_of(len(run))
    model, batches = planted(run, seed=run.start)
    made = profile(model, batches, replicates=0)
    found = {
        name: best(score_windows(name, windows, profile=made, model=model, batches=batches), windows) for name in FINDS
    }
    assert found == dict.fromkeys(FINDS, run)
    for by in ("rank", "weight"):
        several = combine_criteria({"cosine": 1.0, "relative_magnitude": 0.5, "kl": 2.0}, by=by)
        assert best(score_windows(several, windows, profile=made, model=model, batches=batches), windows) == run


@pytest.mark.parametrize("run", RUNS[-2:], ids=str)
def test_questions_find_it(run: range) -> None:
    """The whole model's own answers are the right ones: without what does nothing, they are given as before."""
    model, _ = planted(run, seed=run.start)
    pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
    task = task_config_from_rows(rows_of(model, count=40, choices=4, seed=run.start), "mine")
    windows = all_of(len(run))
    scores = score_windows(accuracy_drop(task, number_tokenizer()), windows, model=model, batches=[])
    assert best(scores, windows) == run and max(scores) > -0.05
    assert sum(score < 0.0 for score in scores) >= len(windows) - 1
