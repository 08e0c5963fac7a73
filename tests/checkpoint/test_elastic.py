"""A folder with several depths: plain loading gives the original, and each depth comes back as it was saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from streamline_hooks import LayerSurgeon, StreamlineError, load, save
from streamline_hooks.checkpoint import export_plain, save_elastic
from streamline_hooks.replacements import LinearReplacement, SwiGLUReplacement
from streamline_hooks.surgery import DepthCut, at_depth, depths_of, set_depths
from tests.processes import in_a_new_process
from tests.tiny_models import FAMILIES, WIDTH, left_padded, tiny_model


def randomized(module: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
    return module


def elastic(family: str = "llama") -> Any:
    """Return a model of 6 blocks with the depths 5, 4 and 2."""
    model = tiny_model(family)
    cuts = [
        DepthCut((range(3, 4),), (None,)),
        DepthCut((range(3, 5),), (randomized(LinearReplacement(WIDTH, rank=4)),)),
        DepthCut((range(0, 1), range(2, 5)), (None, randomized(SwiGLUReplacement(WIDTH, 8)))),
    ]
    set_depths(model, cuts)
    return model


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_depth_comes_back(family: str, tmp_path: Path) -> None:
    model, batch = elastic(family), left_padded(2, 7)
    folder = save_elastic(model, tmp_path / "m")
    loaded = load(folder)
    assert depths_of(loaded) == depths_of(model) == (6, 5, 4, 2)
    for depth in depths_of(model):
        shallow = load(folder, depth=depth)
        with at_depth(model, depth), at_depth(loaded, depth):
            expected = model(**batch).logits
            assert torch.equal(loaded(**batch).logits, expected)
            assert torch.equal(shallow(**batch).logits, expected)
        assert shallow.config.num_hidden_layers == depth
        assert sum(p.numel() for p in shallow.parameters()) <= sum(p.numel() for p in model.parameters()) + 8 * WIDTH**2


def test_the_weights_are_those_of_the_original_and_plain_loading_returns_it(tmp_path: Path) -> None:
    model, plain = elastic(), tiny_model("llama")
    folder = save_elastic(model, tmp_path / "m")
    plain.save_pretrained(tmp_path / "plain")
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    batch = left_padded(2, 7)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(loaded(**batch).logits, plain(**batch).logits)
    with pytest.raises(StreamlineError, match="one depth"):
        depths_of(loaded)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]  # engines load all of them


def test_it_is_the_original_where_this_library_is_missing(tmp_path: Path) -> None:
    folder = save_elastic(elastic(), tmp_path / "m")
    torch.save(tiny_model("llama")(**left_padded(2, 7)).logits, tmp_path / "logits.pt")
    torch.save(left_padded(2, 7), tmp_path / "batch.pt")
    code = """
        import sys
        sys.modules["streamline_hooks"] = None
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/m").eval()
        logits = model(**torch.load(sys.argv[1] + "/batch.pt")).logits
        print(torch.equal(logits, torch.load(sys.argv[1] + "/logits.pt")))
    """
    assert in_a_new_process(code, tmp_path).stdout.strip() == "True"
    assert depths_of(load(folder)) == (6, 5, 4, 2)


def test_some_depths_and_a_saved_one_again(tmp_path: Path) -> None:
    model = elastic()
    folder = save_elastic(model, tmp_path / "m", [6, 4], tokenizer=ByT5Tokenizer())
    loaded = load(folder)
    assert depths_of(loaded) == (6, 4)
    with pytest.raises(StreamlineError, match=r"no depth 2.*6, 4"):
        save_elastic(loaded, tmp_path / "n", [2])
    with pytest.raises(StreamlineError, match="not empty"):
        save_elastic(loaded, folder)
    before = digests(folder)
    save_elastic(loaded, folder, tokenizer=ByT5Tokenizer(), overwrite=True)
    assert digests(folder) == before


def test_a_depth_can_be_saved_as_a_model_of_its_own(tmp_path: Path) -> None:
    shallow = load(save_elastic(elastic(), tmp_path / "m"), depth=4)
    again = load(save(shallow, tmp_path / "shallow"))
    batch = left_padded(2, 7)
    assert torch.equal(shallow(**batch).logits, again(**batch).logits)
    with pytest.raises(StreamlineError, match="one depth"):
        depths_of(shallow)


def test_offloaded_weights_are_saved(tmp_path: Path) -> None:
    model, batch = elastic(), left_padded(2, 7)
    with torch.no_grad():
        expected = model(**batch).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(load(save_elastic(model, tmp_path / "m"))(**batch).logits, expected)


def test_another_dtype_is_that_of_the_replacements_too(tmp_path: Path) -> None:
    folder, batch = save_elastic(elastic(), tmp_path / "m"), left_padded(2, 7)
    loaded, exact = load(folder, dtype=torch.bfloat16), elastic()
    for depth in depths_of(loaded):
        shallow = load(folder, depth=depth, dtype=torch.bfloat16)
        with at_depth(loaded, depth), at_depth(exact, depth):
            assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
            logits = loaded(**batch).logits
            assert torch.equal(logits, shallow(**batch).logits)
            torch.testing.assert_close(logits.float(), exact(**batch).logits, rtol=0.1, atol=0.2)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="one depth"):
        save_elastic(tiny_model("llama"), tmp_path / "m")
    model = elastic()
    with pytest.raises(StreamlineError, match="open"), at_depth(model, 4):
        save_elastic(model, tmp_path / "m")
    set_depths(model, [DepthCut((range(3, 4),), (nn.Tanh(),))])
    with pytest.raises(StreamlineError, match="Tanh"):
        save_elastic(model, tmp_path / "m")
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(2, LinearReplacement(WIDTH))
        surgeon.commit()
    set_depths(model, [DepthCut((range(3, 4),), (None,))])
    with pytest.raises(StreamlineError, match="spliced modules"):
        save_elastic(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_model_whose_blocks_changed_since_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    set_depths(model, [DepthCut((range(2, 4),), (LinearReplacement(WIDTH),))])
    save_elastic(model, tmp_path / "good")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        surgeon.commit()
    with pytest.raises(StreamlineError, match=r"has 5 blocks.*made for 6.*fit_depths again"):
        save_elastic(model, tmp_path / "good", overwrite=True)
    assert 4 in depths_of(load(tmp_path / "good"))


def test_a_depth_that_is_not_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = save_elastic(elastic(), tmp_path / "m")
    with pytest.raises(StreamlineError, match=r"depth=3.*6, 5, 4, 2"):
        load(folder, depth=3)
    plain = tiny_model("llama")
    with LayerSurgeon(plain) as surgeon:
        surgeon.remove([3])
        surgeon.commit()
    with pytest.raises(StreamlineError, match=r"depth=5.*one depth.*save_elastic"):
        load(save(plain, tmp_path / "plain"), depth=5)


def change(folder: Path, how: str) -> None:
    description, weights = folder / "depths/depths.json", folder / "depths/replacements.safetensors"
    content, tensors = json.loads(description.read_text()), load_file(weights)
    if how == "format":
        content["format"] = 2
    elif how == "blocks":
        content["blocks"] = 7
    elif how == "missing":
        tensors.pop(next(name for name in tensors if name.startswith("4.")))
    elif how == "more":
        tensors["3.0.weight"] = torch.zeros(2)
    elif how == "shape":
        tensors = {name: tensor[:1].clone() for name, tensor in tensors.items()}
    description.write_text(json.dumps(content))
    save_file(tensors, weights)
    if how == "damaged":
        weights.write_bytes(weights.read_bytes()[:20])


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("format", "has format 2"), ("blocks", "with 6 blocks.*made for 7"), ("missing", "weights of depth 4"),
        ("more", "3.0.weight"), ("shape", "weights of depth"), ("damaged", "cannot be read"),
    ],
)  # fmt: skip
def test_a_changed_file_is_refused(how: str, text: str, tmp_path: Path) -> None:
    folder = save_elastic(elastic(), tmp_path / "m")
    change(folder, how)
    with pytest.raises(StreamlineError, match=r"SHA256SUMS"):
        load(folder)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(StreamlineError, match=text):
        load(folder)


def test_the_card_lists_the_depths(tmp_path: Path) -> None:
    card = (save_elastic(elastic(), tmp_path / "m") / "README.md").read_text()
    assert "| 4 of 6 | 3 to 4 | LinearReplacement |" in card
    assert "| 2 of 6 | 0, 2 to 4 | nothing, SwiGLUReplacement |" in card


@pytest.mark.parametrize("write", [save, export_plain])
def test_saving_one_depth_warns_that_the_others_are_lost(
    write: Callable[[Any, Path], Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = elastic()
    with pytest.warns(UserWarning, match=r"other depths.*not saved.*save_elastic") as warned:
        write(model, tmp_path / "one")
    assert [str(warning.filename) for warning in warned if "depths" in str(warning.message)] == [__file__]
    save_elastic(model, tmp_path / "all")
    assert not [warning for warning in recwarn if "depths" in str(warning.message)]
    assert depths_of(load(tmp_path / "all")) == depths_of(model)


def test_adapters_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = elastic()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(StreamlineError, match="PEFT adapters"):
        save_elastic(model, tmp_path / "all")
    assert not (tmp_path / "all").exists()
