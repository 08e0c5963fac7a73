"""Saved, loaded in a new process, refused by whom it must be, and never half written."""

from __future__ import annotations

import json
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, load, save
from streamline_hooks.checkpoint import check_output_folder
from streamline_hooks.replacements import LinearReplacement, register_module
from tests.processes import in_a_new_process
from tests.tiny_models import BLOCKS, FAMILIES, WIDTH, Nudge, left_padded, repaired, tiny_model, tokens


def leave_the_guard_alone(folder: Path) -> None:
    """Delete the entry of ``config.json`` by which plain classes refuse it before they look at any weight."""
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, 9)).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [range(0, 2), range(4, BLOCKS)], ids=["first", "last"])
def test_a_repaired_model_comes_back(family: str, window: range, tmp_path: Path) -> None:
    model = repaired(family, window)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert list(loaded.state_dict()) == list(model.state_dict())
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in loaded.state_dict().items()} == shapes
    batch, options = left_padded(2, 7), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with_cache, without = (loaded.generate(**batch, **options, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_have_the_names_that_the_architecture_stores_them_by(family: str, tmp_path: Path) -> None:
    """GPT-NeoX's head has another name in a checkpoint than in the model."""
    tiny_model(family).save_pretrained(tmp_path / "plain")
    repaired(family).save_pretrained(tmp_path / "spliced")
    plain, spliced = (stored_names(tmp_path / folder) for folder in ("plain", "spliced"))
    beside = {name for name in spliced if "spliced_before" in name}
    assert beside and spliced - beside < plain
    outside = {name for name in plain if not any(part.isdigit() for part in name.split("."))}
    assert outside < spliced


def stored_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as stored:
        return set(stored.keys())


def test_a_guard_that_is_on_disk_has_the_models_shape_where_it_runs(tmp_path: Path) -> None:
    """GPT-2's norm, unlike an RMS norm, fails on a weight with a leading axis."""
    model = repaired("gpt2")
    model.save_pretrained(tmp_path / "model")
    names = [*(f"transformer.{name}" for name, _ in model.transformer.named_children()), "lm_head"]
    where = {name: "disk" if name.endswith("ln_f") else "cpu" for name in names}
    loaded = load(tmp_path / "model", device_map=where, offload_folder=str(tmp_path / "weights"))
    assert loaded.transformer.ln_f.weight.is_meta, "it is not on disk"
    for folder in ("again", "once more"):
        assert torch.equal(logits(loaded), logits(model))
        loaded.save_pretrained(tmp_path / folder)
        assert torch.equal(logits(load(tmp_path / folder)), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_removal_is_a_plain_checkpoint(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 4))
        surgeon.commit()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == type(model.config).model_type
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(model))
    assert loaded.config.streamline_hooks["history"][0]["removed"] == [1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_explicit_class_refuses_a_spliced_checkpoint(family: str, tmp_path: Path) -> None:
    model = repaired(family)
    plain = type(model).__mro__[2]
    assert plain.__module__.startswith("transformers.")
    save(model, tmp_path / "model")
    for cls in (plain, type(tiny_model(family).base_model)):
        for ignore in (False, True):
            with pytest.raises(ValueError, match="quant_method"):
                cls.from_pretrained(tmp_path / "model", ignore_mismatched_sizes=ignore)
    leave_the_guard_alone(tmp_path / "model")
    for cls in (plain, type(tiny_model(family).base_model)):
        with pytest.raises((RuntimeError, ValueError), match="mismatch|size"):
            cls.from_pretrained(tmp_path / "model")


def test_a_base_model_keeps_the_repair_too(tmp_path: Path) -> None:
    model = repaired("llama")
    save(model, tmp_path / "model")
    base = AutoModel.from_pretrained(tmp_path / "model")
    assert torch.equal(base(tokens(2, 9)).last_hidden_state, model.model(tokens(2, 9)).last_hidden_state)


def test_precision_and_tied_weights(tmp_path: Path) -> None:
    model = repaired("gpt2", dtype=torch.bfloat16)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(logits(loaded), logits(model))


def test_a_splice_in_a_wider_precision_than_the_model_is_told(tmp_path: Path) -> None:
    model: Any = tiny_model("llama").to(torch.bfloat16)
    with LayerSurgeon(model) as surgeon:
        module: Any = surgeon.replace([2], LinearReplacement(model.config.hidden_size))
        surgeon.commit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, tmp_path / "alike")
    module.float().projection.weight.data.fill_(1 / 3)
    with pytest.warns(UserWarning, match=r"torch.float32.*torch.bfloat16"):
        save(model, tmp_path / "wider")
    loaded: Any = load(tmp_path / "wider", dtype=torch.float32)
    assert float(loaded.state_dict()["model.layers.2.spliced_before.0.projection.weight"][0, 0]) == pytest.approx(1 / 3)


def test_weights_in_a_wider_precision_than_the_model_are_told(tmp_path: Path) -> None:
    model: Any = tiny_model("llama").to(torch.bfloat16)
    model.model.layers[1].input_layernorm.float().weight.data.fill_(1 / 3)
    with pytest.warns(
        UserWarning, match=r"layers.1.input_layernorm.weight \(torch.float32\) is the first of 1.*bfloat16"
    ):
        save(model, tmp_path / "wider")
    loaded: Any = load(tmp_path / "wider", dtype=torch.float32)
    assert float(loaded.model.layers[1].input_layernorm.weight[0]) == pytest.approx(1 / 3)


def test_sharded_weights(tmp_path: Path) -> None:
    model = repaired("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_state_dict_from_disk_can_be_taken_as_it_lies(tmp_path: Path) -> None:
    """As a Trainer does when it resumes."""
    from safetensors.torch import load_file

    model = repaired("llama")
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    for parameter in other.parameters():
        parameter.data.zero_()
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["model.norm.weight"].shape == (1, WIDTH)
    other.load_state_dict(weights)
    assert torch.equal(logits(other), logits(model))


def test_saving_again_and_again_is_the_same(tmp_path: Path) -> None:
    model = repaired("opt")
    for step in "ab":
        model.save_pretrained(tmp_path / step)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / step)
    first, second = ((tmp_path / s / "model.safetensors").read_bytes() for s in "ab")
    assert first == second
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_experts_are_converted_as_the_architectures_own(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "original")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1], LinearReplacement.from_map(0.1 * torch.randn(32, 32)))
        surgeon.commit()
    save(model, tmp_path / "small")
    from safetensors import safe_open

    keys = {}
    for name in ("original", "small"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            keys[name] = {k for k in file.keys() if ".layers.0." in k}  # noqa: SIM118
    assert keys["original"] == keys["small"]
    torch.testing.assert_close(logits(load(tmp_path / "small")), logits(model))


def test_a_compressed_model_is_compressed_again(tmp_path: Path) -> None:
    model = repaired("llama")
    save(model, tmp_path / "once")
    model = load(tmp_path / "once")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1], LinearReplacement(WIDTH))  # the block that carries the first splice
        surgeon.commit()
    save(model, tmp_path / "twice")
    again = load(tmp_path / "twice")
    assert torch.equal(logits(again), logits(model))
    assert len(again.config.streamline_hooks["history"]) == 2
    assert [len(e["modules"]) for e in again.config.streamline_hooks["splices"]] == [2]


