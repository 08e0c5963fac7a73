"""Check the language of the package: python -m tests.language [PATH ...] (`make lint`).

1. The first line of a docstring has at most 20 words and does not begin with What, Of or How, nor with Whether unless
   the function returns a bool.
2. Docstrings, comments, messages and names contain none of `WORDS` and `NAMES`: words that this project once used in a
   sense of its own. What to write instead is their value. They and the pages of docs use American spelling.
3. A function or class that a page of docs/reference lists, and that has two or more parameters, documents its
   parameters, what it raises (if it does) and an example.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 20

WORDS = {
    r"stand-ins?\b|\bstands? in (its|their|the|a) place": "replacement",
    r"\b(held|holds?) (it |them |each )?against\b": "compared with",
    r"\btruth\b": "reference",
    r"(?<![\"'`])\bbeside\b(?![\"'`])": "with, next to, in addition to",  # "beside" is a stored value of HealingConfig
    r"\b(is|are|was|were|what|be) said\b|\bsays? what\b|\bwhat .{1,30} says\b": "logits, output; states, reports",
    r"\btells?\b|\btold\b": "reports, returns; shows",
    r"\b(goes|gone|went)\b(?! (through|to|into|from|over|beyond|below|above|up|down|back))": "removed",
    r"\b(give|gives|given|gave) up\b": "remove; stop",
    r"\bwiden(s|ed|ing)?\b": "upcast, float64",
    r"\b[Oo]f several processes\b": "in a distributed run; rank",
    r"\b[Aa] training(?= ?([.,;:)]|(is|was|that|of|whose|which|has|on|for|with|in|by|to|from|and|or|can|may)\b))": (
        "a training run"
    ),
    r"\bsilent\b": "zero-output",
    r"\brooms?\b|\bhouse\b": "sub-package; memory",
    r"\b[Ss]omebody('s)?\b|\bone's own\b": "name the person or the object",
    r"\bin the place of\b": "instead of",
    r"\bthat is none\b|\bwhat is none\b": "name the object",
    r"\bputs? in\b": "insert, replace by",
    r"\bnothing said\b|\bby itself says\b": "name the object",
    r"\b[Ss]ilenc(e|es|ing)\b|\b(be|is|are|was|were|a|the) silenced\b|\bsilenced (branch|attention|block)": "zero",
    r"\bin vain\b": "without effect",
    r"\b[Bb]locks \{[^}]*\} to \{[^}]* - 1\}": "describe_blocks(window)",
}
"""Patterns of phrases, and the standard term for each."""

BRITISH = re.compile(
    r"(?<![A-Za-z])(?!optimiser\.[{\"])"
    r"((\w*(categor|custom|final|general|initial|linear|local|material|maxim|minim|normal|optim|organ|parallel|"
    r"penal|quant|random|recogn|regular|serial|special|standard|summar|synchron|token|util|visual))is(e|ed|es|er|ers|ing|"
    r"ation)|analys(ed|ing)|\w*(behavi|col|fav|flav|hon|neighb)our\w*|centred?|centres|(un)?labell(ed|ing)|"
    r"modell(ed|ing)|cancell(ed|ing)|artefacts?|grey|judgement|licence)(?![A-Za-z])",
    re.IGNORECASE,
)
"""British spellings; ``"optimiser."`` is the prefix of a key in training files."""

NAMES = {
    **dict.fromkeys(("found", "given", "made", "told", "said", "asked", "one", "its", "held"), "a noun with its type"),
    **dict.fromkeys(("truth", "against_truth", "held_to_truth"), "reference, compare_with_reference"),
    **dict.fromkeys(("taps", "tap"), "branch_hooks, tensor_site"),
    **dict.fromkeys(("beside", "company"), "parallel, partners"),
    **dict.fromkeys(("room", "journey", "residence"), "memory_budget, block_range, block_loading"),
    **dict.fromkeys(("course", "redraw", "peculiarities"), "schedule, random_init, config_rules"),
    **dict.fromkeys(("carrying_out", "carry_out", "puts_in"), "apply, has_replacement"),
    **dict.fromkeys(("given_up", "gone", "went"), "removed"),
    **dict.fromkeys(("likeness", "speaks_alike", "computes_alike"), "similarity, logits_allclose"),
    **dict.fromkeys(("following_tokens", "uncounted"), "shift_labels, IGNORE_INDEX"),
    **dict.fromkeys(("dealing", "deal_parts", "dealt"), "splitting, shards"),
    **dict.fromkeys(("say", "saying"), "log"),
    **dict.fromkeys(("place", "places"), "position, boundary, num_boundaries"),
    **dict.fromkeys(("put_in", "put_back"), "apply, restore"),
    **dict.fromkeys(("silence", "silenced", "silent", "silences_branches"), "zero_branch, zeroed"),
    **dict.fromkeys(("settle", "in_vain", "more_than", "leave_out", "let_run"), "say what the function does"),
}
"""Identifiers, in any case and with leading underscores, and what to use instead."""

PROMPTS = ("PROMPT_FORMS", "PROMPT_TOPICS")
"""Constants whose strings are prompts for a model; their words are data and are not checked."""


def main(paths: list[str]) -> int:
    files = sorted(
        {file for path in paths for file in ([Path(path)] if path.endswith(".py") else Path(path).rglob("*.py"))}
    )
    problems = [f"{file}:{line}: {problem}" for file in files for line, problem in check_source(file.read_text())]
    if paths == ["streamline_hooks"]:
        problems += [
            problem for page in sorted((ROOT / "docs" / "reference").glob("*.md")) for problem in check_page(page)
        ]
        problems += [
            f"{page.relative_to(ROOT)}:{number}: {match.group()!r}: write the American spelling"
            for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
            if not {"copied", "generated"} & set(page.parts)  # written by docs/conf.py
            for number, line in enumerate(page.read_text().splitlines(), 1)
            for match in BRITISH.finditer(line)
        ]
    print(*problems, sep="\n", end="\n" if problems else "")
    return int(bool(problems))


def check_source(source: str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(source)
    yield from first_lines(tree)
    assignments = (node for node in tree.body if isinstance(node, ast.Assign))
    prompts = [node for node in assignments if ast.unparse(node.targets[0]) in PROMPTS]
    lines = {line for node in prompts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.start[0] in lines:
            continue
        if token.type in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            for pattern, term in WORDS.items():
                for match in re.finditer(pattern, token.string):
                    line = token.start[0] + token.string.count("\n", 0, match.start())
                    yield line, f"{match.group()!r}: write {term}"
            for match in BRITISH.finditer(token.string):
                line = token.start[0] + token.string.count("\n", 0, match.start())
                yield line, f"{match.group()!r}: write the American spelling"
    for node in ast.walk(tree):
        name = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else getattr(node, "arg", None)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = node.name
        plain = name.lstrip("_").lower() if isinstance(name, str) and not isinstance(node, ast.keyword) else ""
        if plain in NAMES:
            yield node.lineno, f"the name {name}: use {NAMES[plain]}"  # type: ignore[attr-defined]


def first_lines(tree: ast.Module) -> Iterator[tuple[int, str]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in (node for node in ast.walk(tree) if isinstance(node, kinds)):
        line = (ast.get_docstring(node) or "").split("\n")[0]
        where, words = getattr(node, "lineno", 1), line.split()
        if len(words) > LONGEST:
            yield where, f"the first line of the docstring has {len(words)} words, at most {LONGEST} are allowed"
        returns = getattr(node, "returns", None)
        predicate = returns is not None and ast.unparse(returns).startswith(("bool", "TypeGuard", "Tensor"))
        first = words[0] if words else ""
        if first in ("What", "Of", "How", "Which", "That", "Where", "When") or (first == "Whether" and not predicate):
            yield where, f"the docstring begins with {first}: begin with an imperative, or name the object"


def check_page(page: Path) -> Iterator[str]:
    """Check the objects that the autosummary tables of a page list."""
    module = None
    for line in page.read_text().splitlines():
        if match := re.match(r"\s*\.\. currentmodule:: (\S+)", line):
            module = importlib.import_module(match[1])
        elif module is not None and (match := re.match(r"\s{3,}([A-Za-z_]\w*)$", line)):
            yield from (f"{page.relative_to(ROOT)}: {match[1]}: {p}" for p in undocumented(getattr(module, match[1])))


def undocumented(thing: object) -> Iterator[str]:
    if not (inspect.isfunction(thing) or inspect.isclass(thing)):
        return
    try:
        count = len(inspect.signature(thing).parameters)
    except ValueError:
        return
    text = inspect.getdoc(thing) or ""
    if count >= 2:
        for section in ("Parameters", "Examples"):
            if f"{section}\n---" not in text and not (section == "Parameters" and "Attributes\n---" in text):
                yield f"has {count} parameters and no section {section}"
        if inspect.isfunction(thing) and "raise " in inspect.getsource(thing) and "Raises\n---" not in text:
            yield "raises, and has no section Raises"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["streamline_hooks"]))
