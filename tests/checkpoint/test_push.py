"""A checkpoint is uploaded whole, and nothing else is; the hub is a server on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import logging
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from streamline_hooks import LayerSurgeon, StreamlineError, save
from streamline_hooks.checkpoint import push
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model
from tests.checkpoint.hub_server import Hub

# Earlier clients read the address of a commit as one of the public hub, whichever endpoint is given.
pytestmark = pytest.mark.skipif(
    int(version("huggingface_hub").partition(".")[0]) < 1,
    reason="huggingface_hub before 1.0 cannot read a commit of this server",
)
REPORT = {"perplexity": {"original": 2.0, "repaired": 2.5}}


@pytest.fixture()
def folder(tmp_path: Path, stories: tuple[object, object]) -> Path:
    """A model with a splice, whose folder has code, a report and a tokenizer."""
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([2, 3], LinearReplacement(model.config.hidden_size))
        surgeon.commit()
    return save(model, tmp_path / "small", tokenizer=stories[1], report=REPORT)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_every_byte_of_a_checkpoint_arrives(hub: Hub, folder: Path) -> None:
    before = contents(folder)
    assert {"model.safetensors", "README.md", "config.json", "report.json", "tokenizer.json", "SHA256SUMS"} <= set(
        before
    )
    assert push(folder, "me/small", token="hf_mine", endpoint=hub.url) == f"{hub.url}/me/small"
    assert hub.files["me/small@main"] == before == contents(folder)
    assert hub.private == {"me/small": False}
    assert hub.tokens == {"Bearer hf_mine"}
    assert sum("/commit/" in path for path in hub.paths) == 1


def test_what_arrives_is_loaded_as_the_model(hub: Hub, folder: Path, tmp_path: Path) -> None:
    from streamline_hooks import load

    push(folder, "small", token="hf_mine", endpoint=hub.url)  # without the user's name
    for name, content in hub.files["me/small@main"].items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "back")(ids).logits, load(folder)(ids).logits)


def test_other_files_stay_here_and_are_named(hub: Hub, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = set(contents(folder))
    others = ("optimizer.pt", "small.training", "notes/private.txt", ".env", ".cache/token", "figures/photo.png")
    others += ("code.py.bak", "events.out.tfevents.1")
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"secret")
    (folder / "chat_template.jinja2").symlink_to(folder.parent / "elsewhere")
    with (folder / "SHA256SUMS").open("a") as sums:  # a list that somebody made of everything
        sums.write(f"{hashlib.sha256(b'secret').hexdigest()}  optimizer.pt\n")
        sums.write(f"{hashlib.sha256(b'secret').hexdigest()}  figures/photo.png\n")
    with caplog.at_level(logging.WARNING, logger="streamline_hooks"):
        push(folder, "me/small", token="hf_mine", endpoint=hub.url)
    assert set(hub.files["me/small@main"]) == written
    assert all(name in caplog.text for name in (*others, "chat_template.jinja2"))


def test_a_private_branch(hub: Hub, folder: Path) -> None:
    url = push(folder, "team/small", private=True, token="hf_mine", endpoint=hub.url, revision="v2")
    assert url == f"{hub.url}/team/small/tree/v2"
    assert hub.private == {"team/small": True}
    assert hub.files["team/small@v2"] == contents(folder) and not hub.files["team/small@main"]
    assert push(folder, "team/small", private=True, token="hf_mine", endpoint=hub.url, revision="v2") == url


def test_a_public_repository_is_refused_for_a_private_model(hub: Hub, folder: Path) -> None:
    push(folder, "me/small", token="hf_mine", endpoint=hub.url)
    hub.files["me/small@main"].clear()
    with pytest.raises(StreamlineError, match=r"me/small exists .* is public.*private=True.*pass private=False"):
        push(folder, "me/small", private=True, token="hf_mine", endpoint=hub.url)
    assert not hub.files["me/small@main"]


@pytest.mark.parametrize(
    "request_pattern", ["*/repos/create", "*/preupload/*", "*/objects/batch", "PUT /objects/*", "*/commit/*"]
)
def test_a_failed_upload_leaves_the_folder_and_says_what_to_do(hub: Hub, folder: Path, request_pattern: str) -> None:
    before = contents(folder)
    hub.fail_at = f"{request_pattern}"
    with pytest.raises(
        StreamlineError, match=r"small was not uploaded to 'me/small'.*(?s:.)*call push again"
    ) as failed:
        push(folder, "me/small", token="hf_mine", endpoint=hub.url)
    assert "hf_mine" not in str(failed.value)
    assert contents(folder) == before
    assert not hub.files.get("me/small@main")
    hub.fail_at = "nothing"
    push(folder, "me/small", token="hf_mine", endpoint=hub.url)
    assert hub.files["me/small@main"] == before


def test_files_that_the_repository_ignores_are_missed(hub: Hub, folder: Path) -> None:
    hub.ignored = "config.json"
    with pytest.raises(StreamlineError, match=r"lacks config\.json.*\.gitignore"):
        push(folder, "me/small", token="hf_mine", endpoint=hub.url)


def test_offline_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StreamlineError, match="(?s)OfflineModeIsEnabled.*HF_HUB_OFFLINE"):
        push(folder, "me/small", token="hf_mine", endpoint="http://127.0.0.1:9")


def test_a_folder_of_others_or_a_damaged_one_is_refused(hub: Hub, folder: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    for other in (tmp_path / "plain", tmp_path / "missing", tmp_path):
        with pytest.raises(StreamlineError, match=f"{other} is not a checkpoint of this library.*Save the model"):
            push(other, "me/small", token="hf_mine", endpoint=hub.url)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": ', '"hidden_size": 1'))
    with pytest.raises(StreamlineError, match=r"config\.json is not the file that was written"):
        push(folder, "me/small", token="hf_mine", endpoint=hub.url)
    assert not hub.paths


def test_weights_of_another_model_in_the_repository_are_refused(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Transformers reads one file of weights rather than the index of several."""
    push(folder, "me/small", token="hf_mine", endpoint=hub.url)
    before = dict(hub.files["me/small@main"])
    sharded = save(tiny_model("llama"), tmp_path / "sharded", max_shard_size="20KB")
    assert not (sharded / "model.safetensors").exists()
    with pytest.raises(
        StreamlineError, match=r"me/small contains .*model\.safetensors,.*Expected.*Delete.*new repository"
    ):
        push(sharded, "me/small", token="hf_mine", endpoint=hub.url)
    assert hub.files["me/small@main"] == before
    kept = {"notes.md": b"", "scripts/run.py": b"", "other/model.safetensors": b""}
    hub.files["me/small@main"].update(kept)
    push(folder, "me/small", token="hf_mine", endpoint=hub.url)
    assert hub.files["me/small@main"] == before | kept
    for name in ("model-00001-of-00002.safetensors", "pytorch_model.bin", "adapter_config.json", "modeling_old.py"):
        hub.files["me/other@main"] = {name: b""}
        with pytest.raises(StreamlineError, match=f"me/other contains {name}"):
            push(folder, "me/other", token="hf_mine", endpoint=hub.url)
        assert hub.files["me/other@main"] == {name: b""}


