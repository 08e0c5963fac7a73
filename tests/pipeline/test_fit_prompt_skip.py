"""Fitted prompt skipping: maps of the states that tokens really have, chosen by continuations that need the prompt."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from streamline_hooks import (
    DistillationConfig,
    HealingConfig,
    LayerSurgeon,
    LinearConfig,
    StreamlineError,
    SwiGLUConfig,
    UnsupportedSurgery,
    at_depth,
    fit_depths,
)
from streamline_hooks.modeling import kl_by_token
from streamline_hooks.pipeline import FittedPromptSkip, fit_prompt_skip
from streamline_hooks.repair import BlockConfig, FoldedConfig, NoneConfig
from streamline_hooks.selection import WindowSearch
from streamline_hooks.surgery import PromptSkip
from streamline_hooks.testing import tiny_config, tiny_model


def batches(count: int = 16, length: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (2, length), generator=generator) for _ in range(count)]


def in_parts(count: int = 12) -> dict[str, list[torch.Tensor]]:
    every = batches(count)
    return {"train": every[:-4], "validation": every[-4:]}


def test_a_given_window_gets_the_maps_of_the_states_that_enter_it() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    fitted = fit_prompt_skip(model, batches(), range(3, 6), repair=LinearConfig(rank=4), last_tokens=2)
    assert fitted.window == range(3, 6) and all(isinstance(module, nn.Module) for module in fitted.maps)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    states = model(batches(1)[0], output_hidden_states=True).hidden_states
    for k, module in zip(fitted.window, fitted.maps, strict=True):
        assert module is not None
        unmapped = (states[3] - states[k + 1]).norm()
        assert (module(states[3]) - states[k + 1]).norm() < unmapped


def test_the_maps_are_those_of_fit_windows_and_the_last_block_needs_none() -> None:
    model, every = tiny_model("llama"), batches()
    fitted = fit_prompt_skip(model, every, range(5, 8), last_tokens=2)
    assert fitted.maps[-1] is None and None not in fitted.maps[:-1]
    with fitted.open(model) as skip:
        assert skip.window == range(5, 8) and skip.last_tokens == 2
        model.generate(every[0], max_new_tokens=2, do_sample=False, pad_token_id=0)


def expected_kl(model: Any, fitted: FittedPromptSkip, ids: torch.Tensor) -> torch.Tensor:
    """The KL divergence of each token of the second half."""
    half = ids.shape[1] // 2
    marks = torch.arange(ids.shape[1]).expand(ids.shape) < half - fitted.last_tokens
    with torch.no_grad():
        reference = model(ids).logits[:, half - 1 :].log_softmax(dim=-1)
        with PromptSkip(model, fitted.window, fitted.maps) as skip, skip.marked(marks):
            return kl_by_token(reference, model(ids).logits[:, half - 1 :])


@pytest.mark.parametrize("last_tokens", [1, 4])
def test_windows_are_compared_on_continuations_of_text_and_of_the_repeated_prompt(last_tokens: int) -> None:
    model, every = tiny_model("llama"), batches()
    fitted = fit_prompt_skip(model, every, range(4, 8), last_tokens=last_tokens)
    found = {}
    for name in ("text", "repeated"):
        nats: list[torch.Tensor] = []
        for ids in validation_of(model, every):
            half = ids[:, : ids.shape[1] // 2]
            nats.append(expected_kl(model, fitted, ids if name == "text" else torch.cat([half, half], dim=1)).flatten())
        found[name] = float(torch.cat(nats).mean())
    assert fitted.kl == pytest.approx(found, rel=1e-3)
    assert fitted.distance == pytest.approx(sum(found.values()) / 2, rel=1e-3)


def validation_of(model: Any, every: list[torch.Tensor]) -> list[torch.Tensor]:
    from streamline_hooks import CompressionConfig, Target
    from streamline_hooks.modeling import Task
    from streamline_hooks.pipeline.prepare import parts_of, prepare_compression

    config = CompressionConfig(remove=Target(blocks=4))
    ready = prepare_compression(model, None, parts_of(every), config, task=Task.of(model))
    return [batch if isinstance(batch, torch.Tensor) else batch["input_ids"] for batch in ready.verification]


def test_the_chosen_window_is_the_closest_of_all() -> None:
    model, every = tiny_model("llama"), batches()
    chosen = fit_prompt_skip(model, every, 3, search=WindowSearch(shortlist=6), last_tokens=2)
    alone = {start: fit_prompt_skip(model, every, range(start, start + 3), last_tokens=2) for start in range(6)}
    best = min(alone.values(), key=lambda fitted: fitted.distance)
    assert chosen.window == best.window and chosen.distance == pytest.approx(best.distance, rel=1e-4)


@pytest.mark.parametrize("start", [1, 4])
def test_the_shortlist_begins_with_the_window_that_changes_the_states_least(start: int) -> None:
    model, every = tiny_model("llama"), batches()
    with LayerSurgeon(model) as surgeon:
        for k in range(start, start + 2):
            surgeon.zero_branch(k, "attention")
            surgeon.zero_branch(k, "mlp")
        surgeon.commit()
    chosen = fit_prompt_skip(model, every, 2, search=WindowSearch(shortlist=1), repair=NoneConfig(), last_tokens=2)
    assert chosen.window == range(start, start + 2)
    assert chosen.distance == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("fit", ["prompt skip", "depths"])
def test_the_seed_determines_the_random_weights(fit: str) -> None:
    def modules(seed: int) -> list[torch.Tensor]:
        model, kind = tiny_model("llama"), SwiGLUConfig(width=8)
        if fit == "prompt skip":
            fitted = fit_prompt_skip(model, batches(), range(4, 7), repair=kind, seed=seed, last_tokens=2)
            return weights_of(fitted)
        (found,) = fit_depths(model, batches(), [6], repair=kind, seed=seed)
        with at_depth(model, found.depth):
            return [p.detach().clone() for name, p in model.named_parameters() if "gate" in name and p.shape[0] == 8]

    first, again, other = modules(0), modules(0), modules(1)
    assert first and all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def test_documents_of_packed_rows_are_continued_alone() -> None:
    model, ids = tiny_model("llama"), batches(16)  # two documents of 16 tokens
    packed = [{"input_ids": row.view(1, -1), "position_ids": torch.arange(16).repeat(2)[None].clone()} for row in ids]
    alone, together = (fit_prompt_skip(model, data, range(5, 8), last_tokens=2) for data in (ids, packed))
    assert together.kl == pytest.approx(alone.kl, rel=1e-4)
    cuts = torch.cat([torch.arange(n) for n in (20, 4, 8)])[None]
    uneven = [{"input_ids": row.view(1, -1), "position_ids": cuts} for row in ids]
    assert all(value > 0 for value in fit_prompt_skip(model, uneven, range(5, 8), last_tokens=2).kl.values())


def weights_of(fitted: FittedPromptSkip) -> list[torch.Tensor]:
    return [p.detach().clone() for module in fitted.maps if module is not None for p in module.parameters()]


def test_training_starts_from_the_closed_form_and_lowers_both_divergences(tmp_path: Path) -> None:
    model, every = tiny_model("llama"), batches(40)
    solved = fit_prompt_skip(model, every, range(3, 6), last_tokens=2)
    run = {"distillation": DistillationConfig(epochs=4, validations=4), "checkpoint_file": tmp_path / "training"}
    trained = fit_prompt_skip(model, every, range(3, 6), **run, last_tokens=2)
    assert trained.training is not None and trained.training.tokens > 1000 and trained.window == solved.window
    assert all(trained.kl[name] < solved.kl[name] for name in ("text", "repeated")) and solved.training is None
    again = fit_prompt_skip(model, every, range(3, 6), **run, last_tokens=2)  # the run is complete
    assert all(torch.equal(a, b) for a, b in zip(weights_of(again), weights_of(trained), strict=True))
    with pytest.raises(StreamlineError, match="another training run"):
        fit_prompt_skip(model, every, range(3, 6), **run, last_tokens=3)
    other = fit_prompt_skip(model, every, range(3, 6), seed=1, distillation=run["distillation"], last_tokens=2)
    assert not any(torch.equal(a, b) for a, b in zip(weights_of(other), weights_of(trained), strict=True))
    assert all(module is None or not module.training for module in trained.maps)


def test_without_a_map_nothing_is_trained() -> None:
    fitted = fit_prompt_skip(tiny_model("llama"), batches(), 1, distillation=DistillationConfig(), last_tokens=2)
    assert fitted.window == range(7, 8) and fitted.maps == (None,) and fitted.training is None
    assert fitted.distance == pytest.approx(0, abs=1e-6)  # prompts and whole sequences are other products


def test_short_documents_among_others_are_no_problem() -> None:
    long = batches(12)
    short = [long[0][:1, :1], long[1][:1, :3]]
    data = {"calibration": [*long[2:8], *short], "validation": [*long[8:10], long[8][:1, 5:8]], "test": long[10:]}
    fitted = fit_prompt_skip(
        tiny_model("llama"), data, range(3, 6), distillation=DistillationConfig(validations=1), last_tokens=2
    )
    assert fitted.training is not None and math.isfinite(fitted.distance)
    with pytest.raises(StreamlineError, match="more than 3 tokens"):
        fit_prompt_skip(tiny_model("llama"), {**data, "validation": [long[9][:, :1]]}, range(3, 6), last_tokens=2)


def test_text_whose_prompts_skip_nothing_is_refused() -> None:
    model, last_tokens = tiny_model("llama"), 3
    options = {"last_tokens": last_tokens}
    with pytest.raises(StreamlineError, match="more than 4 tokens.*smaller last_tokens"):
        fit_prompt_skip(model, batches(length=2 * (last_tokens + 1)), range(3, 6), **options)
    assert fit_prompt_skip(model, batches(length=2 * (last_tokens + 2)), range(3, 6), **options).distance > 0


class Prompts:
    """Records the numbers of tokens that skip, of each forward pass of a training step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.marks: list[torch.Tensor] = []
        self.ids: list[torch.Tensor] = []
        resume = PromptSkip.resume

        def recorded(skip: PromptSkip, states: Any, batch: Any, tokens: torch.Tensor) -> Any:
            if torch.is_grad_enabled():
                self.marks.append(tokens.sum(dim=1))
                self.ids.append(batch["input_ids"])
            return resume(skip, states, batch, tokens)

        monkeypatch.setattr(PromptSkip, "resume", recorded)


