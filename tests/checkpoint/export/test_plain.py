"""A plain checkpoint has no trace of this library, and what cannot be one is told what to do, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_hooks import LayerSurgeon, StreamlineError, load, save
from streamline_hooks.checkpoint import check_no_splices, export_plain, open_checkpoint
from streamline_hooks.cli import run
from streamline_hooks.replacements import LinearReplacement
from tests.other_models import made
from tests.processes import in_a_new_process
from tests.tiny_models import repaired, tiny_model, tokens


def test_no_trace(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1, 2])
        surgeon.commit()
    said = model.config.streamline_hooks
    export_plain(model, tmp_path / "plain")
    assert model.config.streamline_hooks is said, "exporting took the plan from the model itself"
    assert not [p.name for p in (tmp_path / "plain").iterdir() if b"streamline" in p.read_bytes().lower()]
    with torch.no_grad():
        torch.save(model(tokens(2, 9)).logits, tmp_path / "logits.pt")
    torch.save(tokens(2, 9), tmp_path / "ids.pt")
    code = """
        import sys
        sys.modules["streamline_hooks"] = None
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/plain")
        assert torch.equal(model(torch.load(sys.argv[1] + "/ids.pt")).logits, torch.load(sys.argv[1] + "/logits.pt"))
        print("same")
    """
    assert in_a_new_process(code, tmp_path).stdout.strip().endswith("same")


@pytest.mark.parametrize("write", [save, export_plain])
@pytest.mark.parametrize("which", ["base", "wrapped"])
def test_adapters_are_refused(write: Callable[[Any, Path], Path], which: str, tmp_path: Path) -> None:
    """Only the adapter would be written, or weights with names that no model has."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1, 2])
        surgeon.commit()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(StreamlineError, match=r"PEFT adapters.*merge_and_unload"):
        write(model if which == "base" else wrapped, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    write(wrapped.merge_and_unload(), tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_the_folder_that_weights_on_disk_are_read_from_is_not_replaced(tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), tmp_path / "model")
    model = open_checkpoint(folder)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    with pytest.raises(StreamlineError, match="not in memory"):
        export_plain(model, folder, overwrite=True)
    export_plain(model, tmp_path / "other")


@pytest.mark.parametrize("options", [[], ["--trust-remote-code"]])
def test_the_tokenizers_own_code_is_run_where_it_is_trusted(
    options: list[str], stories: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, load_automatic = tiny_model("llama"), [], AutoTokenizer.from_pretrained
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    folder = save(model, tmp_path / "small", tokenizer=stories[1])

    def from_pretrained(name: Any, **given: Any) -> Any:
        asked.append(given)
        return load_automatic(name, **given)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    run(["export", str(folder), "-o", str(tmp_path / "plain"), *options])
    assert asked == [{"trust_remote_code": True} if options else {}]
    assert (tmp_path / "plain" / "tokenizer.json").is_file()


def test_a_spliced_one_is_told_what_to_do_and_what_it_costs() -> None:
    model = repaired("llama")
    added, block = 32 * 32, sum(p.numel() for p in tiny_model("llama").model.layers[0].parameters())
    with pytest.raises(StreamlineError) as raised:
        check_no_splices(model)
    said = str(raised.value)
    assert "its LinearReplacement" in said and "--refit --original MODEL" in said
    assert f"{-added:+,} parameters, no cache slot" in said
    assert f"{block - added:+,} parameters, 1 more cache slot" in said


def test_a_splice_in_the_other_stack_is_one_too(tmp_path: Path) -> None:
    model = made("t5 encoder")
    with LayerSurgeon(model, "encoder.block") as surgeon:
        surgeon.replace([2], LinearReplacement(32))
        surgeon.commit()
    with pytest.raises(StreamlineError, match=r"StreamlinedT5.*LinearReplacement"):
        export_plain(model, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    folder = str(save(model, tmp_path / "model"))
    run(["export", folder, "--output", str(tmp_path / "plain")])
    assert "has no tokenizer, so none is exported" in capsys.readouterr().out
    assert "streamline_hooks" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    run(["export", folder, "--to", "gguf", "-o", str(tmp_path / "m.gguf")])
    assert "architecture llama" in capsys.readouterr().out and (tmp_path / "m.gguf").stat().st_size > 1000
    for options, said in (
        (["--to", "pdf", "-o", "x"], r"pdf.*--to.*plain.*gguf.*onnx"),
        (["--to", "gguf", "-o", str(tmp_path / "m.gguf")], "exists.*--overwrite"),
        (["-o", str(tmp_path / "plain")], "is not empty"),
        (["--to", "gguf", "-o", str(tmp_path / "none" / "m.gguf")], r"m.gguf does not exist"),
        (["--to", "gguf", "-o", str(tmp_path / "n.gguf"), "--gguf-dtype", "q4"], r"q4.*--gguf-dtype.*f32.*bf16"),
        (["-o", "x", "--refit", "folded"], "--refit and --original"),
        (["-o", "x", "--refit"], "--refit and --original"),
        (["-o", "x", "--original", "y"], "--refit and --original"),
        (["-o", "x", "--original", "y", "--refit", "linaer"], r"'linaer'.*Expected folded or silenced\. "),
        (["-o", "x", "--gguf-dtype", "bf16"], r"--gguf-dtype.*--to plain.*--to gguf"),
        (["-o", "x", "--calibration", "pydoc"], r"--calibration.*--refit"),
        (["-o", "x", "--stack", "model.layers"], "Unknown option.*--stack"),
    ):
        with pytest.raises(StreamlineError, match=said):
            run(["export", folder, *options])


def test_the_folder_that_was_exported_from_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    folder = save(model, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    export_plain(load(folder), tmp_path / "plain")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
