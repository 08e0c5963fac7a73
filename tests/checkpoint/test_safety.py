"""A folder that is cut off, altered, foreign or points elsewhere is refused by name before anything of it is loaded."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from streamline_hooks import LayerSurgeon, StreamlineError, load, save
from streamline_hooks.pipeline import write_report
from tests.tiny_models import repaired, tiny_model, tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain model and one with a splice, each in one file and in several."""
    folder = tmp_path_factory.mktemp("saved")
    plain = tiny_model("llama")
    with LayerSurgeon(plain) as surgeon:
        surgeon.remove([1, 2])
        surgeon.commit()
    spliced = repaired("llama")
    for name, model in (("plain", plain), ("spliced", spliced)):
        save(model, folder / name)
        model.save_pretrained(folder / f"{name}_sharded", max_shard_size="20KB")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def copied(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(saved[name], tmp_path / name))


def config_with(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "config.json") -> None:
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["plain", "spliced", "plain_sharded", "spliced_sharded"])
def test_what_was_written_is_read(name: str, saved: dict[str, Path]) -> None:
    assert torch.isfinite(load(saved[name])(tokens(1, 5)).logits).all()


@pytest.mark.parametrize("size", [0, 4, 200, -1], ids=["empty", "in its length", "in its header", "one byte short"])
def test_a_truncated_file(size: int, copied: Callable[[str], Path]) -> None:
    file = copied("plain") / "model.safetensors"
    file.write_bytes(file.read_bytes()[: size if size >= 0 else file.stat().st_size + size])
    with pytest.raises(StreamlineError, match=r"model\.safetensors.*damaged.*Copy"):
        load(file.parent)


def test_one_bit_that_changed(copied: Callable[[str], Path]) -> None:
    file = copied("plain") / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StreamlineError, match=r"model\.safetensors.*SHA256SUMS"):
        load(file.parent)


@pytest.mark.parametrize("name", ["plain", "spliced"])
def test_a_weight_that_is_gone_of_another_shape_or_too_many(name: str, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    (folder / "SHA256SUMS").unlink()
    weights = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.down_proj.weight"
    cases = {
        "missing": {k: v for k, v in weights.items() if k != key},
        "shape": {**weights, key: weights[key][:-1].clone()},
        "not in the model": {**weights, "model.layers.9.extra.weight": torch.zeros(2)},
    }
    for said, changed in cases.items():
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        named = "extra" if "not in" in said else "down_proj"
        with pytest.raises(StreamlineError, match=rf"model\.safetensors, model\.layers\.\d\..*{named}.*{said}"):
            load(folder)


def test_an_index_that_lies(copied: Callable[[str], Path]) -> None:
    folder, index = copied("plain_sharded"), "model.safetensors.index.json"
    where = json.loads((folder / index).read_text())["weight_map"]
    key, file = sorted(where.items())[0]
    other = next(name for name in where.values() if name != file)
    config_with(folder, lambda content: content["weight_map"].update({key: other}), index)
    with pytest.raises(StreamlineError, match=rf"{other} does.*{key}.*model\.safetensors\.index\.json"):
        load(folder)
    config_with(folder, lambda content: content["weight_map"].update({key: "absent.safetensors"}), index)
    with pytest.raises(StreamlineError, match=rf"absent\.safetensors.*{key}"):
        load(folder)
    (folder / index).write_text("{}")
    with pytest.raises(StreamlineError, match=r"index\.json.*weight_map"):
        load(folder)


@pytest.mark.parametrize(
    "path",
    ["../weights.safetensors", "/etc/passwd", "a/b.safetensors", "..\\w.safetensors", "c:w.safetensors", "..", ".", ""],
)
def test_weights_outside_the_folder(path: str, copied: Callable[[str], Path]) -> None:
    folder = copied("plain_sharded")
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "weights.safetensors")
    key = "model.norm.weight"
    config_with(folder, lambda c: c["weight_map"].update({key: path}), "model.safetensors.index.json")
    with pytest.raises(StreamlineError, match=rf"weight_map\.{key}.*outside this folder"):
        load(folder)


@pytest.mark.parametrize("said", ["somebody/else--modeling.Class", "../modeling.Class", ["/tmp/modeling.Class"], 3])
def test_code_outside_the_folder(said: Any, copied: Callable[[str], Path]) -> None:
    folder = copied("spliced")
    config_with(folder, lambda content: content["auto_map"].update({"AutoModelForCausalLM": said}))
    with pytest.raises(StreamlineError, match=r"auto_map\.AutoModelForCausalLM"):
        load(folder, trust_remote_code=True)
    if isinstance(said, str):
        load(folder)  # where no code is run, none is outside


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_from_elsewhere(key: str, copied: Callable[[str], Path]) -> None:
    folder = copied("plain")
    config_with(folder, lambda content: content.update({key: "somebody/kernel"}))
    with pytest.raises(StreamlineError, match=rf"config\.json.*{key}.*'somebody/kernel'"):
        load(folder)
    config_with(folder, lambda content: content.update({key: "eager", "inner": {key: "somebody/kernel"}}))
    with pytest.raises(StreamlineError, match=rf"config\.json, inner\.{key}: "):
        load(folder)


def test_what_is_looked_at_is_what_is_loaded(copied: Callable[[str], Path]) -> None:
    """Of a single file beside shards Transformers takes the single one, whatever it is."""
    folder = copied("plain_sharded")
    zeros = {key: torch.zeros_like(value) for key, value in load(folder).state_dict().items()}
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StreamlineError, match=r"model\.safetensors.*model\.safetensors\.index\.json"):
        load(folder)
    for name in ("variant", "subfolder", "gguf_file"):
        with pytest.raises(StreamlineError, match=f"{name}= would load files that are not validated"):
            load(folder, **{name: "other"})


