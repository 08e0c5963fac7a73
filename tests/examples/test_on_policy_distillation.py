"""The example that distills with TRL trains the compressed model, leaves the original, and saves what it trained."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from streamline_hooks import CompressionConfig, DataConfig, compress, load
from streamline_hooks.pipeline import EvaluationConfig
from streamline_hooks.repair import REPLACEMENTS
from streamline_hooks.testing import tiny_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "on_policy_distillation.py"


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    names = {"<end>": 0, "<unk>": 1, **{f"w{k}": k for k in range(2, vocabulary)}}
    core = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")


@pytest.mark.sample(1)
@pytest.mark.parametrize("repair", ["linear", "none"])
def test_ten_steps_of_on_policy_distillation(repair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="the extra `trl` is not installed")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model: Any = tiny_model("llama")
    original = copy.deepcopy(model)
    tokenizer = words(model.config.vocab_size)
    random = Random(0)
    documents = [" ".join(f"w{random.randrange(2, 60)}" for _ in range(24)) for _ in range(60)]
    data = DataConfig(sequence_length=16, calibration_tokens=320, validation_tokens=64, test_tokens=64)
    nothing = EvaluationConfig(speed=False, generation=False)
    kind = REPLACEMENTS[repair]()
    compress(
        model, documents, CompressionConfig(remove=2, repair=kind, data=data, evaluation=nothing), tokenizer=tokenizer
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    distill = runpy.run_path(str(EXAMPLE))["distill"]
    amounts = {"prompt_tokens": 6, "new_tokens": 6, "batch_size": 2, "learning_rate": 1e-2, "use_cpu": True}
    distill(model, original, tokenizer, documents, steps=10, output=tmp_path / "out", **amounts)

    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if p.ndim > 1)
    untouched = tiny_model("llama").state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in original.state_dict().items())
    ids = torch.tensor([tokenizer(documents[0]).input_ids])
    reloaded = load(tmp_path / "out")
    assert torch.equal(reloaded(ids).logits, model.eval()(ids).logits)
    assert reloaded.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 28)
