"""Configuration of the documentation site (`make docs`)."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import streamline_hooks

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "streamline_hooks"
author = "The streamline_hooks authors"
copyright = f"2026, {author}"
version = release = streamline_hooks.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
]
exclude_patterns = ["README.md", "copied/options"]  # the pages include the options
templates_path = ["_templates"]
root_doc = "index"

html_theme = "furo"
html_title = f"streamline_hooks {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autosummary_generate = True
add_module_names = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False


def copy_pages() -> None:
    """Copy the notebooks and the tables of results, which stand elsewhere in the project."""
    for folder, pattern in (("notebooks", "*.ipynb"), ("benchmarks/results", "*.md")):
        target = DOCS / "copied" / Path(folder).name
        files = sorted((ROOT / folder).glob(pattern))
        for old in target.glob("*"):
            if old.name not in {file.name for file in files}:
                old.unlink()
        for file in files:
            text = file.read_text()
            if file.suffix == ".md":  # the tables have no title of their own
                title = (
                    file.stem.replace("_", " ")
                    .capitalize()
                    .replace("Smollm2", "SmolLM2")
                    .replace("opt", "OPT")
                )
                text = f"# {title}\n\n{text}"
            write(target / file.name, text)


def write(file: Path, text: str) -> None:
    """Write a file unless it has this text, because Sphinx reads a newer file again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def write_options() -> None:
    """Write the tables of options and the reference of the command line, which the pages include."""
    sys.path.insert(0, str(DOCS))
    import option_tables

    for name, text in option_tables.pages().items():
        write(DOCS / "copied" / "options" / f"{name}.md", text)


def error_messages() -> str:
    """Return a page with every message that the package raises, by sub-package, from its source."""
    lines = [
        "# List of messages",
        "",
        "Braces stand for a value. [Errors](../errors.md) explains the common ones.",
        "",
    ]
    for folder in sorted(
        path
        for path in (ROOT / "streamline_hooks").iterdir()
        if (path / "__init__.py").exists()
    ):
        messages = sorted(
            {
                message
                for file in folder.rglob("*.py")
                for message in messages_of(file.read_text())
            }
        )
        if messages:
            lines += [
                f"## {folder.name}",
                "",
                *(f"- {message}" for message in messages),
                "",
            ]
    return "\n".join(lines)


def messages_of(source: str) -> list[str]:
    errors = ("StreamlineError", "UnsupportedSurgery")
    messages = []
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") in errors
            and node.args
        ):
            text = template_of(node.args[0])
            if len(text) > 20:
                messages.append(
                    "`" + re.sub(r"\s+", " ", text.replace("`", "'")).strip() + "`"
                )
    return messages


def template_of(node: ast.expr) -> str:
    """Return a string expression as text, with `{name}` for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template_of(value) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        names = re.findall(r"[A-Za-z_]\w*", ast.unparse(node.value))
        return "{" + (names[-1] if names else "value") + "}"
    if isinstance(node, ast.BinOp):
        return template_of(node.left) + template_of(node.right)
    return "{...}"


def index_for_models(pages: list[Path]) -> str:
    """Return llms.txt: the title and the first sentence of each page (https://llmstxt.org)."""
    lines = [
        "# streamline_hooks",
        "",
        "> Find, remove and repair the transformer blocks that do least.",
        "",
    ]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        title = re.search(r"^# (.+)$", text, flags=re.MULTILINE)
        first = re.search(
            r"^(?![#!|:<`\-\s]).+?(?=\n\n|\Z)",
            text[title.end() :] if title else "",
            re.DOTALL | re.MULTILINE,
        )
        sentence = (
            re.split(r"(?<=[.:])\s", first[0].replace("\n", " "))[0] if first else ""
        )
        if title:
            lines.append(
                f"- [{title[1]}]({page.relative_to(DOCS).with_suffix('.html')}): {sentence}".rstrip(
                    ": "
                )
            )
    return "\n".join(lines) + "\n"


def link_copies(app: object, docname: str, source: list[str]) -> None:
    """Make links to tables of results and to notebooks, and links in notebooks, point to pages of the site.

    A notebook links to a page as ../docs/PAGE.md, which is right in the repository. Its copy is one folder deeper.
    """
    up = "../" * docname.count("/")
    pattern = r"\((?:\.\./)+benchmarks/results/([\w.-]+)\.md\)"
    source[0] = re.sub(pattern, rf"({up}copied/results/\1.md)", source[0])
    source[0] = re.sub(
        r"\((?:\.\./)+notebooks/(\w+)\.ipynb\)",
        rf"({up}copied/notebooks/\1)",
        source[0],
    )
    if docname.startswith("copied/notebooks/"):
        source[0] = source[0].replace("(../docs/", f"({up}")


def setup(app: Any) -> None:
    """Register the event handlers of this file."""
    app.connect("source-read", link_copies)


copy_pages()
write_options()
write(DOCS / "copied" / "messages.md", error_messages())
write(
    DOCS / "copied" / "llms.txt",
    index_for_models(
        sorted(page for page in DOCS.rglob("*.md") if "copied" not in page.parts)
    ),
)
html_extra_path = ["copied/llms.txt"]
