"""Where each kind starts: never above the closed form if it can hold that, nor that above plain removal."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack, verify_shortlist
from streamline_hooks.cli import parse_replacement
from streamline_hooks.repair import LinearConfig, fit_windows, insert_replacement, solve_least_squares
from streamline_hooks.repair.placement import blocks_of
from streamline_hooks.selection import Selection
from streamline_hooks.statistics import measure_moments
from streamline_hooks.testing import tiny_model as any_model
from tests.repair.own_kinds import register_kind
from tests.repair.replacement_modules import FIT, FITTED, HELD_OUT, HOLD_MAP, KINDS, SHAPED, error, leaving
from tests.surgery.test_surgeon import fingerprint
from tests.tiny_models import BLOCKS, FAMILIES, tiny_model, tokens

WINDOW = range(2, 5)


def refused(family: str, kind: str) -> bool:
    """What Gemma's norm behind each branch leaves no way to do."""
    return family == "gemma3" and kind in ("folded", "scale")


@functools.cache
def reference_errors(family: str) -> tuple[float, float, float]:
    """Errors on the calibration data of the closed form and of plain removal, and of the latter on held-out data."""
    model = tiny_model(family)
    (linear,) = fit_windows(model, [WINDOW], LinearConfig(), FIT, HELD_OUT)
    closed_form = error(model, WINDOW, linear.replacement_module)
    return closed_form, error(model, WINDOW, None), error(model, WINDOW, None, HELD_OUT)


@functools.cache
def reference_solution(family: str) -> Any:
    return solve_least_squares(*(measure_moments(tiny_model(family), part, [WINDOW])[0] for part in (FIT, HELD_OUT)))


@pytest.mark.sample(16)
@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_is_not_above_plain_removal_nor_what_holds_the_map_above_the_closed_form(family: str, kind: str) -> None:
    """On the calibration data, measured by putting each in and running the model."""
    model = tiny_model(family)
    before = fingerprint(model)
    if refused(family, kind):
        with pytest.raises(UnsupportedSurgery, match="folded"):
            fit_windows(model, [WINDOW], parse_replacement(kind), FIT, HELD_OUT)
        return
    (repair,) = fit_windows(model, [WINDOW], parse_replacement(kind), FIT, HELD_OUT)
    step_0 = error(model, WINDOW, repair.replacement_module)
    assert fingerprint(model) == before
    closed_form, removal, held_out_removal = reference_errors(family)
    assert step_0 < removal and repair.repaired_error <= repair.removal_error
    assert repair.removal_error == pytest.approx(held_out_removal, rel=1e-5)
    if kind in HOLD_MAP:
        solution = reference_solution(family)
        assert step_0 == pytest.approx(closed_form, rel=1e-5) and repair.ridge == solution.ridge
        assert repair.repaired_error == solution.held_out_error
    elif kind in SHAPED:
        assert step_0 >= closed_form * (1 - 1e-6)


@pytest.mark.sample(6)
@pytest.mark.parametrize("window", [range(0, 3), range(3, BLOCKS)], ids=["first", "last"])
@pytest.mark.parametrize("kind", FITTED)
def test_the_first_and_the_last_window(kind: str, window: range) -> None:
    model = tiny_model("llama")
    if kind == "folded" and window.start == 0:
        with pytest.raises(UnsupportedSurgery, match="no block precedes"):
            fit_windows(model, [window], parse_replacement(kind), FIT, HELD_OUT)
        return
    (repair,) = fit_windows(model, [window], parse_replacement(kind), FIT, HELD_OUT)
    assert error(model, window, repair.replacement_module) < error(model, window, None)


