"""The package of docs/extension_packages.md, installed and used from Python and from the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from streamline_hooks.checkpoint import read_plans
from tests.golden import inputs
from tests.installed_package import install_package
from tests.processes import ROOT

PAGE = (ROOT / "docs" / "extension_packages.md").read_text()
PROJECT, CODE = (re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)[0] for kind in ("toml", "python"))
ENTRY_POINTS = tomllib.loads(PROJECT)["project"]["entry-points"]


@pytest.fixture(scope="module")
def plug(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_package(
        tmp_path_factory.mktemp("site"), "streamline-plug", f"print('imported', __name__)\n{CODE}", ENTRY_POINTS
    )


def python(*arguments: Any, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with a folder of installed packages."""
    path = os.pathsep.join(map(str, filter(None, [site, ROOT])))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


def command(*arguments: Any, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python("-c", "from streamline_hooks.cli import main; main()", *arguments, site=site)


@pytest.mark.long
@pytest.mark.slow
def test_the_blocks_of_the_page_run_as_shown(plug: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    packages = os.pathsep.join(map(str, [plug, ROOT]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    blocks = re.findall(r"```(python|bash)\n(.*?)```", PAGE, flags=re.DOTALL)[1:]  # the first is the package
    assert [kind for kind, _ in blocks] == ["python", "bash", "python"]
    for kind, block in blocks:
        words = [sys.executable, "-c", block] if kind == "python" else ["bash", "-ec", block]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
    assert read_plans(tmp_path / "my-model-small")[0].removed == (0, 1)


@pytest.mark.long
@pytest.mark.slow
def test_from_the_command_line_and_back_in_python(plug: Path, tmp_path: Path) -> None:
    model, text, out = inputs.write_model("llama", tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out"
    inputs.write_documents(text)
    sizes = ["--calibration-tokens", 800, "--validation-tokens", 200, "--test-tokens", 200, "--sequence-length", 16]
    mine = ["--criterion", "earliest", "--repair", "plug-shift", "--shortlist", 1]
    done = command("compress", model, "-o", out, "--remove", 2, "-c", text, *sizes, *mine, site=plug)
    assert done.returncode == 0, done.stderr
    code = """
        import sys
        from streamline_hooks import CompressionConfig, load
        assert "streamline_plug" not in sys.modules
        config = CompressionConfig.load(sys.argv[1])
        assert (config.repair.kind, config.search.criterion) == ("plug-shift", "earliest"), config
        model = load(sys.argv[1])
        assert [type(m).__name__ for m in model.modules() if "streamline_plug" in type(m).__module__] == ["Shift"]
        from streamline_hooks.checkpoint import read_plans
        assert read_plans(sys.argv[1])[0].removed == (0, 1), read_plans(sys.argv[1])[0].removed
    """
    loaded = python("-c", "\n".join(line.strip() for line in code.splitlines()), out, site=plug)
    assert loaded.returncode == 0, loaded.stderr
    plain = """
        import sys, streamline_hooks
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        assert any(type(m).__name__ == "Shift" for m in model.modules())
    """
    loaded = python("-c", "\n".join(line.strip() for line in plain.splitlines()), out, site=plug)
    assert loaded.returncode == 0, loaded.stderr
    without = python("-c", "\n".join(line.strip() for line in plain.splitlines()), out)
    assert without.returncode == 1 and "'plug-shift' is unknown" in without.stderr


@pytest.mark.slow
def test_a_stack_finder_of_a_package(plug: Path, tmp_path: Path) -> None:
    model = inputs.write_model("bart", tmp_path / "model")
    inspected = command("inspect", model, site=plug)
    assert inspected.returncode == 0, inspected.stderr
    assert "model.encoder.layers" in inspected.stdout and "model.decoder.layers" not in inspected.stdout
    code = (
        "import sys; from transformers import AutoModel; from streamline_hooks import LayerSurgeon, find_stack\n"
        "model = AutoModel.from_pretrained(sys.argv[1])\n"
        "count = len(find_stack(model))\n"
        "assert find_stack(model).path == 'encoder.layers', find_stack(model)\n"
        "with LayerSurgeon(model) as surgeon:\n"
        "    surgeon.remove(range(1, 2)); surgeon.commit()\n"
        "assert len(find_stack(model)) == len(model.encoder.layers) == model.config.encoder_layers == count - 1"
    )
    done = python("-c", code, model, site=plug)
    assert done.returncode == 0, done.stderr


def test_nothing_is_imported_with_the_library(plug: Path) -> None:
    code = (
        "import importlib, pkgutil, streamline_hooks\n"
        "for module in pkgutil.walk_packages(streamline_hooks.__path__, 'streamline_hooks.'):\n"
        "    module.name.endswith('__main__') or importlib.import_module(module.name)\n"
        "from streamline_hooks import *\n"
        "from streamline_hooks.selection import CRITERIA\n"
        "CompressionConfig.preset('best'); CompressionConfig.from_yaml(CompressionConfig().to_yaml())\n"
        "print('before'); len(CRITERIA); print('after')\n"
    )
    done = python("-c", code, site=plug)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["before", "imported streamline_plug", "after"]


@pytest.mark.long
def test_a_broken_package_and_one_that_takes_a_name(tmp_path: Path) -> None:
    groups = ("criteria", "replacements", "searches", "losses", "stack_finders")
    broken = {f"streamline_hooks.{group}": {"broken": "broken_plug:thing"} for group in groups}
    install_package(tmp_path, "broken-plug", "raise ImportError('libmissing.so')", broken)
    code = """
        from streamline_hooks.selection import Criterion
        cosine = Criterion("cosine", lambda profile, window: 0.0, "profile")
    """
    install_package(tmp_path, "taking-plug", code, {"streamline_hooks.criteria": {"cosine": "taking_plug:cosine"}})
    model = inputs.write_model("llama", tmp_path / "model")
    inputs.write_documents(tmp_path / "text.txt")
    given = ["rank", model, "-c", tmp_path / "text.txt", "--calibration-tokens", 400, "--sequence-length", 16]
    ranked = command(*given, site=tmp_path)
    assert ranked.returncode == 0, ranked.stderr
    listed = (
        "from streamline_hooks.distillation import LOSSES\n"
        "from streamline_hooks.repair import REPLACEMENTS\n"
        "from streamline_hooks.selection import CRITERIA, SEARCHES\n"
        "from streamline_hooks.modeling import STACK_FINDERS\n"
        "for registry in (CRITERIA, LOSSES, REPLACEMENTS, SEARCHES, STACK_FINDERS): assert 'broken' not in registry\n"
        "assert CRITERIA['cosine'].score.__module__.startswith('streamline_hooks.')\n"
    )
    done = python("-c", listed, site=tmp_path)
    assert done.returncode == 0, done.stderr
    for what in ("criterion", "loss", "replacement", "search", "stack finder"):
        assert f"The {what} 'broken' of the installed package broken-plug 1.0 (broken_plug:thing)" in done.stderr
    assert done.stderr.count("raised ImportError: libmissing.so. Update or uninstall broken-plug") == 5
    assert "'cosine' of the installed package taking-plug 1.0" in done.stderr
    assert "The criterion 'cosine' is already registered" in done.stderr and done.stderr.count("UserWarning") == 6
