"""Configs of searches: files, the effect of each field, what is refused, and a user's own search and criterion."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LinearConfig, StreamlineError, Target, compress, profile
from streamline_hooks.repair import BlockConfig, ReplacementConfig
from streamline_hooks.selection import (
    CRITERIA,
    SEARCHES,
    AttentionSearch,
    Criterion,
    DisjointSearch,
    GreedySearch,
    MixedSearch,
    OneShotSearch,
    SearchConfig,
    SearchProblem,
    Selection,
    WindowSearch,
    register_criterion,
    register_search,
    score_windows,
    windows_of_size,
)
from streamline_hooks.statistics import Profile
from streamline_hooks.testing import tiny_model
from tests.configured import arguments

BLOCKS, REMOVED = 8, 3
Value = Any


@cache
def evidence() -> dict[str, Any]:
    """A model, text, and a profile of it."""
    model = tiny_model("llama")
    batches = [torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    return {"model": model, "batches": batches, "profile": profile(model, batches)}


def found(search: SearchConfig) -> list[tuple[Any, ...]]:
    """Return what a search finds, with its scores."""
    problem = search.problem(windows_of_size(BLOCKS, REMOVED), BLOCKS, **evidence())
    return [(one.windows, one.zeroed, round(one.score, 9)) for one in search.find(problem)]


def refused(search: Callable[[], SearchConfig]) -> bool:
    """Whether a search cannot be made."""
    try:
        search()
    except StreamlineError:
        return True
    return False


COMMON: dict[str, Value] = {"criterion": "last_n", "protect": (-2, 1, 6), "shortlist": 1}
# For each search, a value of each field that finds other blocks than the default; the two that are refused below.
ALTERNATIVES: dict[str, dict[str, Value]] = {
    "window": COMMON,
    "disjoint": {**COMMON, "windows": 3},
    "one-shot": COMMON,
    "mixed": {**COMMON, "windows": 3},
    "greedy": {**COMMON, "shortlist": 2},
    "attention": {**COMMON, "criterion": "kl"},
    "mlp": {**COMMON, "criterion": "kl"},
}
# These fields have one possible value, which says so to whoever gives another one.
REFUSED = {("greedy", "shortlist"), ("attention", "criterion"), ("mlp", "criterion")}


def plain(kind: str) -> SearchConfig:
    return SEARCHES[kind]()


def has_effect(search: SearchConfig, field: str, value: Value) -> bool:
    """Whether a field's value changes what is found, or is refused by a search that can have no other."""
    if (search.kind, field) in REFUSED:
        return refused(lambda: replace(search, **{field: value}))
    return found(replace(search, **{field: value})) != found(search)


def require_described(config: type[SearchConfig], alternatives: Mapping[str, Value]) -> None:
    assert {field.name for field in fields(config)} == set(alternatives), "describe each field in ALTERNATIVES"


def built_in() -> list[str]:
    return [kind for kind in SEARCHES if not kind.startswith(("test-", "doctest-"))]


def test_every_field_of_every_search_is_described() -> None:
    assert set(built_in()) == set(ALTERNATIVES)
    for kind in built_in():
        require_described(SEARCHES[kind], ALTERNATIVES[kind])


@pytest.mark.sample(8)
@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, its in ALTERNATIVES.items() for field in its])
def test_every_field_has_an_effect(kind: str, field: str) -> None:
    assert has_effect(plain(kind), field, ALTERNATIVES[kind][field])


def test_a_planted_field_without_effect_is_found() -> None:
    planted = make_dataclass("Planted", [("unused", int, 1)], bases=(DisjointSearch,), frozen=True)
    with pytest.raises(AssertionError, match="describe each field"):
        require_described(planted, ALTERNATIVES["disjoint"])
    assert not has_effect(planted(), "unused", 2)
    assert has_effect(planted(), "windows", 3)


@pytest.mark.parametrize("kind", list(ALTERNATIVES))
def test_configs_are_read_as_they_were_written(kind: str) -> None:
    values = {f: v for f, v in ALTERNATIVES[kind].items() if (kind, f) not in REFUSED}
    several = {} if "criterion" not in values else {"criterion": {"cosine": 1.0, "last_n": 0.5}}
    for search in (SEARCHES[kind](), SEARCHES[kind](**values), SEARCHES[kind](**several)):
        assert SearchConfig.from_dict(json.loads(json.dumps(search.to_dict()))) == search


