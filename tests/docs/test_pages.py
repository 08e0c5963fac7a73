"""Every fenced block of README and docs runs as shown, in order, in one namespace and one folder per page.

- ``python`` runs.
- ``bash`` runs line by line: `streamline-hooks` through its command line, `torchrun` in new processes. Of `pip install`
  the extras are checked, of `make` the target.
- ``yaml`` and ``toml`` are written to the file that the comment in their first line names; others are parsed.
- ``text`` shows a command line that the page explains and that does not run, or an output. After the comment
  ``<!-- output -->`` it must be the output of the block before, as far as that is deterministic: ``...`` replaces any
  number of lines, other numbers may differ by 2 % (results depend on the processor), and numbers in lines about time or
  memory by any amount.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamline_hooks import cli

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = (path for path in (ROOT / "docs").rglob("*.md") if not {"copied", "generated"} & set(path.parts))
PAGES = [ROOT / "README.md", *sorted(WRITTEN)]
BLOCK = re.compile(r"^(?:<!-- (output) -->\n+)?```(\w*)[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
MEASURED = re.compile(r"second|memory|\btime|\bms\b|\d s\b|GB|speed|tokens/s|prompt \d|versions", re.IGNORECASE)
LANGUAGES = {"python", "bash", "yaml", "toml", "text"}
ELSEWHERE = {"extension_packages.md": "tests/cli/test_installed_packages.py builds and installs the package"}


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Return the language (or "output") and the text of each block that names a language."""
    return [(output or language, text) for output, language, text in BLOCK.findall(page.read_text()) if language]


ENGINES = {
    "serve_llama_cpp.md": "xllamacpp",
    "serve_mlx.md": "mlx_lm",
    "serve_onnx.md": "onnxruntime",
    "serve_vllm.md": "vllm",
}
"""Pages that run in an environment of ``make engines`` with a package, and skip elsewhere."""
LONG = {"compress_and_heal.md", "quick_start.md", "serve.md", "several_processes.md"}
RUN = [
    pytest.param(page, marks=pytest.mark.long if page.name in LONG else (), id=str(page.relative_to(ROOT)))
    for page in PAGES
    if blocks_of(page) and page.name not in ELSEWHERE
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_name_a_language(page: Path) -> None:
    languages = [language for _, language, _ in BLOCK.findall(page.read_text())]
    assert set(languages) - {""} <= LANGUAGES


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_blocks_run(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if page.name in ENGINES:
        pytest.importorskip(ENGINES[page.name], reason="the engine is in an environment of `make engines` only")
    monkeypatch.chdir(tmp_path)
    if "smollm2" in page.read_text():
        use_loaded_model(monkeypatch, *request.getfixturevalue("smollm2"))
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for language, text in blocks_of(page):
        if language == "output":
            compare_output(text, printed)
            continue
        capsys.readouterr()
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
        elif language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                run_line(line, monkeypatch)
        elif language in ("yaml", "toml"):
            assert (yaml.safe_load if language == "yaml" else tomllib.loads)(text)
            if match := re.match(r"# (\S+\.(?:yaml|toml))\n", text):
                Path(match[1]).write_text(text)
        printed = capsys.readouterr().out


def compare_output(shown: str, printed: str) -> None:
    """Raise AssertionError unless a page shows what was printed; see the top of this file."""
    lines = [line for line in printed.splitlines() if line.strip()]
    position, skips = 0, False
    for line in filter(str.strip, shown.splitlines()):
        if line.strip() == "...":
            skips = True
            continue
        last = len(lines) if skips else position + 1
        match = next((k for k in range(position, last) if k < len(lines) and same_line(line, lines[k])), None)
        assert match is not None, f"the page shows {line!r}, but the block printed:\n{printed}"
        position, skips = match + 1, False
    assert skips or position == len(lines), f"the page does not show {lines[position:]}"


def same_line(shown: str, printed: str) -> bool:
    words, printed_words = (re.sub(r"[\s\u2500-]+", " ", NUMBER.sub("#", line)).strip() for line in (shown, printed))
    if words != printed_words:
        return False
    numbers, printed_numbers = (
        [float(number.replace(",", "")) for number in NUMBER.findall(line)] for line in (shown, printed)
    )
    return bool(MEASURED.search(shown)) or numbers == pytest.approx(printed_numbers, rel=0.02, abs=0.02)


def use_loaded_model(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any) -> None:
    """Let "smollm2" be a copy of the model that the session has loaded already, since loading takes long."""
    name = "streamline_hooks.checkpoint.pretrained.load_smollm2"
    monkeypatch.setattr(name, lambda dtype: (copy.deepcopy(model).to(dtype), tokenizer))


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[:2] == ["pip", "install"]:
        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = {extra for word in words for names in re.findall(r"\[(.+?)\]", word) for extra in names.split(",")}
        assert extras <= set(setup["options.extras_require"])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[0] == "streamline-hooks":
        monkeypatch.setattr(sys, "argv", words)
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code, line
    elif words[0] in ("torchrun", "python"):
        command = [sys.executable, *(["-m", "torch.distributed.run"] if words[0] == "torchrun" else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run([*command, *words[1:]], check=True, timeout=600, env=environment)
    else:
        raise AssertionError(f"the page shows a command that no test runs: {line}")


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 12_000


def test_llms_txt_lists_every_page() -> None:
    listed = set(re.findall(r"\]\(([^()]+)\.html\)", built_index()))
    expected = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES[1:]}
    assert listed == expected - {"changelog"}  # which includes a file, and has no text of its own


def built_index() -> str:
    names: dict[str, Any] = {"__file__": str(ROOT / "docs" / "conf.py")}
    exec((ROOT / "docs" / "conf.py").read_text().partition("\ncopy_pages()")[0], names)
    return str(names["index_for_models"](PAGES[1:]))


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1.00\n...\nc", "a 1.001\nb\nb\nc\n", True),
        ("a 1.00\n", "a 1.5\n", False),
        ("a 1\n", "a 1\nb\n", False),
        ("a 1\nb\n", "a 1\n", False),
        ("seconds, rank   1.5", "seconds, rank   99.1", True),
        ("seconds, rank   1.5", "seconds, fit    1.5", False),
        ("blocks 30 -> 26, removed 12-15", "blocks 30 -> 26, removed 14-17", False),
        ("ratio x 1.26", "ratio - 1.26", False),
    ],
)
def test_shown_output_is_compared(shown: str, printed: str, same: bool) -> None:
    if same:
        compare_output(shown, printed)
    else:
        with pytest.raises(AssertionError, match="the page"):
            compare_output(shown, printed)


def test_a_block_runs_that_follows_an_output(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n<!-- output -->\n```text\n1\n```\n\n```text\nshown\n```\n")
    assert blocks_of(page) == [("python", "print(1)\n"), ("output", "1\n"), ("text", "shown\n")]


def test_numbers_of_the_methods_are_those_of_their_pages() -> None:
    index = ROOT / "docs" / "methods" / "index.md"
    rows = [row.split(" | ") for row in index.read_text().splitlines() if row.startswith("| [")]
    assert len(rows) == len(list(index.parent.glob("*.md"))) - 1
    for name, *_, paper, ours in rows:
        page = re.search(r"\((\w+\.md)\)", name)
        assert page
        text = (index.parent / page[1]).read_text()
        cells = re.sub(r"\]\([^)]*\)", "]", f"{paper} {ours}")
        missing = [number for number in re.findall(r"\d[\d.,]*(?: ± \d+)?", cells) if number.strip(".,") not in text]
        assert not missing, f"{page[1]} does not have {missing}"
