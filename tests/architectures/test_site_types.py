"""No site of any type is read or changed wrongly: it is right, or refused with a reason."""

from __future__ import annotations

import pytest

from streamline_hooks.testing import causal_model_types
from tests.architectures.examine import sites_of
from tests.architectures.examine_sites import CONTRIBUTIONS, SITES, WITH_NORMS

SUBSET = ("dbrx", "falcon_h1", "jamba", "nemotron", "phi3", "qwen3_next", "roberta", "stablelm")


def examined(model_type: str) -> dict[str, str]:
    if model_type not in causal_model_types():
        pytest.skip(f"this Transformers has no {model_type}")
    results = sites_of(model_type)
    assert not {site: result for site, result in results.items() if result.startswith("WRONG")}
    return results


@pytest.mark.parametrize("model_type", SUBSET)
def test_a_representative_type(model_type: str) -> None:
    results = examined(model_type)
    if model_type == "roberta":  # norms after the sums, so that there is no final norm
        assert {results[site] for site in CONTRIBUTIONS} == {WITH_NORMS} and results["attention.heads"] == "ok"
        return
    assert {results[site] for site in SITES if site not in (*CONTRIBUTIONS, "attention.heads")} == {"ok"}
    if model_type != "falcon_h1":  # two mixers, whose sum is recorded but not changed
        assert {results[site] for site in CONTRIBUTIONS} == {"ok"}


@pytest.mark.architectures
@pytest.mark.parametrize("model_type", [t for t in causal_model_types() if t not in SUBSET])
def test_every_other_type(model_type: str) -> None:
    examined(model_type)