@pytest.mark.parametrize("last_tokens", [1, 3])
def test_training_alternates_text_and_repeated_passages(last_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    prompts = Prompts(monkeypatch)
    training = DistillationConfig(validations=1)
    fitted = fit_prompt_skip(model, batches(40), range(3, 6), distillation=training, last_tokens=last_tokens)
    repeated = [bool((ids[:, :8] == ids[:, 8:]).all()) for ids in prompts.ids]
    assert abs(sum(repeated) - len(repeated) / 2) <= 1 and len(repeated) > 10
    of_text = torch.cat([m for m, same in zip(prompts.marks, repeated, strict=True) if not same])
    shortest, longest = 4 - last_tokens, 12 - last_tokens  # a quarter to three quarters, without the last tokens
    assert shortest <= int(of_text.min()) < int(of_text.max()) <= longest
    assert fitted.open(model).last_tokens == last_tokens
    assert all(bool((m == 8 - last_tokens).all()) for m, same in zip(prompts.marks, repeated, strict=True) if same)


def test_protected_blocks_run_and_the_shortlist_limits_the_windows() -> None:
    model, every = tiny_model("llama"), batches()
    chosen = fit_prompt_skip(model, every, 3, search=WindowSearch(protect=(4,)), last_tokens=2)
    assert 4 not in chosen.window
    with pytest.raises(StreamlineError, match="protect"):
        fit_prompt_skip(model, every, 7, search=WindowSearch(protect=(4,)), last_tokens=2)


def test_padded_rows_of_unequal_length_are_continued_from_their_own_half() -> None:
    model, ids = tiny_model("llama"), batches(16)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :5] = 0
    padded = [{"input_ids": row, "attention_mask": mask} for row in ids]
    fitted = fit_prompt_skip(model, padded, range(5, 8), last_tokens=2)
    assert all(math.isfinite(value) and value > 0 for value in fitted.kl.values())


