"""Selections repaired in closed form and judged, against doing it by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery
from streamline_hooks.cli import parse_replacement
from streamline_hooks.evaluation import distances_of_candidates
from streamline_hooks.modeling import Candidate
from streamline_hooks.repair import (
    BlockConfig,
    FeedForwardConfig,
    NoneConfig,
    fit_branch_linear,
    replace_branches,
    solve_least_squares,
)
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.selection import Selection, verify_shortlist
from streamline_hooks.selection.trial import Trial, trial_distances
from streamline_hooks.statistics import measure_moments, moments_by_window
from streamline_hooks.surgery import ModelSource
from streamline_hooks.testing import tiny_model as tiny_of_type
from tests.repair.replacement_modules import FITTED
from tests.selection.test_trial import kl_by_hand
from tests.surgery.test_surgeon import fingerprint
from tests.tiny_models import FAMILIES, left_padded, tiny_model, tokens

FIT, HELD_OUT = [left_padded(4, 16), tokens(4, 16, seed=1)], [left_padded(4, 14, seed=2)]
VALIDATION = [left_padded(3, 9, seed=3), left_padded(2, 12, seed=4)]


def map_of(module: nn.Module | None) -> torch.Tensor:
    assert isinstance(module, LinearReplacement)
    return module.projection.weight.detach()


@pytest.mark.parametrize("kind", ["linear", "none"])
def test_single_windows_are_fitted_and_judged_in_shared_passes(kind: str) -> None:
    """The algorithm written out: all moments at once, one solution each, KL of the remainders."""
    model = tiny_model("llama")
    windows = [range(start, start + 3) for start in (1, 3, 0, 2)]
    fitted, held_out = (measure_moments(model, part, windows) for part in (FIT, HELD_OUT))
    solutions = [solve_least_squares(*pair) for pair in zip(fitted, held_out, strict=True)]
    modules = [LinearReplacement.from_map(s.map) if kind == "linear" else None for s in solutions]
    kls = distances_of_candidates(model, VALIDATION, [Candidate(w, m) for w, m in zip(windows, modules, strict=True)])
    order = sorted(range(4), key=lambda k: kls[k])
    shortlist = [Selection((w,), score=float(w.start)) for w in windows]
    runs: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *given: runs.append(1))
    found = verify_shortlist(model, shortlist, FIT, HELD_OUT, VALIDATION, replacement=parse_replacement(kind))
    # Fitting and holding out run each batch once, judging the original once and the window at 0 not at all.
    assert len(runs) == len(FIT) + len(HELD_OUT) + len(VALIDATION)
    assert [s.distance for s in found] == [kls[k] for k in order]
    assert [(s.windows, s.score) for s in found] == [(shortlist[k].windows, shortlist[k].score) for k in order]
    for one, k in zip(found, order, strict=True):
        (repair,), solution = one.repairs, solutions[k]
        assert repair.window == windows[k] and repair.ridge == solution.ridge
        assert repair.removal_error == solution.removal_error and not one.refused
        if kind == "linear":
            assert torch.equal(map_of(repair.replacement_module), map_of(modules[k]))
            assert repair.repaired_error == solution.held_out_error
        else:
            assert repair.replacement_module is None and repair.repaired_error == solution.removal_error


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_several_windows_are_fitted_in_order_on_the_repaired_model(family: str) -> None:
    model = tiny_model(family)
    before = fingerprint(model)
    windows, zeroed = (range(1, 2), range(3, 4), range(5, 6)), ((0, "mlp"), (2, "attention"), (4, "mlp"))
    selection = Selection(windows, zeroed)  # type: ignore[arg-type]
    if family == "gpt_neox":
        with pytest.raises(UnsupportedSurgery, match=r"branch of block 0 .*same state"):
            verify_shortlist(model, [selection], FIT, HELD_OUT, VALIDATION)
        return
    (found,) = verify_shortlist(model, [selection], FIT, HELD_OUT, VALIDATION)
    assert fingerprint(model) == before
    by_hand: list[nn.Module] = []
    maps = fit_branch_linear(model, zeroed, FIT, HELD_OUT)  # on the model as it is
    assert [(one.block, one.branch) for one in found.maps] == list(zeroed)
    for one, expected in zip(found.maps, maps, strict=True):
        torch.testing.assert_close(one.map, expected.map)
    with LayerSurgeon(model) as surgeon:
        replace_branches(surgeon, maps)
        for window, repair in zip(windows, found.repairs, strict=True):
            now = surgeon.plan.old_to_new[window.start]
            pair = [measure_moments(model, part, [range(now, now + len(window))])[0] for part in (FIT, HELD_OUT)]
            solution = solve_least_squares(*pair)
            assert repair.removal_error == pytest.approx(solution.removal_error, rel=1e-5)
            assert repair.repaired_error == pytest.approx(solution.held_out_error, rel=1e-4)
            assert repair.ridge == solution.ridge
            by_hand.append(LinearReplacement.from_map(solution.map))
            torch.testing.assert_close(map_of(repair.replacement_module), map_of(by_hand[-1]), rtol=1e-3, atol=1e-4)
            surgeon.replace(window, by_hand[-1])
    whole = Trial(found, tuple(by_hand), tuple(maps))
    assert found.distance == pytest.approx(kl_by_hand(model, VALIDATION, whole), rel=1e-3)


@pytest.mark.parametrize("kind", ["linear", "none", "linear:rank=4"])
@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_branches_alone_have_a_linear_map_in_their_place_if_that_is_the_kind(branch: Any, kind: str) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    shortlist = [Selection((), ((k, branch), (k + 2, branch))) for k in range(3)]
    found = verify_shortlist(model, shortlist, FIT, HELD_OUT, VALIDATION, replacement=parse_replacement(kind))
    assert fingerprint(model) == before
    for one in found:
        assert len(one.maps) == (2 if kind == "linear" else 0)
        assert all(m.held_out_error < m.removal_error for m in one.maps)
        assert one.distance == pytest.approx(kl_by_hand(model, VALIDATION, Trial(one, (), one.maps)), rel=2e-4)
        if one.maps:
            assert one.distance != pytest.approx(kl_by_hand(model, VALIDATION, Trial(one)), rel=2e-3)


def test_a_later_window_fitted_on_the_original_would_be_another() -> None:
    """What the order is for: the map of the second window is not that of the window alone."""
    model = tiny_model("llama")
    both, alone = Selection((range(0, 2), range(3, 5))), Selection((range(3, 5),))
    found = {s.windows: s for s in verify_shortlist(model, [both, alone], FIT, HELD_OUT, VALIDATION)}
    maps = [map_of(found[s.windows].repairs[-1].replacement_module) for s in (both, alone)]
    assert not torch.allclose(*maps, atol=1e-2)


def test_windows_on_one_model_share_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[range]] = []
    module: Any = __import__("sys").modules["streamline_hooks.repair.fit"]

    def counted(source: Any, parts: Any, windows: list[range], **options: Any) -> Any:
        asked.append(windows)
        return moments_by_window(source, parts, windows, **options)

    monkeypatch.setattr(module, "moments_by_window", counted)
    shortlist = [
        Selection((range(0, 1), range(2, 3))),
        Selection((range(0, 1), range(3, 5))),
        Selection((range(0, 1), range(2, 3), range(4, 5))),
        Selection((range(1, 2),)),
        Selection((range(1, 2),), ((4, "mlp"),)),  # behind the window: the same states
        Selection((range(1, 2),), ((0, "mlp"),)),
        Selection((), ((0, "mlp"), (5, "attention"))),
    ]
    found = verify_shortlist(tiny_model("llama"), shortlist, FIT, HELD_OUT, VALIDATION)
    assert asked == [
        [range(0, 1), range(1, 2)],  # the original
        [range(1, 2)],  # without the MLP of block 0
        [range(1, 2), range(2, 4)],  # with block 0 repaired, in the numbers of then
        [range(2, 3)],
    ]
    by_shape = {(s.windows, s.zeroed): s for s in found}
    assert len(by_shape) == len(shortlist)
    assert all(len(s.repairs) == len(s.windows) for s in found)
    same = [by_shape[shortlist[k].windows, shortlist[k].zeroed].repairs[0] for k in (3, 4)]
    assert same[0] is same[1]


def test_planted_redundancy_is_found_whatever_its_shape() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    for projection in (layers[1].self_attn.o_proj, layers[1].mlp.down_proj, layers[4].mlp.down_proj):
        projection.weight.data.mul_(1e-4)
    planted = Selection((range(1, 2),), ((4, "mlp"),), score=-5.0)
    others = [Selection((range(1, 2), range(4, 5))), Selection((range(2, 4),)), Selection((), ((4, "attention"),))]
    found = verify_shortlist(model, [*others, planted], FIT, HELD_OUT, VALIDATION)
    assert found[0].windows == planted.windows and found[0].zeroed == planted.zeroed
    assert found[0].distance < 1e-4 < found[1].distance and found[0].score == -5.0


def test_a_network_with_random_weights_does_not_choose_the_window() -> None:
    model, shortlist = tiny_model("llama"), [Selection((range(k, k + 2),)) for k in (2, 0, 3, 1)]
    found = verify_shortlist(model, shortlist, FIT, HELD_OUT, VALIDATION, replacement=FeedForwardConfig())
    assert [one.windows for one in found] == [one.windows for one in shortlist]
    assert [one.distance for one in found] != sorted(one.distance for one in found)
    judged = verify_shortlist(model, shortlist, FIT, HELD_OUT, VALIDATION, replacement=BlockConfig(solve=False))
    assert [one.distance for one in judged] == sorted(one.distance for one in judged)


def scaled(forward: Any) -> Any:
    return lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)


def test_what_cannot_go_comes_last_with_its_reason() -> None:
    model = tiny_model("llama")
    model.model.layers[3].forward = scaled(model.model.layers[3].forward)
    good, bad = Selection((range(1, 2),)), Selection((range(1, 2),), ((3, "mlp"),))
    found = verify_shortlist(model, [bad, good], FIT, HELD_OUT, VALIDATION)
    assert [s.zeroed for s in found] == [(), ((3, "mlp"),)]
    assert found[1].distance == math.inf and "two residual branches" in found[1].refused
    assert found[1].repairs == ()
    with pytest.raises(UnsupportedSurgery, match="two residual branches"):
        verify_shortlist(model, [bad], FIT, HELD_OUT, VALIDATION)


def test_no_finite_model_is_an_error() -> None:
    model = tiny_model("llama")
    model.model.layers[4].register_forward_hook(lambda block, args, out: out * 1e-6)
    model.model.layers[5].register_forward_hook(lambda block, args, out: out / (args[0].norm() < 1e-2))
    with pytest.raises(StreamlineError, match=r"1 selections.*finite"):
        verify_shortlist(model, [Selection((range(4, 5),))], FIT, HELD_OUT, VALIDATION, replacement=NoneConfig())
    with pytest.raises(StreamlineError, match="selections is empty"):
        verify_shortlist(model, [], FIT, HELD_OUT, VALIDATION)
    with pytest.raises(StreamlineError, match="'cubic' is unknown"):
        verify_shortlist(
            model, [Selection((range(4, 5),))], FIT, HELD_OUT, VALIDATION, replacement=parse_replacement("cubic")
        )


@pytest.mark.sample(6)
@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_kind_is_judged_by_what_the_model_says_with_it(family: str, kind: str) -> None:
    """One window, and two at once beside zeroed branches, against a surgeon that carries them out."""
    model = tiny_model(family)
    before = fingerprint(model)
    alone = Selection((range(2, 5),))
    several = Selection((range(1, 3), range(4, 6)), ((3, "attention"),))
    if kind == "block:count=2":
        several = Selection((range(0, 3),), ((3, "mlp"),))
    found = verify_shortlist(model, [alone, several], FIT, HELD_OUT, VALIDATION, replacement=parse_replacement(kind))
    assert fingerprint(model) == before and not any(one.refused for one in found)
    for one in found:
        assert [repair.window for repair in one.repairs] == list(one.windows)
        assert all(repair.repaired_error <= repair.removal_error for repair in one.repairs)
        attempt = Trial(one, tuple(repair.replacement_module for repair in one.repairs), one.maps)
        assert one.distance == pytest.approx(kl_by_hand(model, VALIDATION, attempt), rel=2e-4)
        assert one.distance != pytest.approx(kl_by_hand(model, VALIDATION, Trial(one)), rel=2e-3)


@pytest.mark.parametrize(
    ("kind", "bad", "zeroed", "reason"),
    [
        ("block", (range(1, 2), range(3, 5)), (), r"1 inherited block.*window of 1 .*block 1"),
        ("block:count=2", (range(3, 5),), (), r"2 inherited blocks.*window of 2 .*block 3"),
        ("folded", (range(0, 2),), (), "no block precedes"),
        ("folded", (range(2, 4),), ((1, "mlp"),), r"the block before this window.*MLP is zero"),
    ],
)
def test_a_window_in_which_a_kind_cannot_stand_is_refused_and_the_others_are_judged(
    kind: str, bad: tuple[range, ...], zeroed: Any, reason: str
) -> None:
    shortlist = [Selection(bad, zeroed), Selection((range(2, 5),)), Selection((range(1, 4),))]
    found = verify_shortlist(
        tiny_model("llama"), shortlist, FIT, HELD_OUT, VALIDATION, replacement=parse_replacement(kind)
    )
    assert [one.windows for one in found if one.refused] == [bad] and re.search(reason, found[-1].refused)
    assert all(math.isfinite(one.distance) and one.repairs for one in found[:-1])
    with pytest.raises(UnsupportedSurgery, match=reason):
        verify_shortlist(
            tiny_model("llama"), shortlist[:1], FIT, HELD_OUT, VALIDATION, replacement=parse_replacement(kind)
        )


@pytest.mark.parametrize("kind", ["linear", "block", "swiglu:linear=false"])
@pytest.mark.parametrize("fail_at", [0, 5, 10, 15, 20, 30, 40])
def test_an_error_inside_leaves_nothing_behind(fail_at: int, kind: str) -> None:
    model, count = tiny_model("llama").train(), []

    def fail(*given: Any) -> None:
        count.append(1)
        if len(count) == fail_at + 1:
            raise KeyboardInterrupt

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(fail)
    before = fingerprint(model)
    shortlist = [Selection((range(0, 2), range(3, 5))), Selection((range(1, 3),), ((0, "mlp"),))]
    with pytest.raises(KeyboardInterrupt):
        verify_shortlist(model, shortlist, FIT, HELD_OUT, VALIDATION, replacement=parse_replacement(kind))
    assert fingerprint(model) == before


def test_windows_after_shared_keys_are_judged_by_the_whole_model() -> None:
    """Blocks 6 and 7 share the keys of block 5, so they cannot be run without it, and window 6 can still be removed."""
    model = tiny_of_type("gemma4_text", blocks=8, num_kv_shared_layers=2)
    with pytest.raises(UnsupportedSurgery, match="block 5 produces the keys"):
        distances_of_candidates(model, VALIDATION, [Candidate(range(2, 3)), Candidate(range(6, 7))])
    shortlist = [Selection((range(2, 3),)), Selection((range(5, 6),)), Selection((range(6, 7),))]
    judged = verify_shortlist(model, shortlist, FIT, HELD_OUT, VALIDATION, replacement=parse_replacement("none"))
    found = {one.windows[0].start: one for one in judged}
    for start in (2, 6):
        trial = Trial(Selection(found[start].windows), (None,))
        (wanted,) = trial_distances(ModelSource(model), VALIDATION, [trial], "judge")
        assert found[start].distance == pytest.approx(wanted, rel=1e-5)
    assert "block 5 produces the keys" in found[5].refused
