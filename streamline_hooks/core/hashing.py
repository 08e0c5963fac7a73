"""Compute digests of models, tokenizers, texts and batches."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from streamline_hooks.core.batch import device_of
from streamline_hooks.core.errors import StreamlineError

# Packages whose modules are determined by the config.
_CONFIGURED_PACKAGES = ("transformers", "transformers_modules", "bitsandbytes")
_ADAPTERS = ("active_adapters", "disable_adapters", "_adapters_disabled", "scaling")  # state of PEFT modules
_PLAIN = (int, float, complex, str, type(None))
_INCIDENTAL = ("training", "name_or_path")


def weights_digest(model: nn.Module) -> str:
    """Return the BLAKE2b digest of all parameters and buffers; raise if a weight is on the meta device."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise StreamlineError(
                f"{name} is on the meta device, so the digest of the model's weights cannot be computed. Expected all "
                "weights in memory. Load the model without offloading, or pass no cache_file."
            )
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def state_digest(model: nn.Module) -> str:
    """Return a digest of the weights that a checkpoint contains, or "" if one is on the meta device."""
    state = sorted(model.state_dict().items())
    tensors = [(name, value) for name, value in state if isinstance(value, torch.Tensor)]
    if any(tensor.is_meta for _, tensor in tensors):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def model_digest(model: nn.Module, *, attributes: bool = True) -> str:
    """Return a digest of a model's weights, modules and config, independent of the path it was loaded from.

    With `attributes`, tensors, containers and functions count that a user's modules keep as public attributes. A module
    may change them in a forward pass.
    """
    digests = [weights_digest(model), structure_digest(model)]
    if attributes and (entries := [*_attribute_digests(model), *_repeated_modules(model)]):
        digests.append(texts_digest(entries))
    return texts_digest(digests)


def structure_digest(model: nn.Module, but: Collection[str] = ()) -> str:
    """Return a digest of a model's modules and its config, without the config entries in `but`."""
    config: Any = getattr(model, "config", None)
    settings: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    for incidental in ("_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype", *but):
        settings.pop(incidental, None)
    modules = texts_digest(f"{path} {_class(module)} {_attributes(module)}" for path, module in model.named_modules())
    parts = [modules, json.dumps(settings, sort_keys=True, default=str)]
    return texts_digest([*parts, *(_class(module) for module in model.modules())])


def autocast_dtype(model: nn.Module) -> str:
    """Return the autocast dtype of a model's matrix products, or an empty string if autocast is off."""
    device = device_of(model).type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return str(torch.get_autocast_dtype(device)) if is_on else ""


def tokenizer_digest(tokenizer: Any, texts: Iterable[str] = ()) -> str:
    """Return a digest of a tokenizer: its rules, chat template and special tokens.

    For a tokenizer without ``backend_tokenizer``, the vocabulary and the tokens of `texts` are used instead of the
    rules.
    """
    settings = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "chat_template")]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        rules = json.loads(backend.to_str())
        for incidental in ("padding", "truncation"):  # set by the last call
            rules.pop(incidental, None)
        return texts_digest([repr(settings), json.dumps(rules, sort_keys=True)])
    vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    return texts_digest([repr(settings), repr(vocabulary), tokens_digest(tokenizer, texts)])