REFUSED = {
    "more than all": (8, {}, "1 to 7 blocks"),
    "outside": (range(6, 9), {}, "from 0 to 7"),
    "a block": (3, {"repair": BlockConfig()}, "LinearConfig"),
    "folded": (3, {"repair": FoldedConfig()}, "LinearConfig"),
    "healed": (3, {"distillation": DistillationConfig(), "healing": HealingConfig()}, "healing"),
    "loss on states": (3, {"distillation": DistillationConfig(loss={"mse": 1.0})}, "Use kl"),
    "a file without training": (3, {"checkpoint_file": "training"}, "distillation"),
    "unknown field": (3, {"repairs": None}, "repairs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused(case: str) -> None:
    blocks, fields, message = REFUSED[case]
    with pytest.raises(StreamlineError, match=message):
        fit_prompt_skip(tiny_model("llama"), batches(), blocks, **fields, last_tokens=2)


def test_models_without_a_prompt_are_refused() -> None:
    with pytest.raises(StreamlineError, match="AutoModelForCausalLM|causal"):
        fit_prompt_skip(transformers.BertForMaskedLM(tiny_config("bert")), batches(), 2, last_tokens=2)
    with pytest.raises(UnsupportedSurgery, match="cache"):
        fit_prompt_skip(tiny_model("rwkv"), batches(), 2, last_tokens=2)