def test_weights_are_those_of_a_combination_by_rank() -> None:
    given = {"cosine": 1.0, "relative_magnitude": 1.0}
    search = WindowSearch(given)
    assert found(search) == found(WindowSearch("cosine_and_magnitude")) == found(WindowSearch())
    given["last_n"] = 1.0
    assert search == WindowSearch({"cosine": 1.0, "relative_magnitude": 1.0})
    assert found(WindowSearch(given)) != found(search)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "windw"}, "'windw'.*Did you mean 'window'"),
        ({"kind": "quantum"}, "'quantum'.*Expected one of window, disjoint.*register_search"),
        ({"kind": "window", "windows": 2}, "'windows' is unknown.*Expected one of criterion, protect, shortlist"),
        ({"kind": "window", "criterion": "cosinus"}, "'cosinus'.*Did you mean 'cosine'"),
        ({"kind": "window", "criterion": {"cosinus": 1.0}}, "'cosinus'.*Did you mean 'cosine'"),
        ({"kind": "window", "criterion": {"cosine": 0.0}}, "weight of 0.0.*above 0"),
        ({"kind": "window", "criterion": {}}, "no criteria.*Expected"),
        ({"kind": "window", "criterion": 3}, "criterion=3.*Expected str"),
        ({"kind": "window", "protect": "0"}, "protect='0'.*Expected tuple"),
        ({"kind": "window", "protect": [0.5]}, "protect=.*0.5"),
        ({"kind": "window", "shortlist": 0}, "shortlist=0.*at least 1"),
        ({"kind": "disjoint", "windows": 0}, "windows=0.*at least 1"),
        ({"kind": "disjoint", "windows": True}, "windows=True.*Expected int"),
        ({"kind": "mixed", "windows": 1}, "windows=1.*at least 2"),
        ({"kind": "greedy", "shortlist": 4}, "shortlist=4.*Expected at most 1.*Omit"),
        ({"kind": "attention", "criterion": "kl"}, "criterion='kl'.*Expected 'cosine'.*Omit"),
        ({"kind": "mlp", "criterion": {"cosine": 1.0, "kl": 1.0}}, "criterion=.*Expected 'cosine'"),
    ],
)
def test_values_that_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(StreamlineError, match=named):
        SearchConfig.from_dict(values)


@pytest.mark.parametrize(
    ("search", "given", "named"),
    [
        (OneShotSearch(), {"target": Target(parameters=0.2)}, "parameters:0.2.*Expected a number"),
        (DisjointSearch(windows=3), {"target": 2, "blocks": 2}, "2 blocks.*3 windows.*Remove more"),
        (DisjointSearch(), {"target": 3, "blocks": 3, "replacement": BlockConfig()}, "2 windows of at least 2.*Remove"),
        (
            MixedSearch(),
            {"target": 3, "replacement": BlockConfig()},
            "'mixed'.*'block'.*1 slot per window.*without a slot",
        ),
    ],
)
def test_targets_that_do_not_fit(search: SearchConfig, given: dict[str, Any], named: str) -> None:
    with pytest.raises(StreamlineError, match=named):
        search.check(**given)


def test_targets_that_fit() -> None:
    WindowSearch().check(Target(parameters=0.2), 3, BlockConfig())
    DisjointSearch().check(4, 4, BlockConfig())
    AttentionSearch().check(0.25, 2, BlockConfig())
    GreedySearch().check(0.25, 2, LinearConfig())
    taken: list[tuple[SearchConfig, ReplacementConfig, int]] = [
        (WindowSearch(), BlockConfig(count=2), 2),
        (DisjointSearch(windows=3), BlockConfig(), 3),
        (AttentionSearch(), BlockConfig(), 0),
    ]
    for search, replacement, slots in taken:
        assert search.slots(replacement) == slots


def test_blocks_that_must_stay_are_counted_from_the_end_too() -> None:
    problem = WindowSearch(protect=(0, -1)).problem(windows_of_size(BLOCKS, 3), BLOCKS, **evidence())
    assert problem.protect == {0, BLOCKS - 1} and list(problem.candidates) == windows_of_size(
        BLOCKS, 3, problem.protect
    )
    with pytest.raises(StreamlineError, match="protect: block 8 is out of range"):
        WindowSearch(protect=(8,)).problem(windows_of_size(BLOCKS, 3), BLOCKS)
    with pytest.raises(StreamlineError, match="candidates=.* is empty.*protect fewer"):
        WindowSearch(protect=tuple(range(BLOCKS))).problem(windows_of_size(BLOCKS, 3), BLOCKS)


