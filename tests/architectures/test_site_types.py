"""No site of any type is read or changed wrongly: it is right, or refused with a reason."""

from __future__ import annotations

import pytest

from streamline_hooks.testing import causal_model_types, tiny_model
from tests.architectures.examine_sites import CONTRIBUTIONS, SITES, examine_sites

SUBSET = ("dbrx", "falcon_h1", "jamba", "nemotron", "phi3", "qwen3_next", "stablelm")


def examined(model_type: str) -> dict[str, str]:
    if model_type not in causal_model_types():
        pytest.skip(f"this Transformers has no {model_type}")
    results = examine_sites(tiny_model(model_type, blocks=3))
    assert not {site: result for site, result in results.items() if result.startswith("WRONG")}
    return results


@pytest.mark.parametrize("model_type", SUBSET)
def test_a_representative_type(model_type: str) -> None:
    results = examined(model_type)
    assert {results[site] for site in SITES if site not in (*CONTRIBUTIONS, "attention.heads")} == {"ok"}
    if model_type != "falcon_h1":  # two mixers, whose sum is recorded but not changed
        assert {results[site] for site in CONTRIBUTIONS} == {"ok"}


@pytest.mark.architectures
@pytest.mark.parametrize("model_type", [t for t in causal_model_types() if t not in SUBSET])
def test_every_other_type(model_type: str) -> None:
    examined(model_type)
