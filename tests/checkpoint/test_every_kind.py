"""Every kind on every family, saved in every way, comes back in a process that has seen nothing of this one.

Kinds that leave a plain model come back where this library cannot even be imported. Two processes read all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, fit_windows, save
from streamline_hooks.cli import parse_replacement
from streamline_hooks.repair import insert_replacement
from tests.processes import in_a_new_process
from tests.tiny_models import FAMILIES, left_padded, tiny_model, tokens

pytestmark = pytest.mark.long

WINDOW = range(2, 4)
PLAIN = ("none", "block", "silenced", "folded", "scale")
SPLICED = ("linear", "linear:rank=4", "linear:diagonal", "mlp", "swiglu:width=16")
HOW = ("save", "save_pretrained", "Trainer")
ALL_WAYS = ("llama", "gpt2")
"""Families of which each kind is saved in all three ways; the others are saved in the first."""

MIXTRAL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128,
}  # fmt: skip
REFUSED = {
    ("gemma3", "folded"): "more than a sum",
    ("gemma3", "scale"): "cannot be multiplied",
}
"""What a family does not allow, and a part of the reason."""

READ = """
    import json, sys
    from pathlib import Path
    import torch
    if sys.argv[2] == "absent":
        sys.modules["streamline_hooks"] = None
    else:
        import streamline_hooks
    from transformers import AutoModelForCausalLM
    root, wrong = Path(sys.argv[1]), []
    given = torch.load(root / "given.pt")
    for folder in json.loads((root / f"{sys.argv[2]}.json").read_text()):
        model = AutoModelForCausalLM.from_pretrained(root / folder)
        expected = torch.load(root / folder / "expected.pt")
        with torch.no_grad():
            gap = (model(**given).logits - expected["logits"]).abs().max().item()
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        told = [model.generate(**given, **options, use_cache=cached).tolist() for cached in (True, False)]
        if gap > 1e-5 or told != [expected["tokens"]] * 2:
            wrong.append((folder, gap, told))
    print(json.dumps(wrong))
"""


def original(family: str) -> nn.Module:
    if family != "mixtral":
        return tiny_model(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL)).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def made(family: str, kind: str) -> nn.Module:
    """A model with a window given up for a kind that was fitted."""
    model = original(family)
    (repair,) = fit_windows(model, [WINDOW], parse_replacement(kind), [tokens(8, 12, seed=1)], [tokens(4, 12, seed=2)])
    with LayerSurgeon(model) as surgeon:
        insert_replacement(surgeon, WINDOW, repair.replacement_module)
        surgeon.commit(kind=kind)
    return model


def expected_of(model: nn.Module) -> dict[str, Any]:
    batch = left_padded(2, 7)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return {"logits": model(**batch).logits, "tokens": model.generate(**batch, **options).tolist()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], str]]:
    """All of them in folders, and why one could not be made."""
    root, refused = tmp_path_factory.mktemp("kinds"), {}
    folders: dict[str, list[str]] = {"absent": [], "imported": []}
    torch.save(left_padded(2, 7), root / "given.pt")
    for family in (*FAMILIES, "mixtral"):
        for kind in (*PLAIN, *SPLICED):
            try:
                model = made(family, kind)
            except UnsupportedSurgery as error:
                refused[family, kind] = str(error)
                continue
            expected = expected_of(model)
            for how in HOW if family in ALL_WAYS else HOW[:1]:
                name = f"{family}-{kind.replace(':', '-')}-{how}"
                write(model, root / name, how)
                torch.save(expected, root / name / "expected.pt")
                folders["absent" if kind in PLAIN else "imported"].append(name)
    for name, listed in folders.items():
        (root / f"{name}.json").write_text(json.dumps(listed))
    return root, refused


def write(model: Any, folder: Path, how: str) -> None:
    if how == "save":
        save(model, folder)
    elif how == "save_pretrained":
        model.save_pretrained(folder)
    else:
        arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
        Trainer(model=model, args=arguments).save_model()


@pytest.mark.parametrize("where", ["absent", "imported"])
def test_a_new_process_gives_the_same_logits_and_tokens(
    where: str, saved: tuple[Path, dict[tuple[str, str], str]]
) -> None:
    root, refused = saved
    made_here = json.loads((root / f"{where}.json").read_text())
    kinds = PLAIN if where == "absent" else SPLICED
    possible = [(family, kind) for family in (*FAMILIES, "mixtral") for kind in kinds if (family, kind) not in refused]
    assert len(made_here) == sum(len(HOW) if family in ALL_WAYS else 1 for family, _ in possible)
    assert json.loads(in_a_new_process(READ, root, where).stdout.splitlines()[-1]) == []


def test_what_a_family_does_not_allow_is_refused_by_name(saved: tuple[Path, dict[tuple[str, str], str]]) -> None:
    _, refused = saved
    assert set(refused) == set(REFUSED), {key: why for key, why in refused.items() if key not in REFUSED}
    for key, why in REFUSED.items():
        assert why in refused[key]


def test_the_check_can_fail(saved: tuple[Path, dict[tuple[str, str], str]], tmp_path: Path) -> None:
    """One weight of one folder changed by a thousandth is seen."""
    root, _ = saved
    model = AutoModelForCausalLM.from_pretrained(root / "llama-none-save")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "changed")
    torch.save(torch.load(root / "llama-none-save" / "expected.pt"), tmp_path / "changed" / "expected.pt")
    torch.save(torch.load(root / "given.pt"), tmp_path / "given.pt")
    (tmp_path / "absent.json").write_text('["changed"]')
    wrong = json.loads(in_a_new_process(READ, tmp_path, "absent").stdout.splitlines()[-1])
    assert [entry[0] for entry in wrong] == ["changed"]


def test_the_keys_of_plain_ones_are_those_of_a_plain_model(saved: tuple[Path, dict[tuple[str, str], str]]) -> None:
    from safetensors import safe_open

    root, _ = saved
    for folder in json.loads((root / "absent.json").read_text()):
        config = transformers.AutoConfig.from_pretrained(root / folder)
        plain = AutoModelForCausalLM.from_config(config)
        plain.save_pretrained(root / "plain")
        with (
            safe_open(root / folder / "model.safetensors", "pt") as one,
            safe_open(root / "plain" / "model.safetensors", "pt") as two,
        ):
            assert set(one.keys()) == set(two.keys()), folder
