"""Checkpoints that earlier versions wrote load to the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from streamline_hooks import CompressionConfig, StreamlineError, load

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
    with pytest.raises(StreamlineError, match=rf"{name} holds no config.*compress again"):
        CompressionConfig.load(EARLIER / name)
