"""The evolutionary search: what it finds, what it never does, and how it is stopped and gone on from."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import StreamlineError, UnsupportedSurgery
from streamline_hooks.selection.search import Selection, evolution, evolve, tokens_a_generation
from streamline_hooks.selection.search.judge import Attempt
from streamline_hooks.selection.search.levels import Levels, gone_of
from streamline_hooks.surgery import LayerSurgeon
from tests.selection.search.test_judge import kl_by_hand
from tests.surgery.test_surgeon import fingerprint
from tests.tiny_models import BLOCKS, left_padded, tiny_model, tokens

BATCHES = [left_padded(2, 8, seed=n) for n in range(3)]
SMALL: dict[str, Any] = {"offspring": 8, "stages": ((10, 4), (20, 2))}


def planted(blocks: list[int], halves: list[tuple[int, str]]) -> nn.Module:
    """A model in which these blocks and branches do next to nothing."""
    model = tiny_model("llama")
    for k, branch in [*halves, *((k, b) for k in blocks for b in ("attention", "mlp"))]:
        layer = model.model.layers[k]
        (layer.self_attn.o_proj if branch == "attention" else layer.mlp.down_proj).weight.data.mul_(1e-4)
    return model


def test_planted_blocks_and_branches_are_found() -> None:
    model = planted([1], [(3, "mlp"), (4, "attention")])
    before = fingerprint(model)
    found = evolution(model, BATCHES, [Selection((range(4, 6),))], generations=12, **SMALL)
    assert found[0].windows == (range(1, 2),) and found[0].silenced == ((3, "mlp"), (4, "attention"))
    assert -1e-4 < found[0].score <= 1e-9 and found[1].score < -1e-3
    assert fingerprint(model) == before


def test_planted_blocks_are_found_among_whole_blocks() -> None:
    model = planted([0, 3], [])
    found = evolution(model, BATCHES, [Selection((range(4, 6),))], generations=10, branches=False, **SMALL)
    assert found[0].windows == (range(0, 1), range(3, 4)) and not any(s.silenced for s in found)


def test_fitness_never_gets_worse_and_is_the_kl_of_the_whole() -> None:
    model = tiny_model("llama")
    scores, seen = [], set()
    seeds = [Selection((range(1, 3),)), Selection((range(0, 1), range(4, 5)))]
    for generation in itertools.islice(evolve(model, BATCHES, seeds, keep=[0 - 1], **SMALL), 8):
        scores.append(generation.best.score)
        assert [s.score for s in generation.judged] == sorted((s.score for s in generation.judged), reverse=True)
        for selection in generation.judged:
            assert Levels.budget(gone_of(selection)) == (2, 2)
            assert not {BLOCKS - 1} & (selection.blocks | {k for k, _ in selection.silenced})
            seen.add((selection.windows, selection.silenced))
    assert len(scores) == 8 and scores == sorted(scores) and scores[-1] > scores[0]
    assert len(seen) == len(generation.judged) > 8
    for selection in (generation.best, generation.judged[-1]):
        assert -selection.score == pytest.approx(kl_by_hand(model, BATCHES, Attempt(selection)), rel=1e-3)


def test_a_search_that_was_stopped_goes_on_as_if_it_never_had() -> None:
    model, seeds = tiny_model("llama"), [Selection((range(1, 3),))]
    whole = list(itertools.islice(evolve(model, BATCHES, seeds, seed=5, **SMALL), 6))
    again = list(itertools.islice(evolve(model, BATCHES, whole[2], seed=5, **SMALL), 4))
    assert again == whole[2:]
    other = list(itertools.islice(evolve(model, BATCHES, seeds, seed=6, **SMALL), 6))
    assert other != whole


def test_between_generations_and_after_an_interruption_the_model_is_as_it_was() -> None:
    model, count, until = tiny_model("llama").train(), [], [math.inf]

    def fail(*given: Any) -> None:
        count.append(1)
        if len(count) > until[0]:
            raise KeyboardInterrupt

    for layer in model.model.layers:
        layer.register_forward_hook(fail)
    before = fingerprint(model)
    running = evolve(model, BATCHES, [Selection((range(1, 3),))], **SMALL)
    for number in range(3):
        latest = next(running)
        assert latest.number == number and fingerprint(model) == before
    until[0] = len(count) + 50
    with pytest.raises(KeyboardInterrupt):
        next(running)
    assert fingerprint(model) == before
    assert latest.best.score > -math.inf


def test_all_children_see_few_tokens_and_the_survivors_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamline_hooks.selection.search import judge as judging

    calls, original = [], judging.Judge.distances

    def watched(self: Any, attempts: Any, what: str, numbers: Any = None) -> Any:
        calls.append((len(attempts), None if numbers is None else sum(self.tokens[n] for n in numbers)))
        return original(self, attempts, what, numbers)

    monkeypatch.setattr(judging.Judge, "distances", watched)
    batches = [tokens(1, 8, seed=n) for n in range(6)]
    running = evolve(tiny_model("llama"), batches, [Selection((range(1, 3),))], offspring=9, stages=((8, 4), (20, 2)))
    next(running), next(running)
    assert calls == [(1, None), (9, 8), (4, 24), (2, None)]
    assert tokens_a_generation(48, offspring=9, stages=((8, 4), (20, 2))) == 9 * 8 + 4 * 20 + 2 * 48
    calls.clear()  # few batches: what would be all of them is left to the last stage
    running = evolve(tiny_model("llama"), batches[:2], [Selection((range(1, 3),))], offspring=9, stages=((16, 4),))
    next(running), next(running)
    assert calls == [(1, None), (9, None)] and tokens_a_generation(16, offspring=9, stages=((16, 4),)) == 9 * 16


def test_where_no_branch_can_be_silenced_blocks_are_searched_over() -> None:
    model = planted([2], [])
    for layer in model.model.layers:  # multiplied twice: no longer what the two branches add
        layer.register_forward_hook(lambda block, args, out: out * 1.01)
        layer.forward = scaled(layer.forward)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"Only whole blocks.*two residual"):
        found = evolution(model, BATCHES, [Selection((range(4, 5),))], generations=4, **SMALL)
    assert not any(s.silenced for s in found) and len(found) > 1


def scaled(forward: Any) -> Any:
    return lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)


def test_what_the_surgeon_refuses_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted block cannot go, which only the probe finds out."""
    model, probed = planted([1], []), []
    remove = LayerSurgeon.remove

    def refusing(self: LayerSurgeon, window: range, **options: Any) -> None:
        probed.append(window)
        if 1 in window:
            raise UnsupportedSurgery("Block 1 cannot go: so says the probe.", "probe")
        remove(self, window, **options)

    monkeypatch.setattr(LayerSurgeon, "remove", refusing)
    found = evolution(model, BATCHES, [Selection((range(4, 5),))], generations=6, branches=False, **SMALL)
    assert any(1 in window for window in probed)
    assert found and not any(1 in s.blocks for s in found)
    with pytest.raises(StreamlineError, match=r"Not one.*Block 1"):
        next(evolve(model, BATCHES, [Selection((range(1, 2),))], **SMALL))


