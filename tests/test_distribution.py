"""The archives are complete, the version stands in one place, and every extra that a text names exists."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

import streamline_hooks
from tests.processes import in_a_new_process

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg")
EXTRAS = set(SETTINGS["options.extras_require"])
# Written by tools, in a checkout or an unpacked archive.
GENERATED = (
    *(".git", ".venv*", "build", "dist", "htmlcov", "__pycache__", "*.py[cod]", "*.egg-info", "PKG-INFO", ".coverage*"),
    *(".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".ipynb_checkpoints", ".gitignore"),
    *("copied", "generated"),  # by docs/conf.py
)
INSTALL = re.compile(r"streamline[-_]hooks\[([a-z][\w, -]*)\]")
EXTRA = re.compile(r"\bextras? ``?([\w-]+)``?")
TEXTS = ("streamline_hooks/**/*.py", "streamline_hooks/**/*.jinja", "examples/**/*.py", "notebooks/*.ipynb", "*.md")
TEXTS += ("docs/*.md", "benchmarks/**/*.py", "pytest_streamline_hooks.py", "Makefile")


def named_extras(text: str) -> Iterator[str]:
    """Yield the extras that a text tells its reader to install."""
    for found in INSTALL.findall(text):
        yield from re.split(r"\s*,\s*", found)
    yield from EXTRA.findall(text)


def wrong_extras(root: Path) -> list[str]:
    """Return a line for each extra that a text of the project names and that does not exist."""
    files = sorted({file for pattern in TEXTS for file in root.glob(pattern)})
    return [
        f"{file.relative_to(root)}: {extra}"
        for file in files
        for extra in named_extras(file.read_text(encoding="utf-8"))
        if extra not in EXTRAS
    ]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str], set[str], str]:
    """The unpacked source archive, the names in it and in the wheel, and the wheel's metadata."""
    folder = tmp_path_factory.mktemp("distribution")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*GENERATED))
    code = "from setuptools import build_meta as b; b.build_sdist('../out'); b.build_wheel('../out')"
    build = subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "source", capture_output=True, text=True, check=False
    )
    assert build.returncode == 0, build.stderr
    (packed,) = (folder / "out").glob("*.tar.gz")
    (wheel,) = (folder / "out").glob("*.whl")
    with tarfile.open(packed) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        (metadata,) = (name for name in files if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked, names(unpacked), files, text


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def sources(tmp_path: Path) -> set[str]:
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*GENERATED))
    return names(tmp_path / "source")


def test_the_source_archive_has_every_file(archives: tuple[Path, set[str], set[str], str], tmp_path: Path) -> None:
    missing = sources(tmp_path) - archives[1]
    assert not missing, f"not in the source archive, see MANIFEST.in: {sorted(missing)[:20]}"


def test_the_wheel_has_the_package_and_nothing_else(
    archives: tuple[Path, set[str], set[str], str], tmp_path: Path
) -> None:
    package = {name for name in sources(tmp_path) if name.startswith(("streamline_hooks/", "pytest_streamline_hooks"))}
    assert {name for name in archives[2] if ".dist-info/" not in name} == package
    assert any(name.endswith("licenses/LICENSE") for name in archives[2])


def test_the_version_stands_in_one_place(archives: tuple[Path, set[str], set[str], str]) -> None:
    metadata = Parser().parsestr(archives[3])
    assert metadata["Version"] == streamline_hooks.__version__
    assert archives[0].name == f"streamline_hooks-{streamline_hooks.__version__}"
    assert SETTINGS["metadata"]["version"] == "attr: streamline_hooks.__version__"
    written = re.compile(rf"(?<![\d.]){re.escape(streamline_hooks.__version__)}(?![\d.])")
    places = ("pyproject.toml", "setup.cfg", "CITATION.cff", "Makefile", "README.md")
    assert not [name for name in places if written.search((ROOT / name).read_text(encoding="utf-8"))]


def test_the_metadata_has_the_extras_and_links(archives: tuple[Path, set[str], set[str], str]) -> None:
    metadata = Parser().parsestr(archives[3])
    assert set(metadata.get_all("Provides-Extra", ())) == EXTRAS
    assert any("https://arxiv.org/abs/2403.19135" in link for link in metadata.get_all("Project-URL", ()))


def test_every_extra_that_is_named_exists() -> None:
    assert not wrong_extras(ROOT)
    package = "".join(file.read_text() for file in (ROOT / "streamline_hooks").rglob("*.py"))
    assert {"datasets", "gguf", "report", "tasks"} <= set(named_extras(package)), "the patterns find what is there"


def test_an_extra_that_does_not_exist_is_found(tmp_path: Path) -> None:
    (tmp_path / "streamline_hooks").mkdir()
    (tmp_path / "streamline_hooks" / "a.py").write_text("'pip install \"streamline_hooks[plots,report]\"'")
    (tmp_path / "README.md").write_text("It needs the extra `vision`: pip install 'streamline-hooks[tasks]'.")
    assert wrong_extras(tmp_path) == ["README.md: vision", "streamline_hooks/a.py: plots"]


def test_the_readme_lists_every_extra() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Installation")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert sorted(listed) == sorted(EXTRAS)


def test_a_plain_installation_inspects_ranks_compresses_and_generates(stories_folder: Path, tmp_path: Path) -> None:
    """In a process in which nothing can be imported that only an extra installs."""
    from pydoc_data.topics import topics

    (tmp_path / "text.txt").write_text("\n\n\n".join(text for _, text in sorted(topics.items())[:30]))
    (tmp_path / "text.parquet").touch()
    code = """
        import contextlib, io, sys
        optional = "datasets pyarrow pandas PIL zstandard matplotlib gguf lm_eval peft trl onnx onnxscript bitsandbytes"
        optional += " scipy sklearn hypothesis pytest lightning sentence_transformers timm torchvision"
        sys.modules |= dict.fromkeys(optional.split())
        from streamline_hooks.cli import main
        model, folder = sys.argv[1:]

        def run(*words):
            sys.argv = ["streamline-hooks", *words]
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    main()
                    code = 0
                except SystemExit as end:
                    code = end.code or 0
            return code, out.getvalue()

        text, small = f"{folder}/text.txt", f"{folder}/small"
        few = "--sequence-length 64 --calibration-tokens 3200".split()
        some = [*few, "--validation-tokens", "320", "--test-tokens", "320"]
        for words, expected in (
            (["inspect", model], "5 x LlamaDecoderLayer"),
            (["rank", model, "--calibration", text, *few], "cosine"),
            (["compress", model, "--calibration", text, "--remove", "1", "--output", small, *some], "[report]"),
            (["generate", small, "Once upon a time", "--max-new-tokens", "4"], "Once upon a time"),
        ):
            code, out = run(*words)
            assert code == 0 and expected in out, (words, out)
        for words, extra in (
            (["rank", model, "--calibration", f"{folder}/text.parquet"], "datasets"),
            (["inspect", "smollm2"], "gguf"),
            (["export", small, "--to", "onnx", "--output", f"{folder}/a.onnx"], "onnx"),
        ):
            code, out = run(*words)
            assert code == 2 and f'pip install "streamline_hooks[{extra}]"' in out, (words, out)
        print("all of it works")
    """
    done = in_a_new_process(code, stories_folder, tmp_path, check=False)
    assert done.stdout.strip().endswith("all of it works"), done.stderr[-3000:]
