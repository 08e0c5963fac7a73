"""Every fenced block of README and docs runs as shown, in order, in one namespace and one folder per page.

- ``python`` runs.
- ``bash`` runs line by line: `streamline-hooks` through its command line, `torchrun` in new processes. Of `pip install`
  the extras are checked, of `make` the target.
- ``yaml`` and ``toml`` are written to the file that the comment in their first line names; others are parsed.
- ``text`` shows an output or a command line that the page explains.
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
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "bash", "yaml", "toml", "text"}
ELSEWHERE = {"extension_packages.md": "tests/cli/test_installed_packages.py builds and installs the package"}


def blocks_of(page: Path) -> list[tuple[str, str]]:
    return [(language, text) for language, text in BLOCK.findall(page.read_text()) if language != ""]


RUN = [page for page in PAGES if blocks_of(page) and page.name not in ELSEWHERE]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_name_a_language(page: Path) -> None:
    languages = [language for language, _ in BLOCK.findall(page.read_text())]
    assert set(languages) - {""} <= LANGUAGES


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if "smollm2" in page.read_text():
        use_loaded_model(monkeypatch, *request.getfixturevalue("smollm2"))
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, text in blocks_of(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
        elif language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                run_line(line, monkeypatch)
        elif language in ("yaml", "toml"):
            assert (yaml.safe_load if language == "yaml" else tomllib.loads)(text)
            if match := re.match(r"# (\S+\.(?:yaml|toml))\n", text):
                Path(match[1]).write_text(text)


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
