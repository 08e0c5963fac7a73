"""Checkpoints are known whichever way, and in whichever order, things are imported; and importing is cheap."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from streamline_hooks import save
from streamline_hooks.core.import_hook import after_import
from tests.processes import in_a_new_process
from tests.tiny_models import repaired

ORDERS = {
    "library first": "import streamline_hooks\nfrom transformers import AutoModelForCausalLM",
    "library last": "from transformers import AutoModelForCausalLM, AutoConfig\nAutoConfig\nimport streamline_hooks",
    "imported twice": "import streamline_hooks, importlib\nimportlib.reload(streamline_hooks)\n"
    "from transformers import AutoModelForCausalLM",
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_imports_loads(order: str, tmp_path: Path) -> None:
    save(repaired("llama"), tmp_path / "model")
    code = ORDERS[order] + "\nimport sys\nprint(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    assert in_a_new_process(code, tmp_path / "model").stdout.strip().endswith("StreamlinedLlamaForCausalLM")


def test_a_function_runs_once_and_leaves_no_finder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_later.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    finders, values = list(sys.meta_path), []
    for _ in range(2):
        after_import("imported_later", lambda module: values.append(module.value))
        assert len(sys.meta_path) == len(finders) + 1 and "imported_later" not in sys.modules
    assert importlib.util.find_spec("imported_later"), "somebody asks whether it is there, and does not import it"
    assert values == []
    importlib.import_module("imported_later")
    assert values == [3] and sys.meta_path == finders
    after_import("imported_later", lambda module: values.append(module.value + 1))
    assert values == [3, 4] and sys.meta_path == finders
    monkeypatch.delitem(sys.modules, "imported_later")


def test_importing_brings_in_no_table_of_classes() -> None:
    """They take longer to import than all of this library."""
    code = """
        import sys, torch, transformers
        before = set(sys.modules)
        import streamline_hooks
        new = {m for m in set(sys.modules) - before if not m.startswith("streamline_hooks")}
        assert not [m for m in new if m.startswith("transformers.models")], new
        assert not {"datasets", "matplotlib", "accelerate", "gguf", "torch._dynamo"} & new, new
        print("light")
    """
    assert in_a_new_process(code).stdout.strip() == "light"
