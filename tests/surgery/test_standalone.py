"""The code in a checkpoint's folder reads it where the library is not installed, and only where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, save
from streamline_hooks.cli import parse_replacement
from streamline_hooks.modeling import find_stack
from streamline_hooks.replacements import REGISTERED, NormedLinearReplacement, is_own, register_module
from streamline_hooks.surgery import standalone
from streamline_hooks.surgery.spliced_model import CODE
from tests.processes import in_a_new_process
from tests.tiny_models import FAMILIES, WIDTH, Nudge, tiny_model, tokens

KINDS = ("linear", "linear:rank=4", "linear:diagonal", "normed_linear", "mlp", "swiglu", "feed_forward")
CASES = [(FAMILIES[0], kind) for kind in KINDS] + [(family, "swiglu") for family in FAMILIES[1:]]
ABSENT = """
    import os, sys
    sys.modules["streamline_hooks"] = None
    folder = sys.argv[1]
    os.environ["HF_MODULES_CACHE"] = folder + "/cache"
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    ids = torch.load(folder + "/ids.pt")
    asked = {"trust_remote_code": True}
"""


OWN = {kind for kind in REGISTERED if is_own(kind)}


def spliced(family: str, kind: str) -> nn.Module:
    """A model with a module of a kind in the place of two blocks, no weight of it zero."""
    model = tiny_model(family)
    with LayerSurgeon(model) as surgeon:
        if kind == "normed_linear":
            module: nn.Module = NormedLinearReplacement(WIDTH)
        else:
            module = parse_replacement(kind).build(find_stack(model), range(1, 3))
        for seed, parameter in enumerate(module.parameters()):
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
        surgeon.replace(range(1, 3), module)
        surgeon.commit()
    return model


def written(model: nn.Module, folder: Path) -> torch.Tensor:
    """Save a model, its input and its logits, which are returned."""
    save(model, folder / "model")
    torch.save(tokens(2, 9), folder / "ids.pt")
    with torch.no_grad():
        logits = model(tokens(2, 9)).logits
    torch.save(logits, folder / "logits.pt")
    return logits


def test_every_kind_and_family_is_read_and_written_again_without_the_library(tmp_path: Path) -> None:
    """In one process, where models of one architecture share the class that the code makes."""
    logits = {}
    for family, kind in CASES:
        folder = tmp_path / f"{family}-{kind}".translate(str.maketrans(":=", "--"))
        logits[folder] = written(spliced(family, kind), folder)
    torch.save(tokens(2, 9), tmp_path / "ids.pt")
    code = (
        ABSENT
        + """
    for case in sys.argv[2:]:
        model = AutoModelForCausalLM.from_pretrained(case + "/model", **asked)
        assert torch.equal(model(ids).logits, torch.load(case + "/logits.pt")), case
        how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        with_cache, without = (model.generate(ids, use_cache=c, **how) for c in (True, False))
        assert torch.equal(with_cache, without), case
        if model.base_model is not model:  # before Transformers 5 Gemma 3 names none, and AutoModel finds no weight
            base = AutoModel.from_pretrained(case + "/model", **asked)
            assert torch.equal(base(ids)[0], model.base_model(ids)[0]), case
        model.save_pretrained(case + "/again")
    print("same")
    """
    )
    assert in_a_new_process(code, tmp_path, *logits).stdout.strip().endswith("same")
    for folder, expected in logits.items():
        again = AutoModelForCausalLM.from_pretrained(folder / "again")
        assert type(again).__module__ == "streamline_hooks.surgery.spliced_model"
        with torch.no_grad():
            assert torch.equal(again(tokens(2, 9)).logits, expected), folder.name
        first, second = (folder / each / f"{CODE}.py" for each in ("model", "again"))
        assert first.read_text() == second.read_text()


def test_every_registered_module_is_among_the_kinds() -> None:
    """A module that the copied code lacks would be noticed only by whoever loads the checkpoint without the library."""
    assert {kind.partition(":")[0] for kind in KINDS} == OWN


@pytest.mark.long
def test_nothing_of_the_folder_is_run_unasked(tmp_path: Path) -> None:
    written(spliced(FAMILIES[0], "swiglu"), tmp_path)
    trap = tmp_path / "model" / f"{CODE}.py"
    trap.write_text(trap.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    code = (
        ABSENT
        + """
    try:
        AutoModelForCausalLM.from_pretrained(folder + "/model")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
        print("refused")
    """
    )
    assert in_a_new_process(code, tmp_path).stdout.strip().endswith("refused")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "ran").exists(), "the code was run though nobody asked for it"
    in_a_new_process(
        ABSENT
        + """
    AutoModelForCausalLM.from_pretrained(folder + "/model", **asked)
    """,
        tmp_path,
    )
    assert (tmp_path / "ran").exists(), "the trap sees nothing"


def test_where_the_library_is_there_its_own_code_runs(tmp_path: Path) -> None:
    logits = written(spliced(FAMILIES[0], "swiglu"), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    if int(transformers.__version__.split(".")[0]) >= 5:  # before, what was asked for came first
        assert type(loaded).__module__ == "streamline_hooks.surgery.spliced_model"
    with torch.no_grad():
        assert torch.equal(loaded(tokens(2, 9)).logits, logits)


def test_what_is_somebody_elses_or_plain_has_no_such_file(tmp_path: Path) -> None:
    @register_module("standalone-nudge")
    class Own(Nudge):
        def to_config(self) -> dict[str, int]:
            return {}

    model = spliced(FAMILIES[0], "swiglu")
    save(model, tmp_path / "spliced")
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(2, Own())
        surgeon.commit()
    save(model, tmp_path / "own")
    plain = tiny_model(FAMILIES[0])
    with LayerSurgeon(plain) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    save(plain, tmp_path / "plain")
    there = {name: (tmp_path / name / f"{CODE}.py").exists() for name in ("spliced", "own", "plain")}
    assert there == {"spliced": True, "own": False, "plain": False}
    for name in ("own", "plain"):
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())


def test_a_splice_that_goes_takes_its_code_with_it(tmp_path: Path) -> None:
    """A plain model must not send its reader to a class that it no longer has."""
    save(spliced(FAMILIES[0], "swiglu"), tmp_path / "spliced")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "spliced")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(3))  # with the blocks on both of its sides
        surgeon.commit()
    save(model, tmp_path / "plain")
    said = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "auto_map" not in said and said["model_type"] != "streamline_hooks"


def test_every_kind_of_the_library_is_in_it() -> None:
    own = {cls.__module__ for kind, cls in REGISTERED.items() if is_own(kind)}
    assert own <= {f"streamline_hooks.{module}" for module in standalone.standalone_modules()}


def test_a_module_that_is_missing_and_a_name_that_is_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standalone, "standalone_modules", lambda: ("modeling.hidden_state",))
    with pytest.raises(
        StreamlineError, match=r"modeling\.hidden_state needs StreamlineError of streamline_hooks\.core"
    ):
        standalone.standalone_code()
    modules = ("core.errors", "replacements.registry", "distillation.losses", "core.devices")
    monkeypatch.setattr(standalone, "standalone_modules", lambda: modules)
    monkeypatch.setattr(standalone, "foreign_imports", lambda node, module, defined: iter(()))
    names = standalone.defined_names
    monkeypatch.setattr(
        standalone, "defined_names", lambda node: (name.replace("to_float64", "Objective") for name in names(node))
    )
    with pytest.raises(StreamlineError, match=r"Objective.*distillation.losses.*core.devices"):
        standalone.standalone_code()
