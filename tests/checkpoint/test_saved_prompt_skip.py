"""A committed PromptSkip is saved with its model, skips after loading, and fails to load without this library."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, load, save
from streamline_hooks.checkpoint import export_plain
from streamline_hooks.replacements import LinearReplacement, SwiGLUReplacement, register_module
from streamline_hooks.surgery import PromptSkip, prompt_skip_of
from tests.processes import in_a_new_process
from tests.tiny_models import FAMILIES, WIDTH, left_padded, tiny_model, tokens

WINDOW = range(3, 6)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}


def maps() -> list[nn.Module | None]:
    generator = torch.Generator().manual_seed(0)
    linear = LinearReplacement.from_map(0.3 * torch.randn(WIDTH, WIDTH, generator=generator))
    gated = SwiGLUReplacement(WIDTH, 8)
    with torch.no_grad():
        for parameter in gated.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return [linear, gated, None]


def committed(family: str = "llama", last_tokens: int = 2) -> Any:
    model = tiny_model(family)
    with PromptSkip(model, WINDOW, maps(), last_tokens=last_tokens) as skip:
        skip.commit()
    return model


def outputs(model: Any) -> list[torch.Tensor]:
    """New tokens of padded prompts, and logits with and without marks."""
    batch, ids = left_padded(3, 9), tokens(2, 7)
    marks = torch.arange(7).expand(2, 7) < 5
    with torch.no_grad():
        new = model.generate(**batch, **GREEDY)
        with prompt_skip_of(model).marked(marks):
            skipped = model(ids).logits
        return [new, skipped, model(ids).logits]


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_committed_model_skips_like_the_open_one(family: str) -> None:
    model, plain = committed(family), tiny_model(family)
    batch = left_padded(3, 9)
    with PromptSkip(plain, WINDOW, maps(), last_tokens=2):
        expected = plain.generate(**batch, **GREEDY)
    new, skipped, full = outputs(model)
    assert torch.equal(new, expected) and not torch.equal(plain.generate(**batch, **GREEDY), expected)
    assert torch.equal(full, plain(tokens(2, 7)).logits) and not torch.allclose(skipped, full, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_keeps_it(family: str, tmp_path: Path) -> None:
    model = committed(family)
    folder = save(model, tmp_path / "m")
    for loaded in (load(folder), AutoModelForCausalLM.from_pretrained(folder).eval()):
        assert prompt_skip_of(loaded).window == WINDOW and prompt_skip_of(loaded).last_tokens == 2
        assert_equal(outputs(loaded), outputs(model))
    again = save(load(folder), tmp_path / "again")
    assert_equal(outputs(load(again)), outputs(model))


def test_checkpoints_written_before_the_number_of_last_tokens_run_one(tmp_path: Path) -> None:
    model = committed(last_tokens=1)
    model.config.streamline_hooks["prompt_skip"]["last_tokens"] = "1"
    with pytest.raises(StreamlineError, match="'last_tokens'.*is '1', expected int"):
        load(save(model, tmp_path / "damaged"))
    del model.config.streamline_hooks["prompt_skip"]["last_tokens"]
    folder = save(model, tmp_path / "before")
    assert '"format": 4' in (folder / "config.json").read_text()
    for loaded in (load(folder), load(save(load(folder), tmp_path / "again"))):
        assert prompt_skip_of(loaded).last_tokens == 1
        assert_equal(outputs(loaded), outputs(committed(last_tokens=1)))


def test_copies_and_pickles_skip_with_their_own_weights() -> None:
    model = committed()
    expected = outputs(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(outputs(copied), expected)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(1.1)
        assert not torch.allclose(outputs(copied)[1], expected[1], atol=1e-2)
        assert_equal(outputs(model), expected)


def test_trained_maps_and_a_loaded_state_dict_are_used() -> None:
    model, other = committed(), committed()
    with torch.no_grad():
        for parameter in other.prompt_maps.parameters():
            parameter.add_(0.1)
    assert not torch.equal(outputs(model)[1], outputs(other)[1])
    model.load_state_dict(other.state_dict())
    assert_equal(outputs(model), outputs(other))


@register_module("test-shifted")
class Shifted(nn.Module):
    """A map with a buffer that checkpoints do not contain."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.scale = nn.Parameter(torch.full((features,), 0.5))
        self.register_buffer("shift", torch.arange(features) / features, persistent=False)

    def to_config(self) -> dict[str, Any]:
        return {"features": self.features}

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state * self.scale + self.shift