@register_module("test-bias")
class Bias(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.arange(float(features)))

    def to_config(self) -> dict[str, Any]:
        return {"features": len(self.bias)}

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + self.bias


def test_a_users_own_module_is_saved_when_it_is_registered(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1], Bias(WIDTH))
        surgeon.commit()
    save(model, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), logits(model))
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1], Nudge())
        surgeon.commit()
    with pytest.raises(StreamlineError, match=r"Nudge.*checkpoint"):
        save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@register_module("test-factor")
class Factor(nn.Module):
    """With a buffer that no checkpoint holds, and a setting that is no parameter."""

    def __init__(self, features: int, gate: float = 1.0) -> None:
        super().__init__()
        self.features, self.gate = features, gate
        self.register_buffer("factor", torch.linspace(0.5, 1.5, features), persistent=False)

    def to_config(self) -> dict[str, Any]:
        return {"features": self.features, "gate": self.gate}

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.gate * self.factor * state


def test_what_a_checkpoint_holds_no_values_of_is_as_it_was(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        factor: Any = surgeon.replace([2], Factor(model.config.hidden_size))
        surgeon.insert(1, LinearReplacement(model.config.hidden_size))
        surgeon.commit()
    factor.gate = 0.25  # changed after the surgery
    save(model, tmp_path / "first")
    loaded = load(tmp_path / "first")
    save(loaded, tmp_path / "second")
    with torch.no_grad():
        expected = model(tokens(2, 9)).logits
        assert torch.equal(loaded(tokens(2, 9)).logits, expected)
        assert torch.equal(load(tmp_path / "second")(tokens(2, 9)).logits, expected)


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
@pytest.mark.parametrize("spliced", [False, True])
def test_models_of_other_heads_come_back_as_what_they_are(name: str, spliced: bool, tmp_path: Path) -> None:
    model = getattr(transformers, name)(tiny_model("llama").config).eval()
    model.config.pad_token_id = 0
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1, 2], LinearReplacement.from_map(0.1 * torch.eye(WIDTH)) if spliced else None)
        surgeon.commit()
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(tokens(2, 9))[0], model(tokens(2, 9))[0])
    card = (tmp_path / "model" / "README.md").read_text()
    assert "AutoModelForCausalLM" not in card and "streamline_hooks.load(folder)" in card


