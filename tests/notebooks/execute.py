"""Execute the notebooks and store their outputs: python -m tests.notebooks.execute [NAME ...] (`make notebooks`)."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
KEY = "streamline_hooks"
"""Name of this project's entry in the metadata of a notebook."""

LARGEST_FIGURE = 100_000
LARGEST_NOTEBOOK = 400_000
PATHS = re.compile(r"(?<![\w./])/(?:home|root|tmp|work|opt|usr|var|Users|private)/[^\s'\"]*")


def main(names: list[str]) -> int:
    paths = sorted(path for path in FOLDER.glob("*.ipynb") if not names or path.stem in names)
    if missing := set(names) - {path.stem for path in paths}:
        sys.exit(f"There is no notebook {', '.join(sorted(missing))} in {FOLDER}. See: ls notebooks")
    failed = False
    for path in paths:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        seconds, text = time.perf_counter() - start, as_text(notebook)
        problems = list(check(text))
        print(f"{path.name}: {seconds:.0f} s, {len(text) / 1e3:.0f} kB")
        print(*(f"  {problem}" for problem in problems), sep="\n", end="\n" if problems else "")
        failed = failed or bool(problems)
        if not problems:
            path.write_text(text, encoding="utf-8")
    return int(failed)


def execute(path: Path, folder: Path) -> Any:
    """Run a notebook in an empty folder, without a network, and return it with its outputs."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(folder / ".ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, where ipywidgets is not installed
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", record_timing=False, resources={"metadata": {"path": folder}}
    )
    client.execute(env=environment)
    return notebook


def as_text(notebook: Any) -> str:
    """Return an executed notebook as JSON, without metadata that depend on the machine, and with the sources' hash."""
    import nbformat

    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            KEY: {"sources_sha256": hash_of_sources(notebook)},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = number
        cell.outputs = merge_streams(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    nbformat.validate(notebook)
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def merge_streams(outputs: list[Any]) -> list[Any]:
    """Merge consecutive parts of a stream; into how many it is divided depends on the time."""
    merged: list[Any] = []
    for output in outputs:
        if merged and "name" in output and output["name"] == merged[-1].get("name"):
            merged[-1]["text"] += output["text"]
        else:
            merged.append(output)
    return merged


def hash_of_sources(notebook: Any) -> str:
    """Return a hash of the sources of the code cells, in their order."""
    sources = [joined(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def joined(text: str | list[str]) -> str:
    """Return a text of a notebook file, which may be a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def check(text: str) -> Iterator[str]:
    """Yield a line for each reason why the documentation should not show a stored notebook."""
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    if not outputs:
        yield "has no outputs"
    elif notebook["metadata"].get(KEY, {}).get("sources_sha256") != hash_of_sources(notebook):
        yield "a code cell was changed after the execution"
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        yield "the execution counts are not 1, 2, 3, ..."
    if len(text) > LARGEST_NOTEBOOK:
        yield f"has {len(text) / 1e3:.0f} kB, more than {LARGEST_NOTEBOOK / 1e3:.0f}"
    figures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    if not figures:
        yield "has no figure"
    for figure in figures:
        if len(joined(figure)) * 3 / 4 > LARGEST_FIGURE:
            yield f"a figure has more than {LARGEST_FIGURE / 1e3:.0f} kB"
    for output in outputs:
        if output["output_type"] == "error":
            yield f"an error: {output['ename']}: {output['evalue']}"
        if output.get("name") == "stderr":
            yield f"a warning or progress bar: {joined(output['text'])[:200]!r}"
        printed = joined(output.get("text", output.get("data", {}).get("text/plain", "")))
        yield from (f"a memory address: {address}" for address in re.findall(r"\b0x[0-9a-f]{6,}", printed))
        yield from (f"a path of this machine: {path}" for path in PATHS.findall(printed))
        if re.search(r"\b(nan|inf)\b", printed):
            yield f"a number that is not finite: {printed[:200]!r}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks.execute", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 2_what_blocks_do; by default all")
    sys.exit(main(parser.parse_args().names))
