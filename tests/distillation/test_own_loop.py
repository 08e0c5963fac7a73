"""A model with a replacement trains under DistributedDataParallel in a loop of the caller's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.processes import in_processes

pytestmark = pytest.mark.slow

_LOOP = """
    from torch.nn.parallel import DistributedDataParallel
    from streamline_hooks import LayerSurgeon
    from tests.tiny_models import Nudge, tiny_model, tokens

    batch, found = tokens(4, 9), {}
    for how in ("open", "committed"):
        for processes in (1, count):
            model = tiny_model("llama").requires_grad_(False)
            module = Nudge()
            with LayerSurgeon(model) as surgeon:
                surgeon.replace(range(1, 3), module)
                if how == "committed":
                    surgeon.commit()
                alone = processes == 1
                run = model if alone else DistributedDataParallel(model)
                mine = batch if alone else batch[rank::count]
                optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
                for _ in range(3):
                    optimizer.zero_grad()
                    run(input_ids=mine, labels=mine, use_cache=False).loss.backward()
                    optimizer.step()
                said[f"{how} {processes}"] = len(model.model.layers)
            found[f"{how} {processes}"] = module.weight.detach()
            said[f"{how} {processes}, after"] = len(model.model.layers)
    torch.save(found, f"{folder}/{rank}.pt")
"""


@pytest.mark.long
def test_a_replacement_trains_under_ddp_as_it_does_alone(tmp_path: Path) -> None:
    from tests.tiny_models import Nudge

    said = in_processes(_LOOP, tmp_path)
    mine, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for how, after in (("open", 6), ("committed", 4)):
        assert said[0][f"{how} 2"] == 4 and said[0][f"{how} 2, after"] == after
        torch.testing.assert_close(mine[f"{how} 2"], mine[f"{how} 1"], rtol=0.0, atol=1e-6)
        assert torch.equal(mine[f"{how} 2"], theirs[f"{how} 2"])
        assert not torch.allclose(mine[f"{how} 1"], Nudge().weight, atol=1e-3)
