"""The commands info and push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks import LayerSurgeon, save
from streamline_hooks.cli.main import make_app
from streamline_hooks.core import describe_environment
from streamline_hooks.testing import tiny_model
from tests.checkpoint.hub_server import Hub
from tests.commands import run


def test_info_lists_versions_devices_and_extras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = describe_environment()
    extras = {
        "there": {"installed": True, "missing": [], "install": 'pip install "x[there]"'},
        "gone": {"installed": False, "missing": ["a>=1", "b"], "install": 'pip install "x[gone]"'},
    }
    gpu = {"name": "A GPU", "memory": 80 * 10**9}
    devices = {**found["devices"], "cuda": [gpu], "mps": False}
    monkeypatch.setattr(
        "streamline_hooks.cli.info.describe_environment", lambda: {**found, "extras": extras, "devices": devices}
    )
    make_app()["info"]  # imports the module
    code, out, err = run(["info"], monkeypatch, capsys)
    assert code == 0, err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"torch {found['versions']['torch']}" in lines
    assert "cuda:0 A GPU, 80.0 GB" in lines
    assert 'gone no a>=1, b pip install "x[gone]"' in lines and 'there yes pip install "x[there]"' in lines
    code, out, err = run(["info", "--json"], monkeypatch, capsys)
    assert code == 0 and json.loads(out)["extras"] == extras


def test_push_uploads_a_checkpoint(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        surgeon.commit()
    folder = save(model, tmp_path / "small")
    (folder / "notes.txt").write_text("mine")
    given: list[Any] = ["push", folder, "me/small", "--endpoint", hub.url, "--token", "hf_mine", "--private"]
    code, out, err = run([*given, "--revision", "v1", "--json"], monkeypatch, capsys)
    assert code == 0, err
    assert json.loads(out)["url"].startswith(f"{hub.url}/me/small") and "notes.txt" in err
    assert hub.private == {"me/small": True} and hub.tokens == {"Bearer hf_mine"}
    uploaded = hub.files["me/small@v1"]
    assert uploaded["model.safetensors"] == (folder / "model.safetensors").read_bytes() and "notes.txt" not in uploaded
    code, out, err = run(["push", tmp_path, "me/other", "--endpoint", hub.url], monkeypatch, capsys)
    assert code == 2 and not out and len(err.strip().splitlines()) == 1