def tokens_digest(tokenizer: Any, texts: Iterable[str]) -> str:
    """Return a digest of the tokens of texts, without special tokens."""
    return texts_digest(repr(list(tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts)


def texts_digest(texts: Iterable[str]) -> str:
    """Return the SHA-256 digest of a sequence of texts."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8))
        digest.update(encoded)
    return digest.hexdigest()


def batches_digest(items: Sequence[Any]) -> str:
    """Return the BLAKE2b digest of the names and values (tensors, arrays, numbers, texts) in nested batches."""
    digest = hashlib.blake2b(digest_size=8)

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for number, inside in enumerate(value):
                add(f"{name}[{number}]", inside)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
            digest.update(tensor_bytes(value))
        elif isinstance(value, np.ndarray):
            digest.update(f"{name} {value.shape} {value.dtype};".encode())
            digest.update(value.tobytes())
        elif isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
            digest.update(f"{name} {type(value).__name__} {value!r};".encode())

    add("", list(items))
    return digest.hexdigest()


def _class(module: nn.Module) -> str:
    """Return the class of a module; for remote code without the Python module, which is named after a folder."""
    cls = type(module)
    is_remote = cls.__module__.startswith("transformers_modules.")
    return cls.__qualname__ if is_remote else f"{cls.__module__}.{cls.__qualname__}"


def _attributes(module: nn.Module) -> list[tuple[str, str]]:
    """Return the plain attributes of a module that neither the config determines nor a run changes."""
    package = type(module).__module__.partition(".")[0]
    if package in _CONFIGURED_PACKAGES:
        return []
    plain = {
        name: value
        for name, value in vars(module).items()
        if all(isinstance(item, _PLAIN) for item in (value if isinstance(value, tuple) else (value,)))
        and name not in _INCIDENTAL
        and name[0] != "_"
    }
    if package == "peft":
        plain |= {name: getattr(module, name) for name in _ADAPTERS if hasattr(module, name)}
    return sorted((name, repr(value)) for name, value in plain.items() if not callable(value))


def _attribute_digests(model: nn.Module) -> Iterator[str]:
    """Yield the attributes of a user's modules that `_attributes` leaves out, with digests of their values."""
    for path, module in model.named_modules():
        package = type(module).__module__.partition(".")[0]
        if package in (*_CONFIGURED_PACKAGES, "accelerate", "peft", "streamline_hooks", "torch"):
            continue
        counted = {name for name, _ in _attributes(module)} | {*_INCIDENTAL, "forward"}  # which Accelerate replaces
        for name, value in sorted(vars(module).items()):
            if name in counted or name[0] == "_":
                continue
            if inspect.isroutine(value) or isinstance(value, partial):
                yield f"{path}.{name} {texts_digest(function_texts(value))}"
            elif isinstance(value, (torch.Tensor, np.ndarray, Mapping, list, tuple)):
                yield f"{path}.{name} {batches_digest([value])}"


def _repeated_modules(model: nn.Module) -> Iterator[str]:
    """Yield the order of the modules in each list that has a module several times."""
    for path, module in model.named_modules():
        numbers = {id(entry): number for number, entry in enumerate(module)} if type(module) is nn.ModuleList else {}
        if len(numbers) < len(module._modules) and numbers:
            yield f"{path} {[numbers[id(entry)] for entry in module._modules.values()]}"


def function_texts(function: Any) -> Iterator[str]:
    """Yield the source of a user's function or callable object, and a digest of the data that it contains."""
    if isinstance(function, partial):
        yield batches_digest([function.args, function.keywords])
        yield from function_texts(function.func)
        return
    defined = function if inspect.isroutine(function) else type(function)
    if str(getattr(defined, "__module__", "")).startswith("streamline_hooks."):
        return
    with suppress(OSError, TypeError):  # it has no file
        yield inspect.getsource(defined)
    if code := getattr(defined, "__code__", None):  # several functions may be defined in one line
        constants = [value for value in code.co_consts if isinstance(value, _PLAIN)]
        yield f"{code.co_code.hex()} {constants} {code.co_names}"
    enclosed = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    defaults = [getattr(function, name, None) or [] for name in ("__defaults__", "__kwdefaults__")]
    yield batches_digest([enclosed, *defaults, [] if inspect.isroutine(function) else vars(function)])


def tensor_bytes(tensor: torch.Tensor) -> Any:
    """Return the bytes of a tensor's elements in row-major order."""
    try:
        flat = tensor.detach().cpu().contiguous().view(-1)
        return flat.view(torch.uint8).numpy().data
    except (RuntimeError, TypeError):  # a tensor subclass of several tensors, such as a quantized weight
        return repr(tensor.detach().cpu()).encode()


def bitwise_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have equal bits, dtype and shape; meta tensors are compared by dtype and shape."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    a, b = a.detach(), b.detach().to(a.device)
    try:
        return torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))
    except (RuntimeError, NotImplementedError):  # a tensor subclass
        return torch.equal(a, b)
