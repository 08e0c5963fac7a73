"""The card says what was done, to what, with what, and how the model is loaded; and what it says to do works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import LayerSurgeon, compress, save
from streamline_hooks.checkpoint import model_card
from streamline_hooks.distillation import DistillationConfig, TrainingResult
from streamline_hooks.replacements import LinearReplacement, register_module
from streamline_hooks.selection import Target, TargetOutcome
from tests.configured import arguments
from tests.processes import in_a_new_process
from tests.tiny_models import WIDTH, Nudge, repaired, tiny_model

REPORT: dict[str, Any] = {
    "perplexity": {"original": 10.0, "removed": 30.0, "repaired": 15.0},
    "parameters": {"before": 4_000_000, "after": 3_000_000},
    "data": {"test_tokens": 12_288},
}


def header(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---")[1]))


def blocks_of_code(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def card_of(model: Any, folder: Path, **options: Any) -> str:
    save(model, folder / "model", **options)
    return (folder / "model" / "README.md").read_text()


NASTY = [
    'a "quoted" name',
    "it's: a name",
    "key: value # comment",
    "name\n---\n\n# heading\nlicense: mit",
    "name\nlicense: mit",
    "- item",
    "{a: b}",
    "[x](https://example.com)",
    "*bold* `code` <b>html</b> | cell",
    "null",
    "\u2028\x07 \x85",
    "!!python/object:os.system",
]


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("prefix", ["", "somebody/"])
def test_a_name_neither_breaks_nor_extends_the_card(name: str, prefix: str) -> None:
    usual = ModelCard(model_card({"model_type": "llama"}, REPORT, f"{prefix}usual"))
    text = model_card({"model_type": "llama"}, REPORT, prefix + name)
    card = ModelCard(text)
    said, expected = card.data.to_dict(), usual.data.to_dict()
    assert said.pop("model-index")[0]["results"] == expected.pop("model-index")[0]["results"]
    assert said | {"base_model": None} == expected | {"base_model": None}
    assert len(card.text.splitlines()) == len(usual.text.splitlines())
    assert len(re.findall("^#", card.text, re.MULTILINE)) == len(re.findall("^#", usual.text, re.MULTILINE))
    assert not re.search(r"(?<!\\)[*`<|\[]", card.text.splitlines()[1])


@given(st.text(), st.booleans())
def test_any_name_comes_back_on_one_line(name: str, on_hub: bool) -> None:
    text = model_card({"model_type": "llama"}, REPORT, "somebody/" * on_hub + name)
    card = ModelCard(text)
    last = "".join(letter if letter.isprintable() else " " for letter in name.rpartition("/")[2])
    assert card.data.model_name == f"{' '.join(last.split()) or 'a model'}, with fewer blocks"
    named = card.data.base_model is not None  # on a line more
    assert len(text.splitlines()) - len(model_card({"model_type": "llama"}, REPORT).splitlines()) == named


def test_the_header_and_the_table(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.name_or_path = "somebody/some-model"
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), LinearReplacement(WIDTH))
        surgeon.commit(kind="linear", calibration={"calibration_tokens": 5, "fingerprint": "abc", "notes": []})
    card = card_of(model, tmp_path, report=REPORT)
    said = header(card)
    assert (said["base_model"], said["library_name"]) == ("somebody/some-model", "transformers")
    assert {"streamline_hooks", "layer-pruning"} <= set(said["tags"])
    metric = said["model-index"][0]["results"][0]["metrics"][0]
    assert metric == {"type": "perplexity", "value": 15.0}
    for line in (
        "# some-model, with fewer blocks",
        "- Blocks: 6 before, 4 now. Removed: 1, 2.",
        "- LinearReplacement replaces blocks 1 to 2, runs before block 1 and takes no cache slot.",
        "- Repaired by: `linear`, in closed form.",
        "- Calibration: calibration tokens 5, fingerprint abc.",
        "| repaired | 15.00 | 1.50 |",
    ):
        assert f"{line}\n" in card
    assert "4.0 M parameters before, 3.0 M now" in card and "(12,288 tokens)" in card


def test_what_it_was_made_with() -> None:
    slots = [{"source": 0, "module": "Block", "silenced": [], "folded": []}]
    entry = {"stack": "layers", "old_length": 2, "slots": slots, "splices": [], "versions": {"torch": "2.9", "x": "1"}}
    assert "- Made with torch 2.9, x 1.\n" in model_card({"streamline_hooks": {"history": [entry]}})
    entry["versions"] = {}
    assert "Made with" not in model_card({"streamline_hooks": {"history": [entry]}})


@pytest.mark.parametrize(("measured", "error", "reached"), [(88.4e6, "+0.5%", True), (91e6, "+3.4%", False)])
def test_a_target_has_what_was_predicted_and_measured(measured: float, error: str, reached: bool) -> None:
    target = TargetOutcome(Target(memory_bytes=90e6), original=120e6, predicted=88e6, measured=measured)
    card = model_card({"model_type": "llama"}, {**REPORT, "target": target.to_dict()})
    table = (
        "## Target\n\n| target | original | predicted | measured | relative error |\n|---|---|---|---|---|\n"
        f"| memory:90MB | 120.000 MB | 88.000 MB | {measured / 1e6:.3f} MB | {error} |\n\n"
    )
    assert (
        table in card
        and ("The target was reached." in card) == reached
        and ("The target was not reached." in card) != reached
    )
    assert "machine" not in card, "a size is the same on every machine"
    assert "## Target" not in model_card({"model_type": "llama"}, {**REPORT, "target": None})


def test_scores_of_a_task_are_a_table_of_what_was_measured() -> None:
    scores = {"original": {"accuracy": 0.5, "kl": 0.0}, "repaired": {"accuracy": 0.25}}
    card = model_card({"model_type": "bert"}, {"scores": scores})
    table = "| | accuracy | KL |\n|---|---|---|\n| original | 0.5000 | 0.0000 |\n| repaired | 0.2500 |  |\n\n"
    assert table in card and "Measured on test data that was not used for selection or fitting." in card


def test_a_path_is_not_told(tmp_path: Path) -> None:
    """Neither in the card nor in the configuration: they are shared, and a path tells of its author's machine."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "secret" / "mine")
    loaded = type(model).from_pretrained(tmp_path / "secret" / "mine")
    with LayerSurgeon(loaded) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    card = card_of(loaded, tmp_path)
    assert "# mine, with fewer blocks" in card and "base_model" not in header(card)
    assert not [p for p in (tmp_path / "model").iterdir() if b"secret" in p.read_bytes()]


