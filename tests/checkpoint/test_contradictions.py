"""A changed config.json never loads as a model that lost its repair."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, load, save
from streamline_hooks.replacements import LinearReplacement, MLPReplacement, SwiGLUReplacement
from tests.processes import in_a_new_process
from tests.tiny_models import WIDTH, tiny_model, tokens

Path_ = tuple[str | int, ...]
OURS = ("model_type", "base_model_type", "architectures", "auto_map", "quantization_config", "streamline_hooks")


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1], randomized(MLPReplacement(WIDTH, 8)))
        surgeon.insert(3, randomized(LinearReplacement(WIDTH)))
        surgeon.insert(3, randomized(SwiGLUReplacement(WIDTH, 8)))
        surgeon.commit()
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(model, folder)
    (folder / "SHA256SUMS").unlink()
    with torch.no_grad():
        return folder, model(tokens(2, 9)).logits


def paths(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        if not path and key not in OURS:
            continue
        if key != "history":
            yield (*path, key)
            yield from paths(value[key], (*path, key))


def edits(value: Any) -> Iterator[tuple[str, Any]]:
    yield "null", None
    if isinstance(value, bool):
        yield "flipped", not value
    elif isinstance(value, (int, float)):
        yield "one more", value + 1
        yield "zero", 0
    elif isinstance(value, str):
        yield "empty", ""
        others = {"llama": "mistral", "spliced_before": "spliced_after", "linear": "swiglu", "silu": "gelu"}
        yield "other", others.get(value, "model.layers.0.input_layernorm.weight" if "." in value else "LlamaModel")
    elif isinstance(value, (dict, list)):
        yield "empty", type(value)()
        if isinstance(value, list) and len(value) > 1:
            yield "reversed", value[::-1]
            yield "shortened", value[:-1]


def changed(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in paths(config):
        content = copy.deepcopy(config)
        owner: Any = content
        for key in path[:-1]:
            owner = owner[key]
        value = owner.pop(path[-1])
        yield f"{path} deleted", content
        for what, other in edits(value):
            content = copy.deepcopy(config)
            owner = content
            for key in path[:-1]:
                owner = owner[key]
            owner[path[-1]] = other
            yield f"{path} {what}", content


def outcome(folder: Path, way: str) -> Any:
    automatic = AutoModelForCausalLM.from_pretrained
    model: Any = load(folder) if way == "load" else automatic(folder, trust_remote_code=False)
    with torch.no_grad():
        return model(tokens(2, 9)).logits


@pytest.mark.parametrize("way", ["load", "AutoModelForCausalLM"])
def test_every_change_of_the_description_raises_or_changes_nothing(
    way: str, saved: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder, expected = saved
    shutil.copytree(folder, tmp_path / "spliced")
    file = tmp_path / "spliced" / "config.json"
    config = json.loads(file.read_text())
    raised, wrong = 0, []
    for name, content in changed(config):
        file.write_text(json.dumps(content))
        # By these Transformers finds a class, before this library has any part in loading.
        own = way == "load" or not name.startswith(("('model_type'", "('auto_map'"))
        try:
            logits = outcome(file.parent, way)
        except StreamlineError:
            raised += 1
        except Exception as error:  # which are expected is checked here, so that all that are not are listed
            wrong += [f"{name}: {error!r}"] if own else []
        else:
            wrong += [] if torch.equal(logits, expected) else [f"{name}: other logits"]
    assert not wrong, "\n".join(wrong)
    assert raised > 50


@pytest.mark.parametrize("ignore", [False, True])
def test_the_plain_class_refuses_with_and_without_mismatched_sizes(
    ignore: bool, saved: tuple[Path, torch.Tensor]
) -> None:
    for cls in (LlamaForCausalLM, type(tiny_model("llama").base_model)):
        with pytest.raises((ValueError, RuntimeError), match="quant_method"):
            cls.from_pretrained(saved[0], ignore_mismatched_sizes=ignore)
    model = AutoModelForCausalLM.from_pretrained(saved[0], ignore_mismatched_sizes=ignore)
    assert torch.equal(model(tokens(2, 9)).logits, saved[1])
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.long
def test_the_plain_class_refuses_without_the_library(saved: tuple[Path, torch.Tensor]) -> None:
    code = """
        import sys
        sys.modules["streamline_hooks"] = None
        from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig
        try:
            AutoModelForCausalLM.from_pretrained(sys.argv[1])
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
            print("refused")
        for cls in (LlamaForCausalLM, AutoModelForCausalLM, AutoModel):
            for ignore in (False, True):
                try:
                    cls.from_pretrained(sys.argv[1], ignore_mismatched_sizes=ignore, trust_remote_code=False)
                except ValueError as error:
                    print("refused")
        PretrainedConfig.from_pretrained(sys.argv[1])  # by which a tokenizer's class is found
    """
    assert in_a_new_process(code, saved[0]).stdout.count("refused") == 7


@pytest.mark.parametrize("change", ["splices", "modules", "one module", "linear"])
def test_a_checkpoint_of_an_earlier_format(change: str, saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "old"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"], config["streamline_hooks"]["digest"]
    config["streamline_hooks"]["format"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(outcome(folder, "load"), saved[1])
    save(load(folder), tmp_path / "new")
    with pytest.raises(ValueError, match="quant_method"):
        LlamaForCausalLM.from_pretrained(tmp_path / "new", ignore_mismatched_sizes=True)
    splices = config["streamline_hooks"]["splices"]
    if change == "splices":
        splices.pop()
    elif change == "modules":
        splices[0]["modules"].clear()
    elif change == "one module":
        splices[1]["modules"].pop()
    else:
        assert splices[0]["modules"][0]["config"]["linear"]
        splices[0]["modules"][0]["config"]["linear"] = False
    (folder / "config.json").write_text(json.dumps(config))
    for way in ("load", "AutoModelForCausalLM"):
        with pytest.raises(StreamlineError, match=r"streamline_hooks.*changed since it was written"):
            outcome(folder, way)


def test_a_splice_of_another_shape_is_not_ignored(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(saved[0], tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    for key in ("model.norm.weight", next(k for k in weights if "spliced_before" in k)):
        save_file({**weights, key: weights[key][..., :-1].clone()}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(StreamlineError, match=f"{key} does not fit"):
            AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_a_model_that_was_loaded_may_be_changed(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    model: Any = load(saved[0])
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        surgeon.commit()
    save(model, tmp_path / "again")
    assert torch.equal(outcome(tmp_path / "again", "load"), model(tokens(2, 9)).logits)
    type(model)(AutoConfig.from_pretrained(tmp_path / "again"))
    type(model)(model.config)
