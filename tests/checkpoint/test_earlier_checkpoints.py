"""Checkpoints that earlier versions wrote load to the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import CompressionConfig, StreamlineError, load
from streamline_hooks.statistics import Profile
from tests.checkpoint.write_earlier import encoder, encoder_states, input_ids, replacements

EARLIER = Path(__file__).parent / "earlier"
"""Written before checkpoints held a config, without the code and checksums in them; beside each, its logits then."""


@pytest.mark.parametrize("name", ["mlp", "silenced"])
def test_a_checkpoint_without_a_config_loads(name: str) -> None:
    expected = json.loads((EARLIER / f"{name}.json").read_text())
    with torch.no_grad():
        logits = load(EARLIER / name)(torch.tensor(expected["input_ids"])).logits
    torch.testing.assert_close(logits[0, -2:], torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "silenced"])
def test_its_missing_config_is_an_error_with_the_reason(name: str) -> None:
    with pytest.raises(StreamlineError, match=rf"{name} contains no config.*compress again"):
        CompressionConfig.load(EARLIER / name)


FOLDERS = ["version_0_1"]
"""Written by `write_earlier`."""


def expected(name: str) -> dict[str, Any]:
    return json.loads((EARLIER / name / "expected.json").read_text())


@pytest.mark.parametrize("name", FOLDERS)
def test_a_spliced_checkpoint_gives_the_same_logits(name: str) -> None:
    model = load(EARLIER / name / "spliced")
    with torch.no_grad():
        logits = model(input_ids()).logits[:, -1]
    torch.testing.assert_close(logits, torch.tensor(expected(name)["logits"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_module_that_is_not_from_transformers_gives_the_same_states(name: str) -> None:
    module = load(EARLIER / name / "module", into=encoder())
    with torch.no_grad():
        states = module(encoder_states())
    torch.testing.assert_close(states, torch.tensor(expected(name)["states"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_profile_gives_the_same_cosines(name: str) -> None:
    cosine = Profile.load(EARLIER / name / "profile.safetensors").cosine
    torch.testing.assert_close(cosine, torch.tensor(expected(name)["cosine"], dtype=cosine.dtype))


@pytest.mark.parametrize("name", FOLDERS)
def test_pickled_replacements_find_their_classes(name: str) -> None:
    pickled = torch.load(EARLIER / name / "replacements.pt", weights_only=False)
    state = torch.linspace(-1, 1, 64).view(1, 2, 32)
    for kind, made in replacements().items():
        assert type(pickled[kind]) is type(made)
        torch.testing.assert_close(pickled[kind](state), made(state))
