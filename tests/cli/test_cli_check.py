"""`streamline-hooks check`: a table, what is refused and what is wrong, and an exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import StreamlineError
from streamline_hooks.testing import run_checks
from streamline_hooks.testing import tiny_model as tiny_of_type
from tests.commands import run
from tests.testing.planted_faults import FAULTS, Fault
from tests.tiny_models import tiny_model

REMOVALS = [fault for fault in FAULTS if fault.caught_by == "removal"]


def test_a_healthy_model(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(["check", stories_folder, "--window", "1:3"], monkeypatch, capsys)
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == ["ok"] * 8
    assert "without blocks 1 to 2 it equals the shorter model" in lines[6]
    assert lines[0].endswith(" s")


def test_what_is_wrong_is_told_with_exit_code_1(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: tuple[Any, Any]
) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def looks_ahead(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits + output.logits.mean(dim=1, keepdim=True)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", looks_ahead)
    code, out, _ = run(["check", stories_folder, "--window", "1:3", "--json"], monkeypatch, capsys)
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 1
    assert rows["later tokens and other rows change nothing"]["verdict"] == "FAILED"
    assert rows["cached decoding equals the forward"]["verdict"] == "FAILED"
    assert rows["surgery leaves no trace"]["verdict"] == "ok"
    assert "token" in rows["later tokens and other rows change nothing"]["text"]


def test_a_refusal_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_of_type("gemma3n_text", blocks=6).save_pretrained(tmp_path)
    code, out, _ = run(["check", tmp_path, "--window", "3:4", "--json"], monkeypatch, capsys)
    refused = [row for row in json.loads(out) if row["verdict"] == "refused"]
    assert code == 0
    assert refused and all("cannot be removed" in row["text"] for row in refused)


@pytest.mark.parametrize("fault", REMOVALS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_broken_surgery_is_a_failure_though_the_surgeon_sees_it_first(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {check.name: check for check in run_checks(fault.plant(monkeypatch).model, [range(1, 2)])}
    removed = found["without block 1 it equals the shorter model"]
    assert removed.verdict == "FAILED" and re.search(fault.says, removed.text)


def test_what_a_healthy_model_cannot_do_is_refused_though_no_cause_is_known() -> None:
    """MiniMax decodes otherwise without its first block, though its logits without a cache are right."""
    model = tiny_of_type("minimax", blocks=4)
    found = {check.name: check for check in run_checks(model, [range(1)])}
    removed = found["without block 0 it equals the shorter model"]
    assert removed.verdict == "refused" and "decoding with a cache" in removed.text


def test_an_error_of_the_model_itself_is_told_and_the_rest_goes_on() -> None:
    model = tiny_model("llama")
    model.generate = lambda *args, **kwargs: 1 / 0
    found = {check.name: check for check in run_checks(model, [range(2, 4)])}
    assert found["cached decoding equals the forward"].verdict == "FAILED"
    assert "ZeroDivisionError" in found["cached decoding equals the forward"].text
    assert found["without blocks 2 to 3 it equals the shorter model"].verdict == "ok"


@pytest.mark.parametrize("window", [range(0, 6), range(4, 9), range(3, 3)])
def test_a_window_that_is_not_there(window: range) -> None:
    with pytest.raises(StreamlineError, match=r"from 6 blocks.*Expected 0 <= START"):
        list(run_checks(tiny_model("llama"), [window]))


def test_a_window_that_is_no_range(
    stories_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["check", stories_folder, "--window", "3"], monkeypatch, capsys)
    assert code == 2 and re.fullmatch(r"streamline-hooks: --window '3'.*Expected START:STOP.*", err.strip())


def test_leaves_the_random_state_as_it_was() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    list(run_checks(tiny_model("llama"), [range(1, 2)]))
    assert torch.equal(before, torch.random.get_rng_state())