def test_a_setting_or_code_that_was_changed(copied: Callable[[str], Path]) -> None:
    for name in ("config.json", "modeling_streamline_hooks.py"):
        folder = copied("spliced")
        (folder / name).write_text((folder / name).read_text() + "\n")
        with pytest.raises(StreamlineError, match=rf"{name} is.*SHA256SUMS"):
            load(folder)
        shutil.rmtree(folder)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    tiny_model("llama").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(StreamlineError, match=r"pytorch_model\.bin.*Expected"):
        load(tmp_path)
    config = json.dumps({"weight_map": {"model.norm.weight": "pytorch_model.bin"}})
    (tmp_path / "model.safetensors.index.json").write_text(config)
    with pytest.raises(StreamlineError, match=r"pytorch_model\.bin.*Expected a safetensors file"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes()).close()
    assert (tmp_path / "ran").exists(), "the trap sees nothing"


def test_an_adapter_does_not_bring_its_base_along(copied: Callable[[str], Path], saved: dict[str, Path]) -> None:
    folder = copied("plain")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(saved["spliced"])}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(StreamlineError, match=r"adapter_config\.json.*adapter, not a model"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "JSON"), ("[1]", "a list.*Expected a JSON object"), ("\xff", "JSON")],
)
def test_a_configuration_that_is_none(content: str, said: str, copied: Callable[[str], Path]) -> None:
    folder = copied("plain")
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(StreamlineError, match=rf"config\.json.*{said}"):
        load(folder)


def test_a_plan_that_was_changed(copied: Callable[[str], Path]) -> None:
    folder = copied("spliced")
    said = json.loads((folder / "config.json").read_text())["streamline_hooks"]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"block": 99}, r"spliced_before block 99.*'model.layers'"),
        ({"block": -1}, "spliced_before block -1"),
        ({"place": "forward"}, "forward block"),
    ]
    for change, match in changes:
        splices = [{**said["splices"][0], **change}]
        config_with(folder, lambda c, splices=splices: c["streamline_hooks"].update({"splices": splices}))
        with pytest.raises(StreamlineError, match=rf"config\.json, streamline_hooks\.splices.*{match}"):
            load(folder)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("", r"config\.json.*not the file"),
        ("00  model.safetensors", "SHA256SUMS is invalid.*Copy"),
        ("0" * 64 + "  other.safetensors", r"config\.json.*not the file"),
    ],
)
def test_checksums_of_something_else(line: str, match: str, copied: Callable[[str], Path]) -> None:
    folder = copied("plain")
    (folder / "SHA256SUMS").write_text(line)
    with pytest.raises(StreamlineError, match=match):
        load(folder)


def sums_of(folder: Path) -> dict[str, str]:
    """What a folder's checksums have to be, by the name of the file."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "SHA256SUMS"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def listed(folder: Path) -> dict[str, str]:
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    return {line[66:]: line[:64] for line in lines if line[64:66] == "  "}


@pytest.fixture(scope="module")
def whole(stories: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all that `save` writes beside it."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    return save(tiny_model("llama"), folder, tokenizer=stories[1], report={"perplexity": {"original": 2.0}})


def test_every_file_has_a_checksum(whole: Path, saved: dict[str, Path]) -> None:
    assert {"config.json", "generation_config.json", "tokenizer_config.json", "report.json"} <= listed(whole).keys()
    for folder in (whole, saved["spliced"]):
        assert listed(folder) == sums_of(folder) and "README.md" in listed(folder)


def test_a_page_written_later_has_checksums_too(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    for loss in (3.0, 4.0):  # written, and written again
        said = {"perplexity": {"original": 2.0, "removed": loss}}
        write_report(folder, compression=said, command="a command", title="A model")
        assert listed(folder) == sums_of(folder) and "report.html" in listed(folder)
        load(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    write_report(folder, compression=said, command="a command", title="A model")
    with pytest.raises(StreamlineError, match=r"config\.json.*not the file"):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_tokenizer_or_generation_config_that_was_changed_or_is_gone(name: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / name).write_text((folder / name).read_text() + "\n")
    with pytest.raises(StreamlineError, match=rf"{name} is.*SHA256SUMS"):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(StreamlineError, match=rf"{name}.*missing.*SHA256SUMS"):
        load(folder)


def test_an_edited_card_and_a_folder_of_an_earlier_version_are_read(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / "README.md").write_text("edited")
    (folder / "report.json").unlink()
    load(folder)
    earlier = {"config.json", "model.safetensors"}  # nothing else was listed
    lines = [f"{digest}  {name}\n" for name, digest in listed(folder).items() if name in earlier]
    (folder / "SHA256SUMS").write_text("".join(lines))
    load(folder)


@pytest.mark.parametrize("name", ["../elsewhere", "/dev/zero", "a/../../b"])
def test_checksums_name_nothing_outside_the_folder(name: str, copied: Callable[[str], Path]) -> None:
    folder = copied("plain")
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(StreamlineError, match=r"SHA256SUMS.*Expected"):
        load(folder)


def test_as_the_original(saved: dict[str, Path]) -> None:
    plain = load(saved["plain"], as_original=True)
    assert type(plain).__module__.startswith("transformers.")
    with pytest.raises(StreamlineError, match=r"llama.*spliced modules.*repair would be lost"):
        load(saved["spliced"], as_original=True)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="is not a folder"):
        load(tmp_path / "absent")


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_not_taken_for_a_damaged_folder(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_model("llama"), tmp_path / "model")

    def fails(*given: Any, **options: Any) -> None:
        raise error("planted")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fails)
    with pytest.raises(error, match="planted"):
        load(folder)
