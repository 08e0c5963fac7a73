"""The evolutionary search: what it finds, and what it never does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch import nn

from streamline_hooks import StreamlineError, UnsupportedSurgery
from streamline_hooks.selection.search import Selection, evolution
from streamline_hooks.selection.search.judge import Attempt
from streamline_hooks.selection.search.levels import gone_of
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
    model, scores = tiny_model("llama"), []
    seeds = [Selection((range(1, 3),)), Selection((range(0, 1), range(4, 5)))]
    for generations in (0, 2, 7):
        found = evolution(model, BATCHES, seeds, keep=[0 - 1], generations=generations, **SMALL)
        scores.append(found[0].score)
        assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)
        for selection in found:
            assert Counter(branch for _, branch in gone_of(selection)) == {"attention": 2, "mlp": 2}
            assert not {BLOCKS - 1} & (selection.blocks | {k for k, _ in selection.silenced})
    assert scores == sorted(scores) and scores[-1] > scores[0]
    assert len({(s.windows, s.silenced) for s in found}) == len(found) > 8
    for selection in (found[0], found[-1]):
        assert -selection.score == pytest.approx(kl_by_hand(model, BATCHES, Attempt(selection)), rel=1e-3)


def test_the_seed_decides_what_is_found() -> None:
    model, seeds = tiny_model("llama"), [Selection((range(1, 3),))]
    found = [evolution(model, BATCHES, seeds, seed=seed, generations=3, **SMALL) for seed in (5, 5, 6)]
    assert found[0] == found[1] != found[2]


def test_after_an_interruption_the_model_is_as_it_was() -> None:
    model, count = tiny_model("llama").train(), []

    def fail(*given: Any) -> None:
        count.append(1)
        if len(count) > 300:
            raise KeyboardInterrupt

    for layer in model.model.layers:
        layer.register_forward_hook(fail)
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        evolution(model, BATCHES, [Selection((range(1, 3),))], **SMALL)
    assert fingerprint(model) == before


def test_all_children_see_few_tokens_and_the_survivors_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamline_hooks.selection.search import judge as judging

    calls, original = [], judging.Judge.distances

    def watched(self: Any, attempts: Any, what: str, numbers: Any = None) -> Any:
        calls.append((len(attempts), None if numbers is None else sum(self.tokens[n] for n in numbers)))
        return original(self, attempts, what, numbers)

    monkeypatch.setattr(judging.Judge, "distances", watched)
    batches = [tokens(1, 8, seed=n) for n in range(6)]
    model, seeds = tiny_model("llama"), [Selection((range(1, 3),))]
    evolution(model, batches, seeds, generations=1, offspring=9, stages=((8, 4), (20, 2)))
    assert calls == [(1, None), (9, 8), (4, 24), (2, None)]
    calls.clear()  # few batches: what would be all of them is left to the last stage
    evolution(model, batches[:2], seeds, generations=1, offspring=9, stages=((16, 4),))
    assert calls == [(1, None), (9, None)]


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
        evolution(model, BATCHES, [Selection((range(1, 2),))], **SMALL)


def test_it_ends_where_nothing_is_new() -> None:
    model = tiny_model("llama")
    keep = [0, 1, 2]
    found = evolution(model, BATCHES, [Selection((range(4, 5),))], keep=keep, branches=False, **SMALL)
    assert {s.windows for s in found} == {(range(k, k + 1),) for k in (3, 4, 5)}