def test_an_unknown_kind_a_later_format_and_a_foreign_config(tmp_path: Path) -> None:
    save(repaired("llama"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    (tmp_path / "model" / "SHA256SUMS").unlink()

    def changed(**values: Any) -> None:
        path.write_text(json.dumps({**config, "streamline_hooks": {**config["streamline_hooks"], **values}}))

    splices = json.loads(json.dumps(config["streamline_hooks"]["splices"]).replace("linear", "cubic"))
    changed(splices=splices)
    with pytest.raises(StreamlineError, match=r"'cubic'.*Expected one of.*linear"):
        load(tmp_path / "model")
    changed(format=99)
    with pytest.raises(StreamlineError, match=r"format 99.*streamline_hooks.*up to 5"):
        load(tmp_path / "model")
    path.write_text(json.dumps({"model_type": "streamline_hooks"}))
    with pytest.raises(StreamlineError, match="streamline_hooks"):
        load(tmp_path / "model")
    path.write_text(json.dumps({**config, "base_model_type": "made-up"}))
    with pytest.raises(StreamlineError, match=r"'made-up'.*Transformers"):
        load(tmp_path / "model")
    with pytest.raises(StreamlineError, match=r"config.json is missing"):
        load(tmp_path)


def test_pickling_and_copying_keep_the_class(tmp_path: Path) -> None:
    model = repaired("llama")
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model) and torch.equal(logits(again), logits(model))


# Nothing half written


DISK_FULL = """
    import resource, sys
    from pathlib import Path
    from streamline_hooks import StreamlineError, save
    from tests.tiny_models import repaired
    model = repaired("llama")
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    try:
        save(model, sys.argv[1], overwrite=True)
    except StreamlineError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits to imitate a full disk")
def test_a_full_disk_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save(repaired("opt"), target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    printed = in_a_new_process(DISK_FULL, target, 20_000).stdout
    assert "failed:" in printed and "unchanged" in printed
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_interruption_leaves_the_old_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, target = repaired("llama"), tmp_path / "model"
    save(model, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def interrupt(folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(model, target, overwrite=True)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("family", ["olmo", "openai-gpt"])
def test_the_guard_is_no_tied_weight(family: str, tmp_path: Path) -> None:
    """OLMo's norms have no weights, so that nothing but matrices lies outside its blocks."""
    from streamline_hooks.testing import tiny_model as tiny_of_type

    model = tiny_of_type(family, blocks=4, **({"tie_word_embeddings": True} if family == "olmo" else {}))
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1], LinearReplacement.from_map(0.1 * torch.randn(32, 32)))
        surgeon.commit()
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    leave_the_guard_alone(tmp_path / "model")
    with pytest.raises((RuntimeError, ValueError), match="mismatch|size"):
        type(model).__mro__[2].from_pretrained(tmp_path / "model")


