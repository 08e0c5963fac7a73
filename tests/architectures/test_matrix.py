"""No type is silently wrong, and no row of the committed table gets worse."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from tests.architectures.matrix import PAGE, ROWS, main, other_row_of, page, row_of, supported, worse, wrong
from tests.architectures.other_checks import REFUSED, checks_of
from tests.other_models import OTHERS

TABLE = json.loads(ROWS.read_text())
SUBSET = """
bamba bart bloom dbrx deepseek_v3 diffllama falcon gemma2 gemma3_text gemma4_text gpt2 gpt_neo gpt_oss gptj
granitemoehybrid jamba kimi_linear lfm2 llama mamba2 minimax mixtral opt qwen3_next recurrent_gemma roberta xglm zamba2
""".split()  # noqa: SIM905
SAME_VERSION = TABLE["transformers"] == transformers.__version__
needs_version = pytest.mark.skipif(
    not SAME_VERSION, reason=f"the table was made with Transformers {TABLE['transformers']}"
)


def held_to_the_table(model_type: str) -> None:
    row: dict[str, Any] = row_of(model_type)
    assert not worse(row, TABLE["rows"][model_type])


@needs_version
@pytest.mark.parametrize("model_type", [t for t in SUBSET if t in TABLE["rows"]])
def test_a_representative_type(model_type: str) -> None:
    held_to_the_table(model_type)


@needs_version
@pytest.mark.architectures
@pytest.mark.parametrize("model_type", [t for t in TABLE["rows"] if t not in SUBSET])
def test_every_other_type(model_type: str) -> None:
    held_to_the_table(model_type)


def test_the_table_keeps_its_promise() -> None:
    rows = TABLE["rows"].values()
    assert len(rows) == 196 and not [r["model_type"] for r in rows if wrong(r)]
    assert sum(map(supported, rows)) >= 175
    assert PAGE.read_text() == page(TABLE)


def test_the_second_table_says_what_is_held_of_other_models() -> None:
    assert [row["case"] for row in TABLE["others"]] == list(OTHERS)
    for row in TABLE["others"]:
        refused = REFUSED.get(row["case"], {})
        assert row["checks"] == {check: "refused" if check in refused else "ok" for check in checks_of(row["case"])}
        assert all(reason in row["reasons"][check] for check, reason in refused.items())


@needs_version
@pytest.mark.parametrize("case", ["vit", "t5 decoder"])
def test_another_model(case: str) -> None:
    assert other_row_of(case) == next(row for row in TABLE["others"] if row["case"] == case)


def test_a_mistyped_type_is_refused_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    if not SAME_VERSION:
        pytest.skip("another version is refused first")
    before = ROWS.read_bytes(), PAGE.read_bytes()
    monkeypatch.setattr("sys.argv", ["matrix", "llama", "lama"])
    with pytest.raises(SystemExit, match="lama: not a causal-LM type"):
        main()
    assert (ROWS.read_bytes(), PAGE.read_bytes()) == before


def test_a_row_that_gets_worse_is_noticed() -> None:
    good = TABLE["rows"]["llama"]
    assert not worse(good, good)
    for change in ({"first": "WRONG: removed"}, {"first": "refused"}):
        bad = {**good, "windows": {**good["windows"], **change}}
        assert worse(bad, good)
    assert worse({**good, "states": ""}, good)
    assert worse({**good, "own": {**good["own"], "cache": False}}, good)