@pytest.mark.long
def test_every_kind_is_the_same_twice_and_leaves_the_random_numbers_alone() -> None:
    for kind in KINDS:
        found = []
        for seed in (3, 4):
            model = tiny_model("llama")
            torch.manual_seed(seed)
            (repair,) = fit_windows(model, [WINDOW], parse_replacement(kind), FIT, HELD_OUT)
            drawn = torch.rand(1)
            torch.manual_seed(seed)
            assert torch.equal(drawn, torch.rand(1))
            found.append(leaving(model, WINDOW, FIT[0], repair.replacement_module))
        assert torch.equal(*found)


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", FITTED)
def test_several_windows_in_one_call_are_each_fitted_on_the_model_as_it_is(kind: str) -> None:
    model, windows = tiny_model("opt"), [range(1, 4), range(3, 6)]
    together = fit_windows(model, windows, parse_replacement(kind), FIT, HELD_OUT)
    for window, repair in zip(windows, together, strict=True):
        (alone,) = fit_windows(model, [window], parse_replacement(kind), FIT, HELD_OUT)
        assert (repair.window, repair.ridge) == (window, alone.ridge)
        states = [leaving(model, window, FIT[1], one.replacement_module) for one in (repair, alone)]
        torch.testing.assert_close(*states)


@pytest.mark.sample(5)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_batch_size_and_padding_do_not_matter(kind: str) -> None:
    model = tiny_model("llama")
    rows = [{name: value[k : k + 1] for name, value in FIT[1].items()} for k in range(4)]  # type: ignore[union-attr]
    short = [{name: value[:, int(2 * k) :] for name, value in row.items()} for k, row in enumerate(rows)]
    together = fit_windows(model, [WINDOW], parse_replacement(kind), FIT, HELD_OUT)[0]
    apart = fit_windows(model, [WINDOW], parse_replacement(kind), [*FIT[0].split(3), *short], HELD_OUT)[0]  # type: ignore[union-attr]
    assert together.ridge == apart.ridge
    for name in ("removal_error", "repaired_error"):
        assert getattr(together, name) == pytest.approx(getattr(apart, name), rel=1e-5)
    if kind != "scale":  # which changes the states behind in its own way
        states = [leaving(model, WINDOW, FIT[0], one.replacement_module) for one in (together, apart)]
        torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", [kind for kind in FITTED if kind != "folded"])
def test_narrow_precisions_and_dropout(kind: str) -> None:
    """In bfloat16 the weights are those of float32 rounded; a model in training is fitted without its dropout."""
    wide, narrow = tiny_model("opt"), tiny_model("opt", torch.bfloat16)
    narrow.train()
    for block in find_stack(narrow):
        block.dropout = 0.5
    errors = []
    for model in (wide, narrow):
        (repair,) = fit_windows(model, [WINDOW], parse_replacement(kind), FIT, HELD_OUT)
        model.eval()
        parameters = list(repair.replacement_module.parameters())  # type: ignore[union-attr]
        assert {p.dtype for p in parameters} == {model.dtype}
        errors.append((repair.repaired_error, error(model, WINDOW, repair.replacement_module)))
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


class Own(nn.Module):
    """A user's module: tanh(h A) B, without a residual path."""

    last_projection = "second"

    def __init__(self, features: int, width: int = 40) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, width), nn.Linear(width, features)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(state)))


class AsMade(Own):
    last_projection = None  # type: ignore[assignment]


class Mapped(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, features))

    def start_at(self, map_: torch.Tensor) -> None:
        self.weight.data.copy_(map_)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + state @ self.weight


class Wrong(Own):
    last_projection = "third"


class Tied(nn.Module):
    """Both layers have one weight, so a change of the second changes the first."""

    last_projection = "second"

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, features), nn.Linear(features, features)
        self.second.weight = self.first.weight

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(state)))


class NormAtTheEnd(Own):
    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.norm = nn.LayerNorm(features)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(state))


