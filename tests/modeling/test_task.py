"""What a model is for, and what is read of its output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import StreamlineError
from streamline_hooks.cli import parse_task
from streamline_hooks.core import prepare_inputs
from streamline_hooks.modeling.task import POOLINGS, TASKS, Task, task_from_class_names
from streamline_hooks.testing import tiny_model
from tests.other_models import OTHERS, made

_OF = {
    "vit": "image-classification", "deit": "embedding", "dinov2": "embedding", "swin": "embedding",
    "siglip text": "embedding", "clip pictures": "embedding", "llava text": "causal-lm", "gemma3 text": "causal-lm",
    "bert": "embedding", "mpnet": "embedding", "t5 encoder": "seq2seq", "bart decoder": "seq2seq",
    "whisper encoder": "seq2seq", "wav2vec2": "embedding",
}  # fmt: skip

IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
STATES = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", _OF)
def test_the_class_says_the_task(name: str) -> None:
    model = made(name)
    assert Task.of(model) == Task(_OF[name])


@pytest.mark.parametrize("name", _OF)
def test_there_are_as_many_answers_as_were_counted(name: str) -> None:
    """The number is needed before the model is run: it is what a sum of losses is divided by."""
    model, batch = made(name), OTHERS[name].batch
    task = Task.of(model)
    with torch.no_grad():
        answers = task.answers(model(**prepare_inputs(model, batch)), batch)
    assert answers.ndim == 2 and len(answers) == task.count(batch)


@pytest.mark.parametrize("name", ["t5 decoder", "bart decoder"])
def test_what_a_decoder_says_is_masked_as_the_decoder_is(name: str) -> None:
    """Planted: padding of the decoder, and of the encoder, whose mask is another one."""
    model, batch = made(name), dict(OTHERS[name].batch)
    task, mask = Task.of(model), batch["decoder_attention_mask"].bool()
    assert not torch.equal(batch["attention_mask"][:, : mask.shape[1]].bool(), mask)
    with torch.no_grad():
        output = model(**prepare_inputs(model, batch))
    assert torch.equal(task.answers(output, batch), output.logits[mask])
    labels = batch["decoder_input_ids"].where(mask, -100)
    without = {k: v for k, v in batch.items() if k != "decoder_attention_mask"} | {"labels": labels}
    assert torch.equal(task.answers(output, without), output.logits[mask])
    assert task.count(without) == int(mask.sum())


def test_a_class_of_ones_own_is_what_it_comes_from() -> None:
    class Mine(type(tiny_model("llama"))):  # type: ignore[misc]
        pass

    model = tiny_model("llama")
    model.__class__ = Mine
    assert Task.of(model) == Task("causal-lm")
    assert [task_from_class_names([name]) for name in ("BertForMaskedLM", "LlamaForSequenceClassification")] == [
        "masked-lm",
        "text-classification",
    ]


class Plain(nn.Module):
    def __init__(self, **said: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, value in said.items():
            setattr(self, name, value)


def test_a_plain_module_says_its_classes_or_is_asked_for() -> None:
    assert [Task.of(Plain(num_classes=n)).name for n in (10, 0)] == ["image-classification", "embedding"]
    with pytest.raises(StreamlineError, match=r"Task\(name\) or --task"):
        Task.of(Plain())


@pytest.mark.parametrize("text", [*TASKS, *(f"embedding:pooling={pooling}" for pooling in POOLINGS)])
def test_a_task_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_task(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poetry", r"'poetry'.*causal-lm, masked-lm, seq2seq"),
        ("embedding:pooling=max", r"'embedding'.*'max'"),
        ("causal-lm:pooling=mean", "'mean'.*task embedding"),
        ("embedding:mean", "'mean'.*Expected one of pooling"),
    ],
)
def test_what_is_no_task_is_refused(text: str, message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        parse_task(text)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_embedding_is_pooled_over_real_tokens(side: str) -> None:
    mask = MASK if side == "right" else MASK.flip(1)
    states = STATES.clone()
    states[1, ~mask[1].bool()] = 1e9  # what padding holds is nobody's business
    output, given = SimpleNamespace(last_hidden_state=states), {"input_ids": IDS, "attention_mask": mask}
    real = states[1, mask[1].bool()]
    first, last = (STATES[0, 0], real[0]), (STATES[0, 3], real[1])
    wanted = {"mean": (STATES[0].mean(0), real.mean(0)), "first": first, "last": last}
    for pooling, rows in wanted.items():
        torch.testing.assert_close(Task("embedding", pooling).answers(output, given), torch.stack(rows))
    torch.testing.assert_close(Task("embedding").answers(output, given), torch.stack(wanted["mean"]))
    labels = torch.full_like(IDS, -100)  # as for masked language modelling: one token of each row is predicted
    labels[:, 2] = IDS[:, 2]
    torch.testing.assert_close(
        Task("embedding").answers(output, {**given, "labels": labels}), torch.stack(wanted["mean"])
    )


def test_what_a_model_pools_itself_is_taken_for_images_and_where_it_is_asked_for() -> None:
    own = torch.randn(2, 6)
    output = SimpleNamespace(last_hidden_state=STATES, pooler_output=own)
    images, texts = {"pixel_values": torch.zeros(2, 3, 4, 4)}, {"input_ids": IDS}
    assert torch.equal(Task("embedding").answers(output, images), own)
    assert torch.equal(Task("embedding").answers(output, images["pixel_values"]), own)
    torch.testing.assert_close(Task("embedding").answers(output, texts), STATES.mean(dim=1))
    assert torch.equal(Task("embedding", "pooler").answers(output, texts), own)
    with pytest.raises(StreamlineError, match=r"pooler_output.*Pass a model"):
        Task("embedding", "pooler").answers(SimpleNamespace(last_hidden_state=STATES), texts)


def test_pairs_are_compared_on_both_sides() -> None:
    """The cosine of two such answers is the mean of that of the images and that of the texts."""
    pairs = [SimpleNamespace(image_embeds=torch.randn(3, 5), text_embeds=torch.randn(3, 5)) for _ in range(2)]
    a, b = (Task("embedding").answers(one, {"input_ids": IDS}) for one in pairs)
    each = [
        torch.cosine_similarity(getattr(pairs[0], name), getattr(pairs[1], name), dim=-1)
        for name in ("image_embeds", "text_embeds")
    ]
    torch.testing.assert_close(torch.cosine_similarity(a, b, dim=-1), sum(each) / 2)
    with pytest.raises(StreamlineError, match="3 and 2 embeddings"):
        Task("embedding").answers(SimpleNamespace(image_embeds=torch.ones(3, 5), text_embeds=torch.ones(2, 5)), {})


def test_what_is_no_answer_is_refused() -> None:
    classes, images = Task("image-classification"), {"pixel_values": torch.zeros(2, 3, 4, 4)}
    for shape in ((2, 4, 6), (2, 1)):
        with pytest.raises(StreamlineError, match=r"Expected \(batch, classes\).*two classes"):
            classes.answers(SimpleNamespace(logits=torch.zeros(shape)), images)
    with pytest.raises(StreamlineError, match="SimpleNamespace"):
        classes.answers(SimpleNamespace(), images)
    assert torch.equal(classes.answers(torch.eye(3), images), torch.eye(3))  # as timm's and torchvision's return it
    with pytest.raises(StreamlineError, match=r"attention mask.*\(2, 3\)"):
        Task("causal-lm").answers(SimpleNamespace(logits=STATES), {"attention_mask": MASK[:, :3]})


def test_its_words() -> None:
    said: dict[str, Any] = {str(task): (task.unit, task.distance, task.is_causal_lm) for task in map(Task, TASKS)}
    assert said["causal-lm"] == ("token", "KL (nats per token)", True)
    assert said["image-classification"] == ("image", "KL (nats per image)", False)
    assert said["embedding"] == ("embedding", "1 - cosine", False)


def test_sounds_and_texts_are_pairs_too() -> None:
    """CLAP's other tower would else have no say."""
    texts, sounds = torch.randn(2, 5), torch.randn(2, 5)
    task = Task("embedding")
    found = task.answers(SimpleNamespace(text_embeds=texts, audio_embeds=sounds), {"input_ids": IDS})
    again = task.answers(SimpleNamespace(text_embeds=texts, audio_embeds=sounds.flip(0)), {"input_ids": IDS})
    assert found.shape == (2, 10) and not torch.equal(found, again)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_head_that_gives_no_distribution_is_refused(problem: str) -> None:
    """A softmax of several labels at once hides what all of them have in common."""
    model = made("vit")
    model.config.problem_type = problem
    with pytest.raises(StreamlineError, match=rf"{problem}.*not a distribution"):
        Task.of(model)
    with pytest.raises(StreamlineError, match=f"is for {problem}"):
        Task("image-classification").check_model(model)
    Task("embedding").check_model(model)