@dataclass(frozen=True)
class SecondSearch(SearchConfig):
    """The windows but the best, as a user would write it."""

    kind = "test-second"
    skip: int = 1

    @property
    def number_of_windows(self) -> int:
        return 1

    def find(self, problem: SearchProblem) -> list[Selection]:
        scores = dict(zip(problem.candidates, problem.score(problem.candidates), strict=True))
        best = sorted(scores, key=lambda window: -scores[window])[self.skip : self.skip + problem.best]
        return [Selection((window,), score=scores[window]) for window in best]


def start(profile: Profile, window: range) -> float:
    return float(window.start)


@pytest.fixture
def own() -> Iterator[None]:
    """Register a search and a criterion, and take them out again."""
    assert register_search(register_search(SecondSearch)) is SecondSearch  # as when a notebook's cell runs again
    criterion = Criterion("test-start", start, "profile", "mine")
    assert register_criterion(criterion) is criterion
    yield
    del SEARCHES["test-second"], CRITERIA["test-start"]


def test_a_users_search_and_criterion(own: None) -> None:
    measured = evidence()["profile"]
    assert score_windows("test-start", windows_of_size(BLOCKS, 2), profile=measured) == list(
        map(float, range(BLOCKS - 1))
    )
    search = SearchConfig.from_dict({"kind": "test-second", "criterion": "test-start", "protect": [-1], "shortlist": 2})
    selections = search.find(search.problem(windows_of_size(BLOCKS, 2), BLOCKS, profile=measured))
    assert [one.windows for one in selections] == [(range(4, 6),), (range(3, 5),)]
    with pytest.raises(StreamlineError, match="'test-secnd'.*Did you mean 'test-second'"):
        SearchConfig.from_dict({"kind": "test-secnd"})
    with pytest.raises(StreamlineError, match="'test-strat'.*Did you mean 'test-start'"):
        WindowSearch("test-strat")
    with pytest.raises(StreamlineError, match="SecondSearch.*criterion=3.*Expected str"):
        SecondSearch(criterion=3)  # type: ignore[arg-type]


def test_a_users_search_and_criterion_compress(own: None) -> None:
    batches = [torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(k)) for k in range(8)]
    parts = {"calibration": batches[:5], "validation": batches[5:7], "test": batches[7:]}
    given: dict[str, Any] = {"search": "test-second", "criterion": "test-start", "protect": [-1], "shortlist": 1}
    result = compress(
        tiny_model("llama"), parts, **arguments(remove=2, repair="block", speed=False, generation=False, **given)
    )
    assert (result.search, result.criterion) == ("test-second", "test-start")
    assert [one.windows for one in result.candidates] == [(range(3, 6),)]  # a slot is for the block in their place


class NoDataclass(SearchConfig):
    kind = "test-no-dataclass"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (NoDataclass, "NoDataclass.*not a config of a search.*dataclass"),
        (nn.Linear, "Linear.*subclass of SearchConfig"),
        (LinearConfig, "LinearConfig.*subclass of SearchConfig"),
        (
            make_dataclass("Named", [], bases=(SearchConfig,), frozen=True, namespace={"kind": "window"}),
            "'window'.*new",
        ),
        (make_dataclass("Named", [], bases=(SearchConfig,), frozen=True, namespace={"kind": "a b"}), "'a b'.*Choose"),
    ],
)
def test_classes_that_cannot_be_registered(config: Any, named: str) -> None:
    with pytest.raises(StreamlineError, match=named):
        register_search(config)


def test_a_search_of_another_kind_keeps_what_is_not_of_its_kind() -> None:
    search = DisjointSearch(criterion="kl", protect=(0,), shortlist=4, windows=3)
    assert search.with_kind("disjoint", {"windows": 2}) == DisjointSearch("kl", (0,), 4, 2)
    assert search.with_kind("window", {}) == WindowSearch(protect=(0,), shortlist=4)
    assert search.with_kind("greedy", {}) == GreedySearch(protect=(0,))
    assert search.with_kind("window", {"shortlist": 9}).shortlist == 9
