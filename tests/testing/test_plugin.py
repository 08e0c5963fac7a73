"""The plugin, in a pytest of its own: it gives models, skips with a reason, and imports nothing before that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run_pytest(folder: Path, code: str, *options: str) -> str:
    (folder / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-p", "no:randomly", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


CODE = """
import sys
AT_START = {"torch", "transformers", "streamline_hooks"} & set(sys.modules)

def test_nothing_was_imported_for_the_plugin():
    assert not AT_START

def test_copies(tiny_model):
    one, other = tiny_model("llama", blocks=3), tiny_model("llama", blocks=3)
    assert len(one.model.layers) == 3 and one is not other
    one.lm_head.weight.data.zero_()
    assert other.lm_head.weight.abs().sum() > 0
    assert tiny_model("llama", blocks=3).lm_head.weight.equal(other.lm_head.weight)

def test_options_of_any_kind(tiny_model):
    kinds = ["sliding_attention", "full_attention"] * 2
    assert tiny_model("gemma3_text", blocks=4, layer_types=kinds).config.layer_types == kinds

def test_real(real_model):
    model, tokenizer = real_model
    assert len(model.model.layers) == 5
"""


def test_the_fixtures(tmp_path: Path, stories_folder: Path) -> None:
    told = run_pytest(tmp_path, CODE, f"--streamline-model={stories_folder}")
    assert "4 passed" in told, told


@pytest.mark.long
def test_a_model_that_is_not_there_is_a_reason_to_skip(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nstreamline_model = ./nowhere\n")
    told = run_pytest(tmp_path, CODE)
    assert "3 passed, 1 skipped" in told, told
    words = " ".join(told.split())
    assert "fixture real_model" in words and "no model at './nowhere'" in words


def test_its_fixtures_are_listed_with_what_they_give(tmp_path: Path) -> None:
    told = run_pytest(tmp_path, "", "--fixtures", "-q")
    assert "Return a function that builds a tiny random model" in told
    assert "Return a trained model and its tokenizer" in told


@pytest.mark.parametrize("option", ["--streamline-model"])
def test_its_option_is_in_the_help(tmp_path: Path, option: str) -> None:
    assert option in run_pytest(tmp_path, "", "--help")