def test_a_checkpoint_without_its_splices_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(repaired("llama"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = {k: v for k, v in load_file(path).items() if "spliced" not in k}
    save_file(weights, path, metadata={"format": "pt"})
    (tmp_path / "model" / "SHA256SUMS").unlink()
    with pytest.raises(StreamlineError, match=r"spliced_before.0.projection.weight"):
        load(tmp_path / "model")


def test_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(repaired("llama"), ".")
    assert (tmp_path / "here" / "model.safetensors").exists()


def test_a_place_that_cannot_be_written_is_known_beforehand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def forbid(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", forbid)
        with pytest.raises(StreamlineError, match=r"Permission denied.*choose"):
            check_output_folder(tmp_path / "a" / "b")
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    with pytest.raises(StreamlineError, match="is a mount point"):
        check_output_folder(tmp_path)


def test_a_trainer_saves_and_resumes_a_repaired_model(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def trained(steps: int, resume: str | None = None) -> nn.Module:
        torch.manual_seed(0)
        rows = [{"input_ids": tokens(1, 6, seed=s)[0], "labels": tokens(1, 6, seed=s)[0]} for s in range(8)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=steps, save_steps=2, per_device_train_batch_size=2,
            report_to=[], use_cpu=True, learning_rate=1e-2, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model=repaired("llama").train(), args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.eval()

    straight = trained(4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(straight))
    resumed = trained(4, resume=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed), logits(straight))


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_is_what_is_saved(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything up to the upload itself, which is replaced by a copy."""
    from types import SimpleNamespace

    from transformers.utils import hub

    pushed = tmp_path / "hub"

    def upload(self: Any, folder: Any, repo_id: str, files_timestamps: dict[str, float], **_: Any) -> None:
        pushed.mkdir()
        for file in Path(folder).iterdir():
            if file.stat().st_mtime > files_timestamps.get(file.name, 0.0):
                (pushed / file.name).write_bytes(file.read_bytes())

    made = SimpleNamespace(repo_id="me/small", save=lambda path: None)
    for name in ("hf_api", "create_repo", "create_and_tag_model_card"):
        if hasattr(hub, name):
            answer: Any = made if name != "hf_api" else SimpleNamespace(create_repo=lambda *a, **k: made)
            monkeypatch.setattr(hub, name, lambda *a, answer=answer, **k: answer)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(hub.PushToHubMixin, "_create_repo", lambda *a, **k: "me/small", raising=False)
    model = repaired("llama")
    if way == "push_to_hub":
        model.push_to_hub("me/small")
    else:
        from transformers import modeling_utils

        for name in ("create_and_tag_model_card", "hf_api", "create_repo"):
            if hasattr(modeling_utils, name):
                answer = made if name != "hf_api" else SimpleNamespace(create_repo=lambda *a, **k: made)
                monkeypatch.setattr(modeling_utils, name, lambda *a, answer=answer, **k: answer)
        model.save_pretrained(str(tmp_path / "small"), push_to_hub=True, repo_id="me/small")
    assert {"config.json", "model.safetensors", "modeling_streamline_hooks.py"} <= {p.name for p in pushed.iterdir()}
    assert torch.equal(logits(load(pushed)), logits(model))
