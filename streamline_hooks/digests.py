"""Tell whether two models, two tokenizers, two texts, or two lists of batches are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from streamline_hooks.batch import device_of
from streamline_hooks.errors import StreamlineError

_OF_CONFIG = ("transformers", "transformers_modules", "bitsandbytes")  # what such a module is, this says
_ADAPTERS = ("active_adapters", "disable_adapters", "_adapters_disabled", "scaling")  # what PEFT's modules do by
_PLAIN = (int, float, complex, str, type(None))
_INCIDENTAL = ("training", "name_or_path")


def weights_digest(model: nn.Module) -> str:
    """Return BLAKE2b, in hexadecimal, of every parameter and buffer: name, shape, dtype and values.

    Raise if weights are offloaded to the meta device. Hooks and plain attributes (`modules_digest`) are not included.
    """
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise StreamlineError(
                f"The weights of {name} are not in memory (device meta), so that it cannot be told whether this is a "
                "model which is known. Load it without offloading, or keep nothing."
            )
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def modules_digest(model: nn.Module) -> str:
    """Return a digest, in hexadecimal, of the path, class and public plain attributes of each module.

    Numbers, texts, booleans, None and tuples of them count, and the state of PEFT's adapters. Attributes of
    Transformers' modules, of bitsandbytes and of remote code do not: the configuration determines them, or they change
    while a model runs.
    """
    return texts_digest(f"{path} {_class(module)} {_attributes(module)}" for path, module in model.named_modules())


def model_digest(model: nn.Module) -> str:
    """Return a digest, in hexadecimal, of a model's weights, modules and configuration, wherever it was loaded from."""
    return texts_digest([weights_digest(model), structure_digest(model)])


def structure_digest(model: nn.Module, but: Collection[str] = ()) -> str:
    """Return a digest, in hexadecimal, of a model's modules and its configuration without the settings in `but`."""
    config: Any = getattr(model, "config", None)
    said: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    for incidental in ("_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype", *but):
        said.pop(incidental, None)
    parts = [modules_digest(model), json.dumps(said, sort_keys=True, default=str)]
    return texts_digest([*parts, *(_class(module) for module in model.modules())])


def autocast_dtype(model: nn.Module) -> str:
    """The precision of a model's matrix products under autocast; empty where that is off."""
    device = device_of(model).type
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""


def tokenizer_digest(tokenizer: Any, texts: Iterable[str] = ()) -> str:
    """Return a digest, in hexadecimal, of a tokenizer: rules, vocabulary, chat template, and first and last token.

    A tokenizer without ``backend_tokenizer`` is described by the `tokens_digest` of the texts instead of its rules.
    """
    named = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "chat_template")]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        rules = json.loads(backend.to_str())
        for incidental in ("padding", "truncation"):  # of the last call
            rules.pop(incidental, None)
        return texts_digest([repr(named), json.dumps(rules, sort_keys=True)])
    vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    return texts_digest([repr(named), repr(vocabulary), tokens_digest(tokenizer, texts)])


def tokens_digest(tokenizer: Any, texts: Iterable[str]) -> str:
    """Return a digest, in hexadecimal, of the tokens of texts, without special ones."""
    return texts_digest(repr(list(tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts)


def texts_digest(texts: Iterable[str]) -> str:
    """Return SHA-256, in hexadecimal, of texts in their order; where one ends makes a difference."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8))
        digest.update(encoded)
    return digest.hexdigest()


def batches_digest(items: Sequence[Any]) -> str:
    """Return BLAKE2b, in hexadecimal, of the name, shape, dtype and values of every tensor in nested batches."""
    digest = hashlib.blake2b(digest_size=8)

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for number, inside in enumerate(value):
                add(f"{name}[{number}]", inside)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
            digest.update(tensor_bytes(value))

    add("", list(items))
    return digest.hexdigest()


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _class(module: nn.Module) -> str:
    """Its name; what a checkpoint brings with it is in a module that is called after where it lies."""
    kind = type(module)
    return kind.__qualname__ if _package(module) == "transformers_modules" else f"{kind.__module__}.{kind.__qualname__}"


def _attributes(module: nn.Module) -> list[tuple[str, str]]:
    """What a module does by, besides its weights."""
    package = _package(module)
    if package in _OF_CONFIG:
        return []
    plain = {
        name: value
        for name, value in vars(module).items()
        if all(isinstance(one, _PLAIN) for one in (value if isinstance(value, tuple) else (value,)))
        and name not in _INCIDENTAL
        and name[0] != "_"
    }
    if package == "peft":
        plain |= {name: getattr(module, name) for name in _ADAPTERS if hasattr(module, name)}
    return sorted((name, repr(value)) for name, value in plain.items() if not callable(value))


def tensor_bytes(tensor: torch.Tensor) -> Any:
    """Return the bytes of a tensor's values, in the order of its elements."""
    try:
        flat = tensor.detach().cpu().contiguous().view(-1)
        return flat.view(torch.uint8).numpy().data
    except (RuntimeError, TypeError):  # a subclass of a tensor, such as a quantised one, that holds several
        return repr(tensor.detach().cpu()).encode()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits in the same dtype and shape; on the meta device a tensor holds none."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    a, b = a.detach(), b.detach().to(a.device)
    try:
        return torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))
    except (RuntimeError, NotImplementedError):  # a tensor of a class of its own
        return torch.equal(a, b)
