"""Perplexity and KL without a window, against NumPy on the logits of the model that has lost it."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.selection.model_criteria import kl_when_removed, perplexity_when_removed
from streamline_hooks.selection.scoring import score_windows
from tests.tiny_models import BLOCKS, FAMILIES, padded, shuffled_batches, tiny_model, tokens

WINDOWS = [range(0, 2), range(1, 4), range(3, BLOCKS)]


def log_probabilities(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each sequence, run alone, its tokens and the log-probabilities of what follows each."""
    found = []
    for ids, mask in zip(*batch.values(), strict=True):
        own = ids[mask.bool()]
        with torch.no_grad():
            logits = model(own[None]).logits[0].double().numpy()
        found.append((own.numpy(), logits - np.log(np.exp(logits).sum(-1, keepdims=True))))
    return found


@settings(max_examples=15)
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.integers(2, 7), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from(["left", "right"]),
    st.randoms(),
)
def test_they_equal_the_shorter_models(family: str, lengths: list[int], size: int, side: str, random: Random) -> None:
    model, batch = tiny_model(family, torch.float64), padded(lengths, side)
    whole = log_probabilities(model, batch)
    perplexities, kls = [], []
    for window in WINDOWS:
        with LayerSurgeon(model) as surgeon:
            surgeon.remove(window)
            short = log_probabilities(model, batch)
        said = np.concatenate([q[np.arange(len(ids) - 1), ids[1:]] for ids, q in short])
        kl = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for (_, p), (_, q) in zip(whole, short, strict=True)])
        perplexities.append(said.mean())
        kls.append(-kl.mean())
    model.train()
    batches = shuffled_batches(batch, size, random)
    assert score_windows("perplexity", WINDOWS, model=model, batches=batches) == pytest.approx(perplexities, rel=1e-5)
    assert score_windows("kl", WINDOWS, model=model, batches=batches) == pytest.approx(kls, rel=1e-4, abs=1e-6)
    assert model.training


def test_a_window_without_which_the_model_breaks_comes_last() -> None:
    """Block 3 has no answer to states as large as those that block 2 makes small again."""
    model = tiny_model("llama")
    model.model.layers[1].register_forward_hook(lambda m, a, o: o * 1e10)
    model.model.layers[2].register_forward_hook(lambda m, a, o: o * 1e-10)
    model.model.layers[3].input_layernorm.register_forward_pre_hook(lambda m, a: (a[0] / (a[0].abs().max() < 1e5),))
    windows = [range(2, 3), range(4, 5)]
    for name in ("perplexity", "kl"):
        scores = score_windows(name, windows, model=model, batches=[tokens(2, 6)])
        assert scores[0] == -math.inf and math.isfinite(scores[1])
        with pytest.raises(StreamlineError, match=rf"'{name}'.*all 1 windows"):
            score_windows(name, windows[:1], model=model, batches=[tokens(2, 6)])


def test_a_model_that_is_broken_itself() -> None:
    model = tiny_model("llama")
    model.model.layers[4].mlp.down_proj.weight.data[3, 3] = torch.nan
    windows = [range(1, 2), range(4, 5)]  # without the second the model would be whole again
    with pytest.raises(StreamlineError, match="original LlamaForCausalLM is inf"):
        perplexity_when_removed(model, [tokens(2, 6)], windows)
    with pytest.raises(StreamlineError, match=r"'kl'.*all 2 windows"):
        score_windows("kl", windows, model=model, batches=[tokens(2, 6)])


def test_no_text() -> None:
    with pytest.raises(StreamlineError, match="batches is empty"):
        kl_when_removed(tiny_model("llama"), [], WINDOWS)
    with pytest.raises(StreamlineError, match="No token"):
        perplexity_when_removed(tiny_model("llama"), [], WINDOWS)