def test_a_module_of_ones_own_starts_as_what_it_says_of_itself() -> None:
    for factory in (AsMade, Mapped, Wrong, NormAtTheEnd, Tied):
        register_kind(f"own-{factory.__name__.lower()}", factory, solved=factory is not AsMade)
    register_kind("own-own", lambda features: Own(features, width=64))
    model = tiny_model("llama")
    linear, own, mapped, plain = (
        fit_windows(model, [WINDOW], parse_replacement(kind), FIT, HELD_OUT)[0]
        for kind in ("linear", "own-own", "own-mapped", "own-asmade")
    )
    assert mapped.repaired_error == linear.repaired_error
    assert error(model, WINDOW, mapped.replacement_module) == pytest.approx(
        error(model, WINDOW, linear.replacement_module)
    )
    assert plain.ridge is None and own.ridge is not None
    assert plain.repaired_error == pytest.approx(error(model, WINDOW, plain.replacement_module, HELD_OUT), rel=1e-5)
    assert error(model, WINDOW, own.replacement_module) < error(model, WINDOW, plain.replacement_module)
    assert own.replacement_module.first.out_features == 64  # type: ignore[union-attr]
    with pytest.raises(StreamlineError, match=r"'third'.*NoneType.*Expected"):
        fit_windows(model, [WINDOW], parse_replacement("own-wrong"), FIT, HELD_OUT)
    with pytest.raises(StreamlineError, match=r"NormAtTheEnd.*not added"):
        fit_windows(model, [WINDOW], parse_replacement("own-normattheend"), FIT, HELD_OUT)
    with pytest.raises(StreamlineError, match=r"Tied.last_projection='second' shares.*Expected"):
        fit_windows(model, [WINDOW], parse_replacement("own-tied"), FIT, HELD_OUT)


def test_a_subclass_of_linear_that_computes_the_same_is_solved() -> None:
    """Falcon's projections are of such a class."""
    model = any_model("falcon")
    parts = [torch.randint(3, 60, (4, 20), generator=torch.Generator().manual_seed(k)) for k in range(4)]
    (repair,) = fit_windows(model, [WINDOW], parse_replacement("block"), parts[:3], parts[3:])
    (copied,) = fit_windows(model, [WINDOW], parse_replacement("block:solve=false"), parts[:3], parts[3:])
    assert repair.ridge is not None and copied.ridge is None
    assert error(model, WINDOW, repair.replacement_module, parts) < error(
        model, WINDOW, copied.replacement_module, parts
    )


def test_a_module_that_cannot_be_solved_is_not_taken_for_solved() -> None:
    """Otherwise its random weights would decide between the windows, and the report would say "in closed form"."""
    config = register_kind("own-unsolvable", AsMade)
    with pytest.raises(StreamlineError, match=r"OwnConfig.*is_solved=True.*AsMade.*start_at.*is_solved = False"):
        fit_windows(tiny_model("llama"), [WINDOW], config, FIT, HELD_OUT)


def undone(model: nn.Module, window: range) -> None:
    """Let the last block of a window return what entered the first: whatever stands there does harm."""
    kept: list[torch.Tensor] = []
    blocks = find_stack(model)
    blocks[window.start].register_forward_pre_hook(lambda block, args: kept.append(args[0]))
    blocks[window.stop - 1].register_forward_hook(
        lambda block, args, output: (kept.pop(), *output[1:]) if isinstance(output, tuple) else kept.pop()
    )


@pytest.mark.parametrize(
    ("kind", "how"), [("block", "with its last projection solved by least squares"), ("silenced", "")]
)
def test_an_inherited_block_that_is_worse_than_nothing_is_refused(kind: str, how: str) -> None:
    model = tiny_model("llama")
    undone(model, WINDOW)
    if kind == "silenced":  # it can be nothing
        (repair,) = fit_windows(model, [WINDOW], parse_replacement(kind), FIT, HELD_OUT)
        assert repair.repaired_error < 1e-6
        return
    with pytest.raises(UnsupportedSurgery, match=rf"LlamaDecoderLayer.*{how}, its relative"):
        fit_windows(model, [WINDOW], parse_replacement(kind), FIT, HELD_OUT)


