"""No type is silently wrong, and no row of the committed table gets worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.architectures import examine, matrix
from tests.architectures.examine_sites import SITES
from tests.architectures.matrix import PAGE, ROWS, branches, main, other_row_of, page, row_of, supported, worse, wrong
from tests.architectures.other_checks import REFUSED, checks_of
from tests.other_models import OTHERS

TABLE = json.loads(ROWS.read_text())
SUBSET = ["falcon", "gemma3_text", "llama", "mixtral", "zamba2"]
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


def test_nine_of_ten_supported_types_have_both_branches() -> None:
    """The numbers on the page are those of the rows."""
    rows = [row for row in TABLE["rows"].values() if supported(row)]
    assert all(set(row["sites"]) == set(SITES) for row in rows)
    results = [{row["sites"]["attention.output"], row["sites"]["mlp.output"]} for row in rows]
    plain, normed = results.count({"ok"}), results.count({"with norms"})
    read = sum("can be recorded but not changed" in " ".join(result) for result in results)
    heads = [row["sites"]["attention.heads"] for row in rows].count("ok")
    assert plain + normed + read >= 0.9 * len(rows)
    text = PAGE.read_text()
    assert f"{plain + normed + read} have both branches ({normed} of them with norms, {read} read only)" in text
    assert f"and {heads} have heads" in text
    section = text.partition("### Refused activation sites")[2].partition("\n## ")[0]
    for row in TABLE["rows"].values():
        cells = next(line for line in text.splitlines() if line.startswith(f"| {row['model_type']} |")).split(" | ")
        if row["sites"]:
            assert cells[8:10] == [branches(row), "ok" if row["sites"]["attention.heads"] == "ok" else "refused"]
        refused = {site for site, result in row["sites"].items() if result not in ("ok", "with norms")}
        lines = [
            line for line in section.splitlines() if row["model_type"] in line.rpartition(" | ")[2][:-2].split(", ")
        ]
        assert {site for line in lines for site in refused if f"`{site}`" in line} == refused
        assert sum(line.count("`,") + 1 for line in lines) == len(refused)


def test_prompts_can_skip_blocks_in_most_types() -> None:
    """The number on the page is that of the rows; refusals have a reason."""
    results = [row["prompt_skip"] for row in TABLE["rows"].values() if not row["unbuilt"]]
    assert results.count("ok") >= 120 and all(result == "ok" or ". Expected " in result for result in results)
    assert f"It is ok for {results.count('ok')} types." in PAGE.read_text()


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


def test_each_result_of_the_sites_is_stored_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command continues with the types without results, and then examines all again."""
    if not SAME_VERSION:
        pytest.skip("another version is refused first")
    rows = {name: {**TABLE["rows"][name], "sites": {}} for name in ("gpt2", "llama", "opt")}
    monkeypatch.setattr(matrix, "ROWS", tmp_path / "table.json")
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "page.md")
    matrix.ROWS.write_text(json.dumps({**TABLE, "rows": rows}))
    examined: list[str] = []

    def sites_of(model_type: str) -> dict[str, str]:
        if len(examined) == 2:
            raise KeyboardInterrupt
        examined.append(model_type)
        return TABLE["rows"][model_type]["sites"]  # type: ignore[no-any-return]

    monkeypatch.setattr(examine, "sites_of", sites_of)
    monkeypatch.setattr("sys.argv", ["matrix", "sites"])
    with pytest.raises(KeyboardInterrupt):
        main()
    stored = json.loads(matrix.ROWS.read_text())["rows"]
    assert [bool(row["sites"]) for row in stored.values()] == [True, True, False] and not matrix.PAGE.exists()
    examined[:] = ["none"]
    main()
    assert examined == ["none", "opt"]
    assert json.loads(matrix.ROWS.read_text())["rows"] == {name: TABLE["rows"][name] for name in rows}
    assert matrix.PAGE.read_text() == page({**TABLE, "rows": {name: TABLE["rows"][name] for name in rows}})
    monkeypatch.setattr("sys.argv", ["matrix", "sites", "hrm_text"])
    with pytest.raises(SystemExit, match="hrm_text: not examined yet"):
        main()


def test_a_row_that_gets_worse_is_noticed() -> None:
    good = TABLE["rows"]["llama"]
    assert not worse(good, good)
    for change in ({"first": "WRONG: removed"}, {"first": "refused"}):
        bad = {**good, "windows": {**good["windows"], **change}}
        assert worse(bad, good)
    assert worse({**good, "states": ""}, good)
    assert worse({**good, "own": {**good["own"], "cache": False}}, good)
    (regression,) = worse({**good, "sites": {**good["sites"], "mlp.output": "It cannot be read: a reason."}}, good)
    assert regression == "mlp.output was ok and is refused: It cannot be read: a reason."
    results = [
        "ok",
        "with norms",
        "It can be recorded but not changed: a reason",
        "It cannot be read: a token",
        "WRONG: x",
    ]
    for before, result in enumerate(results):
        rows = [{**good, "sites": {**good["sites"], "attention.heads": other}} for other in (result, *results)]
        assert [bool(worse(row, rows[0])) for row in rows[1:-1]] == [number > before for number in range(4)]
        assert worse(rows[-1], rows[0])
    assert worse({**good, "sites": {}}, good)
    assert worse({**good, "prompt_skip": "It is refused."}, good) and wrong({**good, "prompt_skip": "WRONG: logits"})
