"""With overwrite, a folder that `save` wrote is replaced, and no file of anybody else is deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

from streamline_hooks import LayerSurgeon, StreamlineError, compress, load, save
from streamline_hooks.checkpoint import check_output_folder, export_plain, update_checksums
from streamline_hooks.distillation import DistillationConfig
from streamline_hooks.testing import tiny_model
from tests.configured import arguments
from tests.tiny_models import repaired


def content(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("written") / "model"
    save(repaired("llama"), folder, report={"perplexity": {"original": 2.0}})
    return folder


@pytest.fixture
def saved(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "models" / "saved"))


def refused(target: str | Path, why: str, base: Path) -> None:
    before = content(base)
    with pytest.raises(StreamlineError, match=rf"{why}.*[Cc]hoose"):
        check_output_folder(target, True)
    with pytest.raises(StreamlineError, match=why):
        save(repaired("llama"), target, overwrite=True)
    assert content(base) == before


def plain_model() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(4)))
    )
    with LayerSurgeon(model, "1") as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    return model


@pytest.mark.parametrize("build", [lambda: repaired("llama"), lambda: tiny_model("llama"), plain_model])
def test_what_save_wrote_is_replaced_again_and_again(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    for _ in range(3):
        save(build(), tmp_path / "out", overwrite=True, report={})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_being_asked_to_replace_it_a_folder_is_kept(saved: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    with pytest.raises(StreamlineError, match=r"saved is not empty.*overwrite=True"):
        check_output_folder(saved)
    with pytest.raises(StreamlineError, match=r"saved is not empty.*overwrite=True"):
        save(repaired("llama"), saved)
    with pytest.raises(StreamlineError, match=r"is a file.*folder"):
        save(repaired("llama"), saved / "config.json")
    assert content(tmp_path) == before
    check_output_folder(tmp_path / "models" / "new")


def test_so_are_the_pages_and_measurements_beside_the_model(saved: Path, tmp_path: Path) -> None:
    for name in ("report.html", "evaluation.json"):
        (saved / name).touch()
    save(repaired("llama"), saved, overwrite=True)
    assert not (saved / "report.html").exists() and [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_so_are_a_tokenizers_files_of_any_name(tmp_path: Path) -> None:
    class OwnTokenizer(PreTrainedTokenizerFast):
        def save_pretrained(self, folder: Any, *args: Any, **kwargs: Any) -> Any:
            (Path(folder) / "words of our own.txt").write_text("one")

    tokenizer = OwnTokenizer(tokenizer_object=Tokenizer(WordLevel({"one": 0})))
    for _ in range(2):
        save(repaired("llama"), tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    assert (tmp_path / "out" / "words of our own.txt").exists()
    load(tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "model.bin",
        "figures/photo.jpg",
        "figures/similarity.svg",
        "checkpoint-1/config.json",
        ".git/HEAD",
        "model.safetensors.bak",
    ],
)
def test_files_that_save_did_not_write_are_kept(name: str, saved: Path, tmp_path: Path) -> None:
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_text("mine")
    refused(saved, f"did not write: {name}", tmp_path)


def test_figures_that_are_added_later_are_kept(saved: Path, tmp_path: Path) -> None:
    """Writing the report again lists the checksums of descriptions, but not of the user's figures."""
    (saved / "figures").mkdir()
    (saved / "figures" / "mine.svg").write_text("mine")
    (saved / "report.html").touch()
    update_checksums(saved)
    assert "report.html" in (saved / "SHA256SUMS").read_text()
    refused(saved, "did not write: figures/mine.svg", tmp_path)


def test_of_many_files_the_first_are_named(saved: Path, tmp_path: Path) -> None:
    for name in "abc":
        (saved / name).touch()
    refused(saved, r"did not write: a, b, c\. ", tmp_path)
    (saved / "d").touch()
    refused(saved, r"did not write: a, b, c, \.\.\.\. ", tmp_path)


def test_links_and_empty_folders_are_kept(saved: Path, tmp_path: Path) -> None:
    weights = saved / "model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    refused(saved, "did not write: model.safetensors", tmp_path)
    weights.unlink()
    (saved / "mine").mkdir()
    refused(saved, "did not write: mine/", tmp_path)


@pytest.mark.parametrize("lost", ["SHA256SUMS", "config.json and README.md"])
def test_without_its_marks_a_folder_is_kept(lost: str, saved: Path, tmp_path: Path) -> None:
    for name in lost.split(" and "):
        (saved / name).write_text("{}") if name == "config.json" else (saved / name).unlink()
    refused(saved, "did not write: ", tmp_path)


def test_a_model_of_others_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"
    tiny_model("llama").save_pretrained(folder)
    for target in (folder, f"{folder}/", folder / ".." / "m", tmp_path / "models", tmp_path):
        refused(target, "did not write: ", tmp_path)
    (tmp_path / "link").symlink_to(folder)
    refused(tmp_path / "link", "did not write: config.json", tmp_path)


def test_the_working_directory_and_what_contains_it_are_kept(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved / "sub").mkdir()
    for here, targets in ((saved, [".", "..", saved, tmp_path]), (saved / "sub", ["..", "../..", saved])):
        monkeypatch.chdir(here)
        for target in targets:
            refused(target, "is the working directory", tmp_path)
    (saved / "sub").rmdir()
    monkeypatch.chdir(saved)
    (tmp_path / "link").symlink_to(saved)
    refused(tmp_path / "link", "is the working directory", tmp_path)