def test_private_content_is_named_in_one_warning(
    hub: Hub, folder: Path, stories: tuple[object, object], caplog: pytest.LogCaptureFixture
) -> None:
    def warnings() -> list[str]:
        caplog.clear()
        hub.files.clear()
        with caplog.at_level(logging.WARNING, logger="streamline_hooks"):
            push(folder, "me/small", token="hf_mine", endpoint=hub.url)
        return [record.getMessage() for record in caplog.records]

    assert not warnings(), "relative names and numbers are no private content"
    source = {"sources": ["/home/me/notes.txt", "pydoc"], "test": ["./held_out.txt"]}
    sample = {"prompt": "/dear diary", "text": "today", "reference": "today"}
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        surgeon.commit(calibration={"source": source})
    report = {**REPORT, "samples": [sample], "data": {"source": source}}
    save(model, folder, tokenizer=stories[1], report=report, overwrite=True)  # type: ignore[arg-type]
    (folder / "report.html").write_text(
        "<pre><code>streamline-hooks compress m --output=&#39;/home/me/new model&#39;</code></pre>"
        '<article class="sample">/dear diary</article>'
    )
    (folder / "evaluation.json").write_text(json.dumps({"model": "small", "samples": [sample]}))
    (warning,) = warnings()
    assert "config.json: /home/me/notes.txt;" in warning
    assert "report.json: samples, /home/me/notes.txt;" in warning and "evaluation.json: samples;" in warning
    assert "report.html: samples, a command with absolute paths." in warning
    assert "diary" not in warning and "held_out" not in warning and "pydoc" not in warning
    assert "Delete report.json, evaluation.json, report.html" in warning and "relative paths" in warning
    for name in ("report.json", "evaluation.json", "report.html"):
        (folder / name).unlink()
    (warning,) = warnings()
    assert "config.json" in warning and "report" not in warning and "Delete" not in warning