@pytest.mark.parametrize("kind", ["block", "silenced"])
@pytest.mark.parametrize("model_type", ["mixtral", "gemma2"])
def test_what_has_no_last_projection_starts_as_it_was_unless_that_is_worse_than_nothing(
    model_type: str, kind: str
) -> None:
    """All experts write into the state; a norm follows Gemma's projections."""
    model = any_model(model_type)
    with torch.no_grad():  # the MLP of the first block is most of what the window does, so that it is worth something
        for k, block in enumerate(find_stack(model)):
            for name, parameter in block.named_parameters():
                if k in WINDOW and parameter.ndim > 1 and (k > WINDOW.start or "o_proj" in name):
                    parameter.mul_(0.1)
    part = [torch.randint(3, 60, (4, 20), generator=torch.Generator().manual_seed(k)) for k in range(4)]
    with pytest.warns(UserWarning, match="DecoderLayer starts as a copy"):
        (repair,) = fit_windows(model, [WINDOW], parse_replacement(kind), part[:3], part[3:])
    assert repair.ridge is None and repair.repaired_error < repair.removal_error
    assert repair.repaired_error == pytest.approx(error(model, WINDOW, repair.replacement_module, part[3:]), rel=1e-4)
    (block,) = blocks_of(find_stack(model), repair.replacement_module)
    original = dict(find_stack(model)[WINDOW.start].named_parameters())
    changed = {name for name, p in block.named_parameters() if not torch.equal(p, original[name])}
    assert changed == ({"self_attn.o_proj.weight"} if kind == "silenced" else set())
    undone(model, WINDOW)
    with pytest.raises(UnsupportedSurgery, match=r"worse than plain removal.*relative"):
        fit_windows(model, [WINDOW], parse_replacement(kind), part[:3], part[3:])


def test_what_is_not_finite_is_named() -> None:
    def broken(features: int) -> nn.Module:
        module = nn.Linear(features, features)
        module.weight.data[0, 0] = float("nan")
        return module

    register_kind("own-broken", broken, solved=False)
    with pytest.raises(StreamlineError, match=r"Linear.*not finite"):
        fit_windows(tiny_model("llama"), [WINDOW], parse_replacement("own-broken"), FIT, HELD_OUT)


@pytest.mark.parametrize("kind", ["linear:rank=4", "swiglu", "block", "silenced"])
def test_two_windows_at_once_are_fitted_in_order_on_the_repaired_model(kind: str) -> None:
    model = tiny_model("llama")
    windows = [range(0, 2), range(3, 6)]
    (first,) = fit_windows(model, windows[:1], parse_replacement(kind), FIT, HELD_OUT)
    with LayerSurgeon(model, probe=False) as surgeon:
        insert_replacement(surgeon, windows[0], first.replacement_module)
        now = surgeon.plan.old_to_new[3]
        window = range(now, now + 3)
        (second,) = fit_windows(model, [window], parse_replacement(kind), FIT, HELD_OUT)
        (found,) = verify_shortlist(
            model, [Selection((window,))], FIT, HELD_OUT, [tokens(2, 9)], replacement=parse_replacement(kind)
        )
        states = [leaving(model, window, FIT[0], one.replacement_module) for one in (second, found.repairs[0])]
    torch.testing.assert_close(*states)
    (found,) = verify_shortlist(
        model, [Selection(tuple(windows))], FIT, HELD_OUT, [tokens(2, 9)], replacement=parse_replacement(kind)
    )
    assert [repair.window for repair in found.repairs] == windows
    assert [r.repaired_error for r in found.repairs] == pytest.approx([r.repaired_error for r in (first, second)])
    torch.testing.assert_close(
        dict(second.replacement_module.named_parameters()),  # type: ignore[union-attr]
        dict(found.repairs[1].replacement_module.named_parameters()),  # type: ignore[union-attr]
        rtol=1e-3,
        atol=1e-4,
    )
    (alone,) = fit_windows(model, windows[1:], parse_replacement(kind), FIT, HELD_OUT)
    assert alone.repaired_error != pytest.approx(second.repaired_error, rel=1e-3)


def test_no_kind_needs_a_name() -> None:
    (repair,) = fit_windows(tiny_model("llama"), [WINDOW], LinearConfig(), FIT, HELD_OUT)
    assert repair.replacement_module is not None
