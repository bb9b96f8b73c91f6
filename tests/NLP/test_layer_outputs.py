"""Hidden states are the outputs of layers, for student and teacher, cached or live, in every kind of encoder."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
)

from kd.common.methods import Method
from kd.common.objective import Objective
from kd.common.outputs import FeatureHooks, Outputs
from kd.nlp.data.loading import TextData, Texts
from kd.nlp.student_model import teacher_outputs
from kd.nlp.student_model.layers import cut_layers, layer_paths
from kd.nlp.student_model.methods import embeddings, hidden_states, teacher_samples
from kd.nlp.student_model.teacher_outputs import teacher_kwargs
from kd.nlp.teacher_model.teacher import encoder_of, vocabulary

TEXTS = ["a red cat", "a dog", "the small cat and the big red dog and the hat", "hat", "a dog and a cat"]
WORDS = BertTokenizer(vocab=vocabulary(TEXTS * 2), model_max_length=32)
SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "BERT": BertConfig(**SHAPE),
    "DistilBERT": DistilBertConfig(vocab_size=len(WORDS), dim=16, n_layers=2, n_heads=2, hidden_dim=16),
    "RoBERTa": RobertaConfig(**SHAPE),
    "ELECTRA": ElectraConfig(**SHAPE, embedding_size=8),
    "ModernBERT": ModernBertConfig(**SHAPE),
    "Qwen2": Qwen2Config(**SHAPE, num_key_value_heads=1),
    "GPT-2": GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, pad_token_id=0),
}
WITH_EMBEDDINGS = ("BERT", "DistilBERT", "RoBERTa", "ELECTRA", "ModernBERT")
WITH_FINAL_NORM = ("ModernBERT", "Qwen2", "GPT-2")


def classifier(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS[kind])
    for name, weight in model.named_parameters():
        if "norm" in name.lower() or "ln_f" in name:
            torch.nn.init.uniform_(weight, 0.5, 2.0)  # a norm that changes its input
    return model.eval()


@pytest.fixture(scope="module")
def texts() -> Texts:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1, 0], "sample_id": list(range(5))})
    return Texts.of(
        TextData("few", {"train": rows, "validation": rows}, ["a", "b"], "classification", "accuracy", "f"), WORDS
    )


@pytest.fixture
def run(tmp_path: Path) -> Any:
    args = SimpleNamespace(precision="fp32")
    return SimpleNamespace(args=args, folder=tmp_path, shared=None, timed=lambda name: nullcontext())


def batch_of(texts: Texts, model: PreTrainedModel, rows: list[int]) -> dict[str, torch.Tensor]:
    batch = texts.collate([texts.train[i] for i in rows])
    return {name: batch[name] for name in WORDS.model_input_names if name not in texts.unused_inputs(model)}


def recorded(model: PreTrainedModel, inputs: dict[str, torch.Tensor], paths: dict[str, str]) -> Outputs:
    hooks = FeatureHooks(model, paths)
    with torch.no_grad():
        logits = model(**inputs).logits
    hooks.remove()
    return Outputs(logits=logits, features=hooks.take(), mask=inputs["attention_mask"])


def matched(kind: str, model: PreTrainedModel) -> Method:
    found = hidden_states(model, model, 1.0, "l2", pooling="cls")
    return found + embeddings(model, model, 1.0, "l2") if kind in WITH_EMBEDDINGS else found


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_student_equal_to_its_teacher_has_zero_loss_live_and_cached(monkeypatch, texts, run, kind):
    model = classifier(kind)
    matching = matched(kind, model)
    rows = [3, 2, 0]  # the cache has another order and padding
    inputs = batch_of(texts, model, rows)
    texts = Texts(texts.data, {"train": texts.train.remove_columns(texts.unused_inputs(model))}, texts.collate)
    student = recorded(model, inputs, matching.features)

    monkeypatch.setattr(teacher_outputs, "FEATURE_BYTES", 0)
    live = teacher_kwargs(run, model, texts, matching)
    assert live["teacher_features"] == matching.teacher_features
    teacher = recorded(live["teacher"], inputs, live["teacher_features"])
    losses = Objective(**matching.terms)(student, teacher, None)
    assert losses.keys() >= {"hidden_0", "hidden_1", "hidden_pooled"}
    assert {name: loss.item() for name, loss in losses.items()} == dict.fromkeys(losses, 0.0)

    monkeypatch.undo()
    cached = teacher_kwargs(run, model, texts, matching)["teacher_outputs"]
    outputs = cached.batch(torch.tensor(rows), inputs["attention_mask"].shape[1])
    real = inputs["attention_mask"].bool()
    for name, states in outputs.features.items():
        assert states.dtype == torch.float16
        torch.testing.assert_close(states[real].float(), teacher.features[name][real], rtol=1e-3, atol=1e-3)
    losses = Objective(**matching.terms)(student, outputs, None)
    assert sum(losses.values()).item() < 1e-5  # the error of fp16


def test_cached_states_beyond_fp16_are_stored_in_fp32(texts, run):
    model = classifier("BERT")
    last = layer_paths(model)[-1]
    torch.nn.init.constant_(model.get_submodule(f"{last}.output.LayerNorm").bias, 1e5)
    cached = teacher_kwargs(run, model, texts, Method({}, {}, {"last": last}))["teacher_outputs"]
    states = cached.batch(torch.arange(5)).features["last"]
    assert states.isfinite().all() and states.max() > 9e4


@pytest.mark.parametrize("kind", WITH_FINAL_NORM)
def test_layers_are_matched_before_a_final_norm(texts, run, kind):
    """The final norms of student and teacher differ, so the last layers are aligned before them."""
    model = classifier(kind)
    inputs = batch_of(texts, model, [0, 1, 2])
    paths = {f"layer_{i}": path for i, path in enumerate(layer_paths(model))}
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    found = recorded(model, inputs, paths)
    assert torch.equal(found.features["layer_0"], states[1])
    assert not torch.allclose(found.features["layer_1"], states[2], atol=1e-2)
    norm = next(module for name, module in encoder_of(model).named_modules() if name in ("final_norm", "norm", "ln_f"))
    torch.testing.assert_close(norm(found.features["layer_1"]), states[2])
    texts = Texts(texts.data, {"train": texts.train.remove_columns(texts.unused_inputs(model))}, texts.collate)
    cached = teacher_kwargs(run, model, texts, Method({}, {}, paths), logits=False)["teacher_outputs"]
    outputs, real = cached.batch(torch.arange(3), inputs["attention_mask"].shape[1]), inputs["attention_mask"].bool()
    for name in paths:
        states = outputs.features[name][real].float()
        torch.testing.assert_close(states, found.features[name][real], rtol=1e-3, atol=1e-3)


def test_pooled_features_of_a_teacher_are_the_matched_ones(texts):
    model = classifier("ModernBERT")
    torch.manual_seed(0)
    pooled, labels = teacher_samples(model, texts, "cls", "fp32")
    rows = [int(texts.train["labels"][:].index(int(label))) for label in labels[:1]]
    found = recorded(model, batch_of(texts, model, [0, 1, 2, 3, 4]), {"last": layer_paths(model)[-1]})
    firsts = found.features["last"][:, 0]
    assert rows and all(any(torch.allclose(row, first, atol=1e-5) for first in firsts) for row in pooled)


def test_a_cut_student_has_the_layers_that_it_is_aligned_to():
    model = AutoModelForSequenceClassification.from_config(BertConfig(**(SHAPE | {"num_hidden_layers": 12})))
    student = cut_layers(model, 6)
    paths = [layer_paths(model)[j] for j in (1, 3, 5, 7, 9, 11)]
    assert list(hidden_states(student, model, 1.0).teacher_features.values()) == paths
    for new, old in enumerate((1, 3, 5, 7, 9, 11)):
        weights = [m.bert.encoder.layer[i].output.dense.weight for m, i in ((student, new), (model, old))]
        assert torch.equal(*weights)