def test_buffers_that_no_checkpoint_contains_come_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with PromptSkip(model, WINDOW, [Shifted(WIDTH), Shifted(WIDTH), None], last_tokens=1) as skip:
        skip.commit()
    assert_equal(outputs(load(save(model, tmp_path / "m"))), outputs(model))


def test_without_the_library_loading_fails(tmp_path: Path) -> None:
    folder = save(committed(), tmp_path / "m")
    code = f"from transformers import AutoModelForCausalLM, LlamaForCausalLM\n{{}}.from_pretrained({str(folder)!r})"
    for name in ("AutoModelForCausalLM", "LlamaForCausalLM"):
        run = in_a_new_process(code.format(name), check=False)
        assert run.returncode != 0 and "streamline_hooks" in run.stderr, name
    assert not list(folder.glob("*.py"))  # no code that would load it elsewhere


def test_blocks_are_no_longer_changed_and_nothing_is_exported(tmp_path: Path) -> None:
    model = committed()
    with pytest.raises(StreamlineError, match="commit the skipping last"):
        LayerSurgeon(model).__enter__()
    with pytest.raises(StreamlineError, match="commit the skipping last"):
        PromptSkip(model, range(1, 2))
    with pytest.raises(StreamlineError, match="Export the original"):
        export_plain(model, tmp_path / "plain")
    with pytest.raises(StreamlineError, match="open or committed"):
        prompt_skip_of(model).__enter__()


def test_a_model_with_splices_can_skip_too(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 2), maps()[0])
        surgeon.commit()
    with PromptSkip(model, range(2, 5), maps(), last_tokens=1) as skip:
        skip.commit()
    loaded = load(save(model, tmp_path / "m"))
    assert len(loaded.model.layers) == 5
    assert_equal(outputs(loaded), outputs(model))


def test_a_headless_model_is_refused(tmp_path: Path) -> None:
    folder = save(committed(), tmp_path / "m")
    with pytest.raises(StreamlineError, match="AutoModelForCausalLM"):
        AutoModel.from_pretrained(folder)


def changed_window(folder: Path) -> None:
    change_config(folder, lambda entry: entry["prompt_skip"].update(window=[2, 5]))


def without_entry(folder: Path) -> None:
    change_config(folder, lambda entry: entry.pop("prompt_skip"))


def without_window(folder: Path) -> None:
    change_config(folder, lambda entry: entry["prompt_skip"].pop("window"))


def of_a_later_format(folder: Path) -> None:
    change_config(folder, lambda entry: entry.update(format=9))


def without_a_map(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "prompt_maps.3" not in name}
    save_file(weights, file, {"format": "pt"})


def change_config(folder: Path, change: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content["streamline_hooks"])
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [changed_window, without_entry, without_window, of_a_later_format, without_a_map])
def test_a_damaged_checkpoint_is_refused(damage: Any, tmp_path: Path) -> None:
    folder = save(committed(), tmp_path / "m")
    damage(folder)
    with pytest.raises(StreamlineError):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_cannot_be_committed_leaves_the_model_open() -> None:
    class Unknown(nn.Module):
        def forward(self, state: torch.Tensor) -> torch.Tensor:
            return 0.5 * state

    model, ids = tiny_model("llama"), tokens(1, 7)
    expected = model.generate(ids, **GREEDY)
    with PromptSkip(model, WINDOW, [Unknown(), Unknown(), None], last_tokens=1) as skip:
        skipped = model.generate(ids, **GREEDY)
        with pytest.raises(StreamlineError, match="register_module"):
            skip.commit()
        assert not hasattr(model, "prompt_maps") and torch.equal(model.generate(ids, **GREEDY), skipped)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    with pytest.raises(StreamlineError, match="outside of the with statement"):
        skip.commit()
    with pytest.raises(StreamlineError, match="no open or committed PromptSkip"):
        prompt_skip_of(model)


def test_a_model_that_cannot_save_itself_is_not_committed() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("llama")
            self.config = self.inner.config

        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            return self.inner(input_ids, **options)

    with pytest.raises(UnsupportedSurgery):
        PromptSkip(Wrapper(), WINDOW).__enter__().commit()


def test_a_trainer_checkpoint_resumes(tmp_path: Path) -> None:
    model = committed()
    model.save_pretrained(tmp_path / "step")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "step")
    assert config.streamline_hooks["prompt_skip"]["window"] == [3, 6]
    state = load_file(tmp_path / "step" / "model.safetensors")
    resumed = committed()
    assert not resumed.load_state_dict(state, strict=False).unexpected_keys
    assert_equal(outputs(resumed), outputs(model))