def test_what_several_lists_name_is_what_its_configuration_says() -> None:
    """Transformers lists what hears and writes with encoders that have decoders, and what sees and writes apart."""
    said = {
        ("VisionEncoderDecoderModel", True): "seq2seq",
        ("Qwen2AudioForConditionalGeneration", False): "causal-lm",
        ("WhisperForConditionalGeneration", True): "seq2seq",
        ("LlavaForConditionalGeneration", False): "causal-lm",
        ("BartForCausalLM", False): "causal-lm",
        ("BertForTokenClassification", False): "",
    }
    assert {key: task_from_class_names([key[0]], key[1]) for key in said} == said


def test_a_compiled_model_is_what_is_inside() -> None:
    assert Task.of(torch.compile(made("bert"))) == Task("embedding")  # type: ignore[arg-type]
    assert Task.of(nn.DataParallel(made("vit"))) == Task("image-classification")


def test_a_text_tower_says_what_its_end_token_says() -> None:
    import transformers

    shape = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    tower = transformers.CLIPTextModel(transformers.CLIPTextConfig(**shape, vocab_size=32, eos_token_id=2)).eval()
    task = Task.of(tower)
    with torch.no_grad():
        output = tower(IDS)
    assert task == Task("embedding", "pooler") and torch.equal(
        task.answers(output, {"input_ids": IDS}), output.pooler_output
    )


def test_places_to_fill_in_are_what_is_compared() -> None:
    labels = torch.tensor([[-100, 6, -100, -100], [9, -100, -100, -100]])
    given, task = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}, Task("masked-lm")
    assert torch.equal(task.answers(SimpleNamespace(logits=STATES), given), STATES[labels != -100])
    assert task.count(given) == 2 and task.count({"input_ids": IDS, "attention_mask": MASK}) == 6


def test_a_sequence_of_padding_has_no_embedding() -> None:
    given = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}
    with pytest.raises(StreamlineError, match="no real token"):
        Task("embedding").answers(SimpleNamespace(last_hidden_state=STATES), given)


def test_embeddings_of_states_with_the_tokens_in_front_are_refused() -> None:
    """Their mean over what is taken for a sequence's tokens would be one over sequences."""
    for batch_first in (True, False):
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), 2)
        if batch_first:
            Task("embedding").check_model(encoder)
            continue
        with pytest.raises(StreamlineError, match="Build it with batch_first=True"):
            Task("embedding").check_model(encoder)
