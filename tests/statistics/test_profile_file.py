"""A profile on disk and beside another: whole or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from streamline_hooks import LayerSurgeon, StreamlineError, profile
from streamline_hooks.statistics import Profile, check_profile
from tests.tiny_models import tiny_model, tokens


@pytest.fixture
def found() -> Profile:
    return profile(tiny_model("llama"), [tokens(4, 6)], skip=1)


def test_it_comes_back_whole(found: Profile, tmp_path: Path) -> None:
    path = found.save(tmp_path / "found.safetensors")
    again = Profile.load(path)
    assert again.about == found.about and str(again) == str(found) and again.num_boundaries == found.num_boundaries
    for name, value in found.sums.state_dict().items():
        assert torch.equal(again.sums.state_dict()[name], value)
    assert again.interval("entropy", range(1, 3)) == found.interval("entropy", range(1, 3))
    more = profile(tiny_model("llama"), [tokens(3, 6, seed=1)], skip=1)
    again.merge(more)
    assert again.tokens == found.tokens + more.tokens == 35
    assert torch.equal(Profile.load(path).cosine, found.cosine)  # the file is as it was
    assert os.listdir(tmp_path) == ["found.safetensors"]


def test_a_file_is_replaced_whole_or_not_at_all(
    found: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = found.save(tmp_path / "found.safetensors")
    before = path.read_bytes()

    def full(tensors: object, name: str, metadata: object) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("streamline_hooks.core.files.save_file", full)
        with pytest.raises(StreamlineError, match=r"found.safetensors.*no space left"):
            found.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["found.safetensors"]
    assert found.save(tmp_path / "new" / "found").is_file()


def test_files_that_hold_no_profile(found: Profile, tmp_path: Path) -> None:
    path = found.save(tmp_path / "found.safetensors")
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StreamlineError, match=r"found.safetensors.*truncated"):
            Profile.load(path)
    with pytest.raises(StreamlineError, match=r"absent.safetensors.*Pass"):
        Profile.load(tmp_path / "absent.safetensors")
    with pytest.raises(StreamlineError, match="cannot be read|not a complete safetensors file"):
        Profile.load(tmp_path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(StreamlineError, match=r"found.safetensors.*other content"):
        Profile.load(path)
    save_file({"weight": torch.zeros(2)}, path, {"streamline_hooks": json.dumps({"moments": 1})})
    with pytest.raises(StreamlineError, match=r"found.safetensors.*Expected a profile"):
        Profile.load(path)


def test_files_of_another_format_or_damaged(found: Profile, tmp_path: Path) -> None:
    path = found.save(tmp_path / "found.safetensors")
    tensors = load_file(path)
    values = {"format": 1, "version": "9.9", "places": 7, "replicates": 100}
    save_file(tensors, path, {"streamline_hooks": json.dumps({"profile": {**values, "format": 2}})})
    with pytest.raises(StreamlineError, match=r"format 2.*9.9.*format 1"):
        Profile.load(path)
    save_file(tensors, path, {"streamline_hooks": json.dumps({"profile": {**values, "places": 6}})})
    with pytest.raises(StreamlineError, match=r"\(101.*43\).*\(101.*31\)"):
        Profile.load(path)
    del tensors["norms"]
    save_file(tensors, path, {"streamline_hooks": json.dumps({"profile": values})})
    with pytest.raises(StreamlineError, match=r"damaged.*norms"):
        Profile.load(path)
    save_file(tensors, path, {"streamline_hooks": json.dumps({"profile": {"format": 1, "version": "9.9"}})})
    with pytest.raises(StreamlineError, match=r"found.safetensors"):
        Profile.load(path)


def test_profiles_that_do_not_merge(found: Profile) -> None:
    model, batches = tiny_model("llama"), [tokens(4, 6)]
    with pytest.raises(StreamlineError, match=r"1 here.*0 there"):
        found.merge(profile(model, batches))
    with pytest.raises(StreamlineError, match="tokens is all here, last there"):
        found.merge(profile(model, batches, tokens="last", skip=1))
    with pytest.raises(StreamlineError, match=r"7 here.*6 there"):
        found.merge(profile(model, batches, protect=[-1], skip=1))
    with pytest.raises(StreamlineError, match=r"100 here.*0 there"):
        found.merge(profile(model, batches, replicates=0, skip=1))
    with pytest.raises(StreamlineError, match=r"LlamaForCausalLM.*GPT2LMHeadModel"):
        found.merge(profile(tiny_model("gpt2"), batches, skip=1))
    model.model.layers[2].mlp.up_proj.weight.data.mul_(1.001)  # the same architecture, finetuned
    tuned = profile(model, batches, skip=1)
    with pytest.raises(StreamlineError, match=r"\w{16}.*\w{16}"):
        found.merge(tuned)
    assert found.tokens == 20


def test_a_profile_is_held_against_a_model(found: Profile) -> None:
    check_profile(found, tiny_model("llama"))
    with pytest.raises(StreamlineError, match=r"fingerprint.*in the model.*in the profile"):
        check_profile(found, tiny_model("llama", torch.bfloat16))
    with pytest.raises(StreamlineError, match=r"GPT2LMHeadModel.*LlamaForCausalLM"):
        check_profile(found, tiny_model("gpt2"))
    with pytest.raises(StreamlineError, match=r"LlamaForCausalLM in the model.*unknown"):
        check_profile(Profile(7), tiny_model("llama"))


class Turned(nn.Module):
    """Has no weight."""

    def forward(self, state: Tensor) -> Tensor:
        return 3 * state.roll(1, -1)


def _spliced(model: Any) -> None:
    surgeon = LayerSurgeon(model)
    surgeon.__enter__()
    surgeon.insert(2, Turned())


@pytest.mark.parametrize(
    "change",
    [
        _spliced,
        lambda model: setattr(model.config, "rms_norm_eps", 0.5),
        lambda model: setattr(model.model.layers[1].mlp, "act_fn", nn.ReLU()),
        lambda model: model.model.layers[1].register_buffer("shift", torch.zeros(1)),
    ],
)
def test_a_profile_is_of_a_model_with_all_that_it_computes_by(change: Any) -> None:
    model = tiny_model("llama")
    found = profile(model, [tokens(2, 8)], replicates=0)
    check_profile(found, model)
    model.config.use_cache = False  # as a training sets it
    check_profile(found, model)
    change(model)
    with pytest.raises(StreamlineError, match=r"another model: fingerprint is"):
        check_profile(found, model)