def test_a_folder_is_replaced_from_a_working_directory_that_was_deleted(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    check_output_folder(saved, overwrite=True)


def test_the_folder_it_was_loaded_from_is_replaced_if_save_wrote_it(saved: Path) -> None:
    model = load(saved)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        surgeon.commit()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    save(model, saved, overwrite=True)
    assert torch.equal(model(ids).logits, expected) and torch.equal(load(saved)(ids).logits, expected)


def test_weights_that_are_still_read_from_a_folder_are_kept(saved: Path, tmp_path: Path) -> None:
    import accelerate

    model = load(saved)
    accelerate.disk_offload(model, tmp_path / "offload", execution_device="cpu")
    before = content(saved)
    with pytest.raises(StreamlineError, match=r"are read from there.*Choose"):
        save(model, saved, overwrite=True)
    assert content(saved) == before


def test_everything_that_writes_a_model_asks_first(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model, batches = tiny_model("llama"), [torch.randint(3, 60, (2, 8)) for _ in range(6)]
    parts = {"calibration": batches[:4], "validation": batches[4:5], "test": batches[5:]}
    shared: dict[str, Any] = {"remove": 2, "output": tmp_path, "overwrite": True}
    for call in (
        lambda: compress(model, parts, **arguments(**shared)),
        lambda: compress(model, parts, **arguments(rounds=2, distillation=DistillationConfig(), **shared)),
        lambda: export_plain(model, tmp_path, overwrite=True),
    ):
        with pytest.raises(StreamlineError, match="did not write: notes.txt"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"] and len(model.model.layers) > 2


def test_files_that_appear_while_it_is_written_are_kept(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = repaired("llama")
    write = model.save_pretrained

    def add(*args: Any, **kwargs: Any) -> None:
        (saved / "notes.txt").write_text("mine")
        write(*args, **kwargs)

    monkeypatch.setattr(model, "save_pretrained", add)
    save(model, saved, overwrite=True)
    assert (saved.parent / "saved.kept" / "notes.txt").read_text() == "mine"
    assert not (saved / "notes.txt").exists() and load(saved)


def test_training_files_beside_an_output_are_checked_too(tmp_path: Path, log_messages: list[str]) -> None:
    output = tmp_path / ("x" * 248)  # which takes no ending
    check_output_folder(output)
    batches = [torch.randint(3, 60, (2, 8)) for _ in range(6)]
    parts = {"calibration": batches[:4], "validation": batches[4:5], "test": batches[5:]}
    shared: dict[str, Any] = {"remove": 2, "distillation": DistillationConfig(), "output": output}
    for call in (
        lambda: compress(tiny_model("llama"), parts, **arguments(**shared)),
        lambda: compress(tiny_model("llama"), parts, **arguments(rounds=2, **shared)),
    ):
        with pytest.raises(StreamlineError, match=r"training.* failed.*too long.*choose"):
            call()
    assert not log_messages and not list(tmp_path.iterdir())


def test_blocks_are_not_read_from_the_folder_that_is_replaced(saved: Path, tmp_path: Path) -> None:
    from streamline_hooks.pipeline import RunOptions, compress_checkpoint

    before = content(saved)
    (tmp_path / "link").symlink_to(saved)
    for output in (saved, tmp_path / "link", saved / ".." / "saved"):
        with pytest.raises(StreamlineError, match="is the model's own folder.* Choose another folder"):
            compress_checkpoint(saved, {}, tokenizer=None, output=output, options=RunOptions(overwrite=True))
    assert content(saved) == before


def without_blocks(model: Any) -> None:
    """Shorten the module list by hand, which leaves the config as it was."""
    model.model.layers = model.model.layers[:3]


def with_a_tied_head(model: Any) -> None:
    """Share the head with the embedding without telling the config: `save_pretrained` writes one of the two."""
    model.lm_head.weight = model.model.embed_tokens.weight


class WithOption(LlamaForCausalLM):
    """A class that the config alone does not build."""

    def __init__(self, config: Any, option: int) -> None:
        super().__init__(config)


def test_modules_that_a_model_was_built_without_are_not_missed(tmp_path: Path) -> None:
    config = tiny_model("bert").config
    bert = BertModel(config, add_pooling_layer=False)
    assert load(save(bert, tmp_path / "bert")) is not None
    needing = WithOption(tiny_model("llama").config, 1)
    assert save(needing, tmp_path / "needing").is_dir()


def test_weights_that_the_config_does_not_describe_are_told(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.score = nn.Linear(32, 1)
    with pytest.warns(UserWarning, match=r"not describe all of its weights, such as score.bias.*will refuse"):
        save(model, tmp_path / "scored")
    with pytest.raises(StreamlineError, match="score.bias"):
        load(tmp_path / "scored")


def with_another_width(model: Any) -> None:
    model.lm_head = nn.Linear(model.lm_head.in_features, 7, bias=False)


@pytest.mark.parametrize("change", [without_blocks, with_a_tied_head, with_another_width])
@pytest.mark.parametrize(("write", "build"), [(save, tiny_model), (save, repaired), (export_plain, tiny_model)])
def test_weights_that_the_config_describes_are_all_written_or_the_old_folder_kept(
    write: Callable[..., Path], build: Callable[..., Any], change: Callable[[Any], None], saved: Path, tmp_path: Path
) -> None:
    model, before = build("llama"), content(tmp_path)
    change(model)
    with pytest.raises(StreamlineError, match=r"\d+ weights that the config describes are missing.*such as "):
        write(model, saved, overwrite=True)
    assert content(tmp_path) == before
    model = tiny_model("llama", tie_word_embeddings=True)
    assert write(model, saved, overwrite=True) == saved
