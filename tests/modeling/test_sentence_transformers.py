"""Folders of sentence-transformers keep their modules, and the pooling is read as it will be applied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, BertForMaskedLM

from streamline_hooks import LayerSurgeon, StreamlineError, compress, load, save
from streamline_hooks.checkpoint import export_plain, load_pretrained, task_of_pretrained
from streamline_hooks.modeling.sentence_transformers import download_sentence_files, find_sentence_folder
from streamline_hooks.modeling.task import Task
from streamline_hooks.replacements import LinearReplacement
from tests.commands import run
from tests.configured import configured
from tests.data.test_text_batches import tokenizer_of
from tests.other_models import made
from tests.processes import in_a_new_process

WIDTH, LENGTH = 32, 12
TYPES = "sentence_transformers.models"
TEXTS = ["1 2 3", "4 5 6 7 8 9 10 11 12 13 14 15 16 17 18", "19 20", "21"]
POOLINGS = {"mean": "mean", "cls": "first", "lasttoken": "last"}
BEFORE_6 = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def sentence_folder(folder: Path, pooling: str = "cls", *, before_6: bool = False, head: bool = False) -> Path:
    """A small BERT, a pooling, a dense layer with weights, and a normalization without files."""
    model = made("bert")
    if head:
        whole = BertForMaskedLM(model.config)
        whole.bert.load_state_dict(model.state_dict(), strict=False)
        whole.bert.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | {"architectures": ["BertForMaskedLM"]})
    else:
        model.save_pretrained(folder)
    tokenizer_of(50, model_input_names=["input_ids", "attention_mask"]).save_pretrained(folder)
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    paths = ["", *(f"{k}_{kind}" for k, kind in enumerate(kinds) if k)]
    entries = [{"idx": k, "name": str(k), "path": paths[k], "type": f"{TYPES}.{kinds[k]}"} for k in range(4)]
    write_json(folder / "modules.json", entries)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": LENGTH, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "similarity_fn_name": "dot"})
    said: dict[str, Any] = {"embedding_dimension": WIDTH, "pooling_mode": pooling}
    if before_6:
        modes = {f"pooling_mode_{name}": name == BEFORE_6[pooling] for name in [*BEFORE_6.values(), "max_tokens"]}
        said = {"word_embedding_dimension": WIDTH, **modes}
    write_json(folder / "1_Pooling" / "config.json", said)
    dense = {"in_features": WIDTH, "out_features": 16, "bias": True}
    write_json(folder / "2_Dense" / "config.json", dense | {"activation_function": "torch.nn.modules.activation.Tanh"})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        linear = torch.nn.Linear(WIDTH, 16)
    weights = {f"linear.{name}": value.detach().clone() for name, value in linear.named_parameters()}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    return folder


def operate(surgeon: LayerSurgeon, kind: str) -> None:
    if kind == "none":
        surgeon.remove([1, 2])
    else:
        surgeon.replace(range(1, 3), replacement())


def replacement() -> LinearReplacement:
    """A map that is far from the identity."""
    made_of = LinearReplacement(WIDTH)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in made_of.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return made_of


@pytest.mark.parametrize(("kind", "pooling"), [("none", "mean"), ("linear", "cls"), ("linear", "lasttoken")])
def test_a_saved_folder_encodes_as_the_original_with_its_blocks_bypassed(
    kind: str, pooling: str, tmp_path: Path
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", exc_type=ImportError)
    folder = sentence_folder(tmp_path / "model", pooling, before_6=pooling == "mean")
    whole = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    with LayerSurgeon(whole[0].auto_model) as surgeon:
        operate(surgeon, kind)
        expected = whole.encode(TEXTS)
    assert expected.shape == (4, 16) and abs((expected**2).sum(-1) - 1).max() < 1e-5
    model, tokenizer = load_pretrained(folder, task=task_of_pretrained(folder))
    with LayerSurgeon(model) as surgeon:
        operate(surgeon, kind)
        surgeon.commit()
    out = save(model, tmp_path / "out", tokenizer=tokenizer)
    found = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    torch.testing.assert_close(torch.tensor(found.encode(TEXTS)), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert found.max_seq_length == LENGTH and found.similarity_fn_name == "dot"
    assert not torch.allclose(torch.tensor(whole.encode(TEXTS)), torch.tensor(expected), atol=1e-2)
    again = save(load(out), tmp_path / "again", tokenizer=tokenizer)  # from what was saved
    both = sentence_transformers.SentenceTransformer(str(again), device="cpu").encode(TEXTS)
    torch.testing.assert_close(torch.tensor(both), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_a_spliced_folder_fails_loudly_without_this_library(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", exc_type=ImportError)
    folder = sentence_folder(tmp_path / "model")
    model, tokenizer = load_pretrained(folder, task=Task("embedding"))
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), replacement())
        surgeon.commit()
    save(model, tmp_path / "out", tokenizer=tokenizer)
    code = """
        import sys
        sys.modules["streamline_hooks"] = None
        from sentence_transformers import SentenceTransformer
        try:
            SentenceTransformer(sys.argv[1] + "/out", device="cpu")
        except Exception as error:
            assert "trust_remote_code" in str(error), error
            print("refused")
    """
    assert in_a_new_process(code, tmp_path).stdout.strip().endswith("refused")


@pytest.mark.parametrize("before_6", [False, True])
@pytest.mark.parametrize(("mode", "pooling"), POOLINGS.items())
def test_the_pooling_is_read_in_both_layouts(mode: str, pooling: str, before_6: bool, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "model", mode, before_6=before_6)
    assert task_of_pretrained(folder) == Task("embedding", pooling)
    model, tokenizer = load_pretrained(folder, task=Task("embedding"))
    assert Task.of(model) == Task("embedding", pooling)
    out = save(model, tmp_path / "out", tokenizer=tokenizer)
    assert Task.of(load(out)) == task_of_pretrained(out) == Task("embedding", pooling)


@pytest.mark.parametrize("said", [{"pooling_mode": "max"}, {"pooling_mode": ["mean", "cls"]}, {}])
def test_another_pooling_is_not_guessed(said: dict[str, Any], tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "model")
    write_json(folder / "1_Pooling" / "config.json", said)
    model, _ = load_pretrained(folder, task=Task("embedding"))
    for read in (lambda: task_of_pretrained(folder), lambda: Task.of(model)):
        with pytest.raises(StreamlineError, match=r"1_Pooling/config\.json.*embedding:pooling=mean"):
            read()


def test_a_folder_is_for_embeddings_whatever_class_its_config_names(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "model", head=True)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    assert task_of_pretrained(folder) == Task("embedding", "first")
    model, tokenizer = load_pretrained(folder, task=task_of_pretrained(folder))
    assert type(model).__name__ == "BertModel"
    assert type(load(save(model, tmp_path / "out", tokenizer=tokenizer))).__name__ == "BertModel"
    write_json(folder / "config_sentence_transformers.json", {"model_type": "SparseEncoder"})  # which needs the head
    assert task_of_pretrained(folder) == Task("masked-lm")


def kept(folder: Path) -> dict[str, bytes]:
    """The files that sentence-transformers keeps beside the model and the tokenizer."""
    files = [*folder.glob("*/*"), *folder.glob("*sentence*"), folder / "modules.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_every_way_to_write_a_folder_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sentence_folder(tmp_path / "model")
    expected = kept(folder)
    assert len(expected) == 6
    (tmp_path / "text.txt").write_text(
        "\n\n\n".join(" ".join(str((7 * k + n) % 46) for n in range(30)) for k in range(80))
    )
    sizes = "--calibration-tokens 600 --validation-tokens 200 --test-tokens 200 --sequence-length 32"
    asked = f"compress {folder} -c {tmp_path}/text.txt {sizes} --remove 1 --shortlist 1 -o {tmp_path}/command"
    code, _, err = run(asked.split(), monkeypatch, capsys)
    assert code == 0, err
    written = kept(tmp_path / "command")
    assert {name: written[name] for name in expected} == expected  # beside the figures of the page
    assert json.loads((tmp_path / "command" / "report.json").read_text())["task"] == "embedding:pooling=first"
    listed = (tmp_path / "command" / "SHA256SUMS").read_text()
    assert all(f"  {name}\n" in listed for name in expected)
    model, tokenizer = load_pretrained(folder, task=Task("embedding"))
    assert kept(export_plain(model, tmp_path / "plain", tokenizer=tokenizer)) == expected
    (tmp_path / "command" / "2_Dense" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(StreamlineError, match=r"2_Dense/model\.safetensors"):
        load(tmp_path / "command")


@pytest.mark.parametrize("read", [lambda name: load_pretrained(name, task=Task("embedding"))[0], load])
def test_a_relative_path_is_found_after_a_change_of_directory(
    read: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sentence_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model = read("model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert kept(save(model, tmp_path / "out")) == kept(folder)


@pytest.mark.sample(1)
@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_model_of_the_hub_keeps_what_is_in_the_cache(revision: str | None, tmp_path: Path) -> None:
    """That of its revision; the main branch pools in another way."""
    cache = tmp_path / "cache" / "models--somebody--some-model"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    for name, commit, pooling in (("main", "a" * 40, "mean" if revision else "cls"), ("v1", "b" * 40, "cls")):
        sentence_folder(cache / "snapshots" / commit, head=True, pooling=pooling)
        (cache / "refs" / name).write_text(commit)
    snapshot = cache / "snapshots" / ("b" * 40 if revision else "a" * 40)
    code = """
        import os, sys
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": sys.argv[1] + "/cache"}
        from streamline_hooks import save
        from streamline_hooks.checkpoint import LoadingConfig, load_pretrained, task_of_pretrained
        loading = LoadingConfig(device="cpu", revision=REVISION)
        task = task_of_pretrained("somebody/some-model", loading)
        model, tokenizer = load_pretrained("somebody/some-model", task=task, loading=loading)
        save(model, sys.argv[1] + "/out", tokenizer=tokenizer)
        print(task)
    """
    code = code.replace("REVISION", repr(revision))
    assert in_a_new_process(code, tmp_path).stdout.strip().endswith("embedding:pooling=first")
    assert kept(tmp_path / "out") == kept(snapshot)


def test_the_files_of_a_revision_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = sentence_folder(tmp_path / "model"), []

    def download(name: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns[0]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    download_sentence_files("somebody/some-model", "v1")
    assert asked == [("somebody/some-model", "v1", "modules.json")] * 2


def inside_a_sub_folder(folder: Path) -> str:
    entries = json.loads((folder / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    write_json(folder / "modules.json", entries)
    (folder / "0_Transformer").mkdir()
    for file in folder.glob("*"):
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json"):
            file.rename(folder / "0_Transformer" / file.name)
    return r"sub-folder '0_Transformer'.*SentenceTransformer\(folder\)\.save"


def a_module_elsewhere(folder: Path) -> str:
    entries = json.loads((folder / "modules.json").read_text())
    entries[1]["path"] = "../1_Pooling"
    write_json(folder / "modules.json", entries)
    return r"'\.\./1_Pooling'.*not directly inside"


def a_module_of_another_library(folder: Path) -> str:
    entries = json.loads((folder / "modules.json").read_text())
    entries[1]["type"] = "custom_code.Pooling"
    write_json(folder / "modules.json", entries)
    return r"custom_code\.Pooling.*code"


def a_model_of_another_kind(folder: Path) -> str:
    entries = json.loads((folder / "modules.json").read_text())
    entries[0]["type"] = f"{TYPES}.Router"
    write_json(folder / "modules.json", entries)
    return r"a Router.*Expected a Transformer"


def a_missing_module(folder: Path) -> str:
    shutil.rmtree(folder / "2_Dense")
    return r"2_Dense.*missing"


def a_damaged_list(folder: Path) -> str:
    (folder / "modules.json").write_text("[{}]")
    return r"modules\.json.*{}.*Expected a list"


def no_json(folder: Path) -> str:
    (folder / "modules.json").write_text("[")
    return r"modules\.json.*JSON"


@pytest.mark.parametrize(
    "damage",
    [
        inside_a_sub_folder, a_module_elsewhere, a_module_of_another_library, a_model_of_another_kind, a_missing_module,
        a_damaged_list, no_json,
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_before_anything_is_done(damage: Callable[[Path], str], tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "model")
    model: Any = AutoModel.from_pretrained(folder)
    tokenizer = load_pretrained(folder, task=Task("embedding"))[1]
    match = damage(folder)
    inside = folder / "0_Transformer"
    for name in (folder, *([inside] if inside.exists() else [])):
        model.name_or_path = str(name)
        refused: list[Callable[[], Any]] = [
            lambda name=name: load_pretrained(name, task=Task("embedding")),
            lambda name=name: task_of_pretrained(name),
            lambda: save(model, tmp_path / "out", tokenizer=tokenizer),
            lambda: compress(
                model, [], configured(task=Task("embedding")), tokenizer=tokenizer, output=tmp_path / "out"
            ),
        ]
        for call in refused:
            with pytest.raises(StreamlineError, match=match):
                call()
    assert not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    made("bert").save_pretrained(tmp_path / "model")
    assert find_sentence_folder(tmp_path / "model") is None and find_sentence_folder("no-such/model") is None
    model: Any = AutoModel.from_pretrained(tmp_path / "model")
    assert Task.of(model) == Task("embedding") and not kept_names(save(model, tmp_path / "out"))


def kept_names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.is_dir() or "sentence" in file.name]
