"""A state is read from, and written to, the same place; nothing beside it changes."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from streamline_hooks import StreamlineError
from streamline_hooks.modeling.hidden_state import read_input, read_output, token_mask, write_input, write_output

STATE, OTHER = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
Named = namedtuple("Named", "state router")


@dataclass
class Out:
    state: torch.Tensor
    extra: Any = None


BESIDE = object()
OUTPUTS = [
    STATE,
    (STATE,),
    (STATE, BESIDE, None),
    [STATE, BESIDE],
    Named(STATE, BESIDE),
    Out(STATE, BESIDE),
    {"state": STATE, "extra": BESIDE},
    BaseModelOutput(last_hidden_state=STATE, attentions=(OTHER,)),
]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: type(o).__name__)
def test_outputs(output: Any) -> None:
    assert read_output(output) is STATE
    changed = write_output(output, OTHER)
    assert type(changed) is type(output)
    assert read_output(changed) is OTHER
    assert read_output(output) is STATE
    before, after = (list(o.values()) if isinstance(o, dict) else o for o in (output, changed))
    if isinstance(before, (list, tuple)):
        assert all(a is b for a, b in zip(before[1:], after[1:], strict=True))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((STATE, BESIDE), {"mask": None}), ((), {"hidden_states": STATE, "mask": None}), ((None,), {"x": STATE})],
)
def test_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert read_input(args, kwargs) is STATE
    new_args, new_kwargs = write_input(args, kwargs, OTHER)
    assert read_input(new_args, new_kwargs) is OTHER
    assert read_input(args, kwargs) is STATE
    assert len(new_args) == len(args) and new_kwargs.keys() == kwargs.keys()


def test_what_holds_no_state_is_described() -> None:
    with pytest.raises(StreamlineError, match=r"mask=torch.int64.*\(2,\)\)"):
        read_input((3,), {"mask": torch.zeros(2, dtype=torch.long)})
    for output in (None, (), [], torch.zeros(3), (None, STATE)):
        with pytest.raises(StreamlineError, match=r"returned .*Expected a floating-point tensor"):
            read_output(output)


def test_masks() -> None:
    assert token_mask(STATE, None).all() and token_mask(STATE, None).shape == (1, 2)
    assert token_mask(STATE, torch.tensor([[0, 1]])).tolist() == [[False, True]]
    with pytest.raises(StreamlineError, match=r"\(3.*4\).*Expected"):
        token_mask(torch.zeros(3, 4), None)
    with pytest.raises(StreamlineError, match=r"\(1.*5\).*\(1.*2\)"):
        token_mask(STATE, torch.ones(1, 5))