def test_it_ends_where_nothing_is_new() -> None:
    model = tiny_model("llama")
    keep = [0, 1, 2]
    found = list(evolve(model, BATCHES, [Selection((range(4, 5),))], keep=keep, branches=False, **SMALL))
    assert {s.windows for s in found[-1].judged} == {(range(k, k + 1),) for k in (3, 4, 5)}
    assert evolution(model, BATCHES, found[0], generations=50, keep=keep, branches=False, **SMALL) == [
        *found[-1].judged
    ]


@pytest.mark.parametrize(
    ("seeds", "options", "text"),
    [
        ([], {}, "nothing to start from"),
        ([Selection((range(1, 3),)), Selection((range(1, 2),))], {},
         r"2 attentions and 2 MLPs \(1-2\); 1 attentions and 1 MLPs \(1\)"),
        ([Selection((range(1, 3),))], {"keep": [2]}, "block 2, which must stay"),
        ([Selection((range(1, 9),))], {}, "block 6, which must stay"),
        ([Selection((), ((2, "mlp"),))], {"keep": [2]}, r"mlp of block 2 alone.*must stay"),
        ([Selection((), ((2, "mlp"),))], {"branches": False}, "mlp of block 2 alone"),
        ([Selection((range(1, 3),))], {"offspring": 0}, r"offspring=0 .*1 or more"),
        ([Selection((range(1, 3),))], {"stages": ((8, 0),)}, r"stages=\(\(8, 0\),\).*1 or more"),
        ([Selection((range(1, 3),))], {"keep": [6]}, r"keep=6.*out of range"),
    ],
)  # fmt: skip
def test_what_it_cannot_start_from(seeds: list[Selection], options: dict[str, Any], text: str) -> None:
    with pytest.raises(StreamlineError, match=text):  # at the call, not at the first generation
        evolve(tiny_model("llama"), BATCHES, seeds, **{**SMALL, **options})
    assert torch.is_grad_enabled()
