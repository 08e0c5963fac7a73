"""Take parameters out of an optimiser, and leave everything else of it as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn
from torch.optim import Optimizer

from streamline_hooks.errors import StreamlineError


def require_own_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise unless an optimiser holds the very parameters of a model.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    model : torch.nn.Module

    Raises
    ------
    StreamlineError
        If it holds none of them: copies of them, or those of another model.
    """
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise StreamlineError(
            f"This {type(optimizer).__name__} holds no parameter of this {type(model).__name__}: it was made for "
            "another model, or works on copies (DeepSpeed, master weights). Make it from the model's own parameters."
        )


def drop_parameters(optimizer: Optimizer, gone: Collection[nn.Parameter]) -> None:
    """Take parameters and what was kept for them out of an optimiser.

    A group that is left without parameters stays, since a learning-rate schedule counts the groups. An optimiser that
    was made from ``model.named_parameters()`` keeps the names beside the parameters, and loses those of the ones gone.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Also one of accelerate, or another that wraps one as its ``optimizer``.
    gone : collection of torch.nn.Parameter

    Examples
    --------
    >>> import torch
    >>> first, second = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    >>> optimizer = torch.optim.SGD([first, second], lr=0.1)
    >>> drop_parameters(optimizer, [first])
    >>> optimizer.param_groups[0]["params"][0] is second
    True
    """
    numbers = {id(parameter) for parameter in gone}
    for one in _chain(optimizer):
        for group in one.param_groups:
            left = [k for k, parameter in enumerate(group["params"]) if id(parameter) not in numbers]
            for kept in {"params", "param_names"} & set(group):
                group[kept][:] = [group[kept][k] for k in left]
        for parameter in gone:
            one.state.pop(parameter, None)


def rename_parameters(
    optimizer: Optimizer, before: Mapping[nn.Parameter, str], now: Mapping[nn.Parameter, str]
) -> None:
    """Let the names that an optimiser keeps follow those of its parameters; nothing where it keeps none.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        As for `drop_parameters`.
    before, now : mapping of torch.nn.Parameter to str
        The names in the model. What an optimiser has in front of one, as of a wrapper around the model, stays.
    """
    for one in _chain(optimizer):
        for group in one.param_groups:
            names: list[str] = group.get("param_names", [])
            for k, (parameter, name) in enumerate(zip(group["params"], names, strict=False)):
                old = before.get(parameter)
                if old is not None and parameter in now and name.endswith(old):
                    names[k] = name.removesuffix(old) + now[parameter]


def _chain(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimiser, and those that it wraps."""
    inner: object = optimizer
    while isinstance(inner, Optimizer):
        yield inner
        inner = getattr(inner, "optimizer", None)