def test_the_original_is_remembered_through_a_second_surgery(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.name_or_path = "somebody/some-model"
    for _ in range(2):
        with LayerSurgeon(model) as surgeon:
            surgeon.remove([1])
            surgeon.commit()
        save(model, tmp_path / "again", overwrite=True)
        model = type(model).from_pretrained(tmp_path / "again")
    card = card_of(model, tmp_path)
    assert header(card)["base_model"] == "somebody/some-model"
    assert "## Changes, 1\n" in card and "## Changes, 2\n" in card
    assert header(card_of(model, tmp_path, base_model="else/where", overwrite=True))["base_model"] == "else/where"


def test_zeroed_folded_and_inserted() -> None:
    slots = [
        {"source": 0, "module": "Block", "silenced": ["attention"], "folded": []},
        {"source": 2, "module": "Block", "silenced": [], "folded": ["mlp"]},
        {"source": None, "module": "Block", "silenced": [], "folded": []},
    ]
    entry = {"stack": "layers", "old_length": 4, "slots": slots, "splices": [], "kind": "block", "training": {"kl": 1}}
    card = model_card({"model_type": "llama", "streamline_hooks": {"history": [entry]}})
    assert "- Zeroed: attention of 0 (block numbers before the surgery).\n" in card
    assert "output projection of: mlp of 2 (block numbers before the surgery).\n" in card
    assert "- Inserted blocks: 2 (Block).\n" in card
    assert "- Repaired by: `block`, trained.\n" in card and "a plain checkpoint" in card


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repair": "none"}, None),
        ({"repair": "linear", "search": "attention"}, "- Repaired by: `linear`, in closed form."),
        ({"repair": "linear"}, "- Repaired by: `linear`, in closed form."),
        ({"repair": "merged"}, "- Repaired by: `merged`, as it is."),
        ({"repair": "block:solve=false"}, "- Repaired by: `block:solve=false`, as it is."),
        (
            {"repair": "linear", "distillation": DistillationConfig(learning_rate=1e3, warmup_ratio=0.0)},
            "in closed form.",
        ),
        (
            {"repair": "linear", "distillation": DistillationConfig(learning_rate=1e-4)},
            "- Repaired by: `linear`, trained.",
        ),
    ],
)
def test_how_it_was_repaired_is_what_was_done(options: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    rows = torch.randint(3, 60, (48, 12), generator=torch.Generator().manual_seed(0))
    parts: dict[str, Any] = {"calibration": list(rows[:40, None]), "validation": [rows[40:44]], "test": [rows[44:]]}
    compress(
        tiny_model("llama"),
        parts,
        output=tmp_path / "out",
        **arguments(remove=2, speed=False, generation=False, **options),
    )
    told = [line for line in (tmp_path / "out/README.md").read_text().splitlines() if "Repaired by" in line]
    assert told == [] if said is None else told[0].endswith(said)


def changes(entries: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the card about some records."""
    slots = [{"source": k, "module": "Block", "silenced": [], "folded": []} for k in range(3)]
    plain = {"stack": "layers", "old_length": 3, "slots": slots, "splices": []}
    history = [{**plain, **entry} for entry in entries]
    return model_card({"model_type": "llama", "streamline_hooks": {"history": history}}).splitlines()


def test_a_training_run_is_described_with_its_loss_its_tokens_and_its_end() -> None:
    training = TrainingResult(8, 4096, 0.61, 0.25, best_step=6, history=[], seconds=12, stopped="interrupted at last")
    entry: dict[str, Any] = {"kind": "none", "repaired": "trained", "training": training.report()}
    entry["config"] = {"distillation": {"loss": {"kl": 1.0, "lm": 0.5}}, "healing": {"method": "lora"}}
    run = "8 steps on 4,096 tokens in 12 s: KL 0.6100 -> 0.2500, of step 6, ended early: interrupted at last."
    card = changes([entry])
    assert f"- Training with the loss `kl + 0.5*lm` and `lora` healing of kept blocks: {run}" in card
    assert not [line for line in card if "Repaired by" in line]
    entry["config"] = {}
    assert f"- Training: {run}" in changes([entry])
    entry["training"]["best_step"] = 0
    assert f"- Training: {run.replace('of step 6', 'of step 0')} The initial weights are kept." in changes([entry])
    assert not [line for line in changes([{"training": {"kl": 1}}]) if "Training" in line]


def test_a_replacement_of_an_earlier_change_is_not_a_second_one() -> None:
    first = {"splices": [{"before": 1, "old_before": 1, "module": "LinearReplacement", "replaces": [1, 3]}]}
    second = {
        "splices": [{"before": k, "old_before": k, "module": "LinearReplacement", "replaces": None} for k in (0, 1)]
    }
    lines = [line for line in changes([first, second]) if "LinearReplacement" in line]
    assert [line.split(",")[0] for line in lines] == [
        "- LinearReplacement replaces blocks 1 to 2",
        "- LinearReplacement is of the change before",
        "- LinearReplacement is inserted",
    ]


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["spliced", "plain"])
def test_what_it_says_to_do_works(kind: str, tmp_path: Path) -> None:
    model = repaired("llama") if kind == "spliced" else tiny_model("llama")
    code = blocks_of_code(card_of(model, tmp_path))
    assert len(code) == (2 if kind == "spliced" else 1)
    absent = (
        f"import os, sys; sys.modules['streamline_hooks'] = None; os.environ['HF_MODULES_CACHE'] = {str(tmp_path)!r}"
    )
    lines = [line for line in code[0].splitlines() if "okenizer.from" not in line]
    started = "" if kind == "spliced" else absent
    in_a_new_process("\n".join([started, f"folder = {str(tmp_path / 'model')!r}", *lines]))
    if kind == "spliced":
        imported = "from transformers import AutoModelForCausalLM"
        in_a_new_process("\n".join([absent, imported, f"folder = {str(tmp_path / 'model')!r}", code[1]]))


def test_an_untouched_model_and_a_report_of_ones_own(tmp_path: Path) -> None:
    card = card_of(tiny_model("llama"), tmp_path, report={"note": 1})
    assert "from which no block was removed" in card and "## Quality" not in card
    assert "| removed | 30.00 |" not in model_card({}, {"perplexity": {"removed": 30.0}})
    assert "| plain removal | 30.00 |  |" in model_card({}, {"perplexity": {"removed": 30.0}})


def test_somebody_elses_module(tmp_path: Path) -> None:
    @register_module("card-nudge")
    class Own(Nudge):
        def to_config(self) -> dict[str, Any]:
            return {}

    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), Own())
        surgeon.commit()
    card = card_of(model, tmp_path)
    assert "is of a custom class" in card and "trust_remote_code" not in card
