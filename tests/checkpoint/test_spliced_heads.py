"""A checkpoint with splices is opened with another head, as the plain model's is, and its body keeps the splices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, load, save
from streamline_hooks.replacements import LinearReplacement
from tests.processes import in_a_new_process
from tests.tiny_models import FAMILIES, WIDTH, repaired, tiny_model, tokens

HEADS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")


def states(model: Any) -> torch.Tensor:
    with torch.no_grad(), HiddenStateRecorder(model, [-1], sites=["block.output"]) as record:
        model(tokens(1, 9))
    return record.outputs[max(record.outputs)][0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_head_on_the_spliced_body(family: str, head: str, tmp_path: Path) -> None:
    automatic = getattr(transformers, head)
    if type(tiny_model(family).config) not in automatic._model_mapping:
        pytest.skip("Transformers has no such class of the plain model")
    model: Any = repaired(family)
    save(model, tmp_path / "model")
    plain = automatic._model_mapping[type(tiny_model(family).config)]
    if plain.base_model_prefix != type(model).base_model_prefix:
        # Transformers itself loads a causal model into this class with random blocks.
        with pytest.raises(StreamlineError, match=rf"0 blocks.*Streamlined{plain.__name__}.*Load"):
            automatic.from_pretrained(tmp_path / "model")
        return
    loaded, info = automatic.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert isinstance(loaded, plain) and type(loaded).__name__ == f"Streamlined{plain.__name__}"
    assert info["missing_keys"] and not [key for key in info["missing_keys"] if ".layers." in key or ".h." in key]
    assert torch.equal(states(loaded), states(model))
    assert loaded(tokens(1, 9))[0].isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_classifier_opened_so_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    save(repaired(family), tmp_path / "model")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", pad_token_id=0)
    save(loaded, tmp_path / "again")
    again = load(tmp_path / "again")
    assert type(again) is type(loaded)
    assert torch.equal(again(tokens(1, 9))[0], loaded(tokens(1, 9))[0])


def test_a_fresh_head_of_any_size(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification as Classifier

    model: Any = repaired("llama")
    save(model, tmp_path / "model")
    loaded = Classifier.from_pretrained(tmp_path / "model", num_labels=5)
    assert loaded.score.out_features == 5
    loaded.save_pretrained(tmp_path / "five")
    other = Classifier.from_pretrained(tmp_path / "five", num_labels=3, ignore_mismatched_sizes=True)
    assert other.score.out_features == 3 and torch.equal(states(other), states(model))


def test_a_masked_language_model_becomes_a_classifier(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61, hidden_size=WIDTH, num_hidden_layers=5, num_attention_heads=4, intermediate_size=48
    )
    model: Any = AutoModelForMaskedLM.from_config(config).eval()
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([2], LinearReplacement.from_map(0.1 * torch.randn(WIDTH, WIDTH)))
        surgeon.commit()
    save(model, tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(states(loaded), states(model))


def test_a_class_without_the_spliced_stack_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification, T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=61, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=4, num_heads=4,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = T5ForConditionalGeneration(config).eval()
    with LayerSurgeon(model, stack="decoder.block") as surgeon:
        surgeon.replace([2], LinearReplacement(WIDTH))
        surgeon.commit()
    save(model, tmp_path / "model")
    with pytest.raises(StreamlineError, match=r"'decoder\.block'.*0 blocks.*StreamlinedT5ForTokenClassific"):
        AutoModelForTokenClassification.from_pretrained(tmp_path / "model")


@pytest.mark.long
def test_other_heads_without_the_library(tmp_path: Path) -> None:
    model: Any = repaired("llama")
    save(model, tmp_path / "model")
    torch.save(AutoModelForCausalLM.from_pretrained(tmp_path / "model").model(tokens(1, 9))[0], tmp_path / "states.pt")
    code = """
        import sys
        sys.modules["streamline_hooks"] = None
        import torch
        from transformers import AutoModelForTokenClassification
        model = AutoModelForTokenClassification.from_pretrained(sys.argv[1] + "/model", trust_remote_code=True)
        expected = torch.load(sys.argv[1] + "/states.pt")
        ids = torch.tensor(eval(sys.argv[2]))
        with torch.no_grad():
            torch.testing.assert_close(model.model(ids)[0], expected)
        print("same")
    """
    assert in_a_new_process(code, tmp_path, str(tokens(1, 9).tolist())).stdout.strip().endswith("same")
