"""A repair is trained beside frozen blocks that FSDP2 has sharded, as it is in one process that has them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distillation.trained_together import SETTINGS, outcome, replace
from tests.processes import in_processes

pytestmark = pytest.mark.slow

STATES = replace(SETTINGS, loss={"relative": 1.0})
_SHARDED = """
    from pathlib import Path
    from torch.distributed.fsdp import fully_shard
    from streamline_hooks import LayerSurgeon, profile
    from streamline_hooks.repair import FoldedMap
    from tests.distillation.test_trained_on_shards import STATES
    from tests.distillation.trained_together import BATCHES, SETTINGS, Student, outcome, replace, student
    from tests.tiny_models import tiny_model, tokens

    def sharded(made):
        for block in made.model.model.layers:
            fully_shard(block)
        fully_shard(made.model)
        return made

    def whole(model):
        return {name: value.full_tensor().clone() for name, value in model.state_dict().items()}

    def raised(call):
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    made = sharded(student())
    before, kept = whole(made.model), replace(SETTINGS, checkpoint_minutes=0.0)
    found = {"whole": outcome(kept, made, checkpoint_file=Path(folder) / "training")}
    after = whole(made.model)
    said["as it was"] = list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    said["gradients"] = [n for n, p in made.model.named_parameters() if p.grad is not None]
    said["frozen"] = [n for n, p in made.model.named_parameters() if not p.requires_grad]
    said["held here"] = made.model.model.layers[0].mlp.up_proj.weight.to_local().shape[0]
    found["states alone"] = outcome(STATES, sharded(student()))
    folded = Student(tiny_model("llama"), [(range(2, 4), FoldedMap(range(2, 4), torch.eye(32).double(), 0.0, 0.0, 0.0))])
    healed = sharded(student())
    healed.copies = {4: healed.stack[4]}
    said["refused"] = [outcome(made=sharded(folded))["raised"], outcome(made=healed)["raised"]]
    said["still refused"] = [raised(lambda: LayerSurgeon(made.model).__enter__()), raised(lambda: profile(made.model, BATCHES))]
    ids = tokens(2, 9)
    said["runs"] = torch.allclose(made.model(ids).logits, tiny_model("llama")(ids).logits, atol=1e-5)
    torch.save(found, f"{folder}/{rank}.pt")
"""  # noqa: E501


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[str, Any]]:
    return in_processes(_SHARDED, folder)


@pytest.mark.sample(1)
@pytest.mark.parametrize("what", ["whole", "states alone"])
def test_it_is_trained_to_the_weights_of_one_process(folder: Path, said: list[dict[str, Any]], what: str) -> None:
    mine, theirs = (torch.load(folder / f"{rank}.pt", weights_only=True)[what] for rank in range(2))
    one = outcome(STATES if what == "states alone" else SETTINGS)
    assert "raised" not in mine, mine
    assert mine["steps"] == theirs["steps"] == one["steps"]
    for a, b, wanted in zip(mine["weights"], theirs["weights"], one["weights"], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, wanted, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(mine["kl"], one["kl"], rtol=0.0, atol=1e-6)


def test_the_shards_are_as_they_were(said: list[dict[str, Any]]) -> None:
    for found in said:
        assert found["as it was"] and found["runs"]
        assert found["gradients"] == found["frozen"] == []
        assert found["held here"] == 24, "a process was meant to hold half of 48 rows"


def test_what_is_kept_goes_on_in_one_process_that_has_all_weights(folder: Path, said: list[dict[str, Any]]) -> None:
    gone_on = outcome(SETTINGS, resume=True, checkpoint_file=folder / "training")
    assert "raised" not in gone_on, gone_on
    torch.testing.assert_close(gone_on["weights"], outcome()["weights"], rtol=0.0, atol=1e-6)


def test_what_is_made_of_shards_is_refused(said: list[dict[str, Any]]) -> None:
    for found in said:
        folded, healing = found["refused"]
        assert "fully_shard" in folded and "FoldedMap" in folded
        assert folded.startswith("UnsupportedSurgery: ") and "but healing copies" in healing
        assert all("fully_shard already. Expected a plain model" in text for text in found["still refused"])
