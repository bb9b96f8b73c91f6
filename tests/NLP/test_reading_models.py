"""Loading models that were saved elsewhere: in fp32, with matching weights and labels, or with a one-line error."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from kd.common.pretrained import load_model, load_tokenizer, reading, stage_loader
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData, Texts
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.exportable import load as load_exportable
from kd.nlp.student_model.layers import load_encoder
from kd.nlp.teacher_model.generative import byte_level_bpe, load_language_model, load_translator
from kd.nlp.teacher_model.teacher import in_label_order, load_classifier, load_trained, vocabulary

TEXTS = ["good and sweet", "bad", "good good good", "bad and sour and bad"]
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
LABELS = {0: "negative", 1: "positive"}


def two_labels(names: tuple[str, ...] = ("negative", "positive"), metric: str = "accuracy") -> TextData:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1, 0], "sample_id": [0, 1, 2, 3]})
    return TextData("tastes", {"train": rows, "validation": rows}, list(names), "classification", metric, "f")


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab=vocabulary(TEXTS * 2), model_max_length=32)


def bert(labels: dict[int, str] | None = None, kind: Any = BertForSequenceClassification) -> PreTrainedModel:
    names = labels or LABELS
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer()), id2label=names, label2id={name: i for i, name in names.items()}, **SHAPE
    )
    return kind(config)


def saved(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rewritten(folder: Path, change: Any) -> Path:
    """Changes the names and tensors of the weights in a folder."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    weights, others = model.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_loaded_in_fp32(tmp_path, dtype):
    causal_tokenizer = byte_level_bpe(TEXTS, 260, 16)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=len(causal_tokenizer), n_embd=16, n_layer=1, n_head=2))
    gpt.to(dtype).save_pretrained(tmp_path / "gpt")
    causal_tokenizer.save_pretrained(tmp_path / "gpt")
    marian = MarianMTModel(MarianConfig(
        vocab_size=len(tokenizer()), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, decoder_start_token_id=0,
    ))  # fmt: skip
    saved(tmp_path / "marian", marian.to(dtype))
    folder = str(saved(tmp_path / "bert", bert().to(dtype)))
    bottleneck = BottleneckClassifier.from_encoder(bert().base_model, LABELS, "mean", codebooks=2, codebook_size=4)
    bottleneck.to(dtype).save_pretrained(tmp_path / "bottleneck")
    models: dict[str, Any] = {
        "classifier": load_classifier(folder, two_labels()).model,
        "encoder": load_encoder(folder),
        "stage": stage_loader(AutoModelForSequenceClassification)(folder),
        "bottleneck": stage_loader(AutoModelForSequenceClassification)(str(tmp_path / "bottleneck")),
        "exportable": load_exportable(folder, None).model,
        "causal": load_language_model(str(tmp_path / "gpt"), 8).model,
        "translator": load_translator(str(tmp_path / "marian"), 16).model,
    }
    for name, model in models.items():
        floats = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
        assert floats == {torch.float32}, name
        assert model.config.dtype in (torch.float32, "float32"), name  # of models built from the config, like a cut
    assert torch.equal(models["classifier"].classifier.weight, bert().classifier.weight.to(dtype).float())


# ---- weights that do not fit ----


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module."])
@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForMaskedLM])
def test_prefixes_of_wrappers_are_removed(tmp_path, capsys, prefix, kind):
    model = bert(kind=kind)
    folder = rewritten(saved(tmp_path, model), lambda w: {prefix + name: tensor for name, tensor in w.items()})
    found = load_classifier(str(folder), two_labels())
    assert same(found.model.bert.encoder, model.bert.encoder)
    assert found.trained == (kind is BertForSequenceClassification)
    assert f"without the prefix {prefix!r}" in capsys.readouterr().out and prefix in found.notes[0]


MISFITS: dict[str, tuple[Any, str]] = {
    "no head": (
        lambda w: {name: t for name, t in w.items() if "classifier" not in name},
        "missing: classifier.bias, classifier.weight",
    ),
    "no pooler": (lambda w: {name: t for name, t in w.items() if "pooler" not in name}, "missing: bert.pooler.dense"),
    "no layer": (lambda w: {name: t for name, t in w.items() if ".layer.1." not in name}, "and 13 more"),
    "another layer": (
        lambda w: w | {name.replace(".1.", ".2."): t + 0 for name, t in w.items() if ".layer.1." in name},
        "unknown: bert.encoder.layer.2.attention",
    ),
    "both with a prefix and without": (
        lambda w: w | {f"module.{name}": t + 1 for name, t in w.items()},
        "unknown: module.bert",
    ),
    "unknown prefix": (lambda w: {f"net.{name}": t for name, t in w.items()}, "unknown: net.bert."),
    "other size": (
        lambda w: w | {"classifier.weight": torch.zeros(7, 16)},
        r"of another size: classifier.weight \(7, 16\) instead of \(2, 16\)",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_trained_classifier_with_wrong_weights_is_an_error(tmp_path, capfd, name):
    change, named = MISFITS[name]
    folder = rewritten(saved(tmp_path, bert()), change)
    with pytest.raises(UserError, match=f"^the weights of .* do not fit its config.json: .*{named}") as raised:
        load_trained(str(folder), two_labels())
    assert "\n" not in str(raised.value) and "LOAD REPORT" not in "".join(capfd.readouterr())


def test_weights_of_other_heads_are_ignored(tmp_path):
    model = bert()
    extra = {"bert.embeddings.position_ids": torch.arange(9), "cls.predictions.bias": torch.zeros(3)}
    assert same(load_trained(str(rewritten(saved(tmp_path, model), lambda w: w | extra)), two_labels()).model, model)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
    gpt.save_pretrained(tmp_path / "gpt")  # without the head, which is tied to the embeddings
    assert "lm_head.weight" not in load_file(tmp_path / "gpt" / "model.safetensors")
    assert same(load_model(AutoModelForCausalLM, tmp_path / "gpt"), gpt)


def test_an_encoder_may_lack_its_head_and_pooler_but_not_a_layer(tmp_path):
    model = bert(kind=BertForMaskedLM)
    folder = saved(tmp_path, model)
    found = load_classifier(str(folder), two_labels())
    assert not found.trained and same(found.model.bert.encoder, model.bert.encoder)
    rewritten(folder, lambda w: {name: t for name, t in w.items() if ".layer.1." not in name})
    for read in (lambda: load_classifier(str(folder), two_labels()), lambda: load_encoder(folder)):
        with pytest.raises(UserError, match="do not fit its config.json: missing: .*layer.1"):
            read()


# ---- files that cannot be read ----


def break_file(name: str, content: bytes | None) -> Any:
    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return change


def pickled(thing: Any) -> Any:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(thing(weights), folder / "pytorch_model.bin")

    return change


DAMAGES: dict[str, tuple[Any, str]] = {
    "empty weights": (break_file("model.safetensors", b""), "damaged or truncated"),
    "cut weights": (lambda f: break_file("model.safetensors", (f / "model.safetensors").read_bytes()[:-99])(f),
                    "damaged or truncated"),
    "no weights": (break_file("model.safetensors", None), "no file named model.safetensors"),
    "a pickled model": (pickled(lambda weights: bert()), "contains more than tensors and is not unpickled"),
    "a pickled list": (pickled(lambda weights: [1, 2]), "cannot read a text encoder from"),
    "a wrapped dict": (pickled(lambda weights: {"state_dict": weights, "epoch": 3}), "unknown: epoch, state_dict"),
    "damaged config": (break_file("config.json", b"{"), "config.json' is not a valid JSON file"),
    "config of other bytes": (break_file("config.json", b"\xff\xfe\x00"), "config.json' is not a valid JSON file"),
    "config of a number": (break_file("config.json", b'{"model_type": "bert", "hidden_size": "x"}'), "hidden_size"),
    "unknown architecture": (break_file("config.json", b'{"model_type": "none"}'), "model type `none`"),
    "custom code": (
        break_file("config.json", b'{"model_type": "none", "auto_map": {"AutoConfig": "x.Y"}}'), "not executed"),
    "damaged tokenizer": (break_file("tokenizer.json", b"{"), "cannot read a text encoder from"),
    "damaged tokenizer_config": (break_file("tokenizer_config.json", b"{"), "cannot read a text encoder from"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "has no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_give_one_line_with_the_cause(tmp_path, name):
    change, cause = DAMAGES[name]
    folder = saved(tmp_path, bert())
    change(folder)
    with pytest.raises(UserError) as raised:
        load_trained(str(folder), two_labels())
    message = str(raised.value)
    assert cause in message and str(folder)[:80] in message and "\n" not in message and len(message) < 600
    assert "Hub" not in message and "trust_remote_code" not in message


def test_pickles_of_tensors_are_loaded(tmp_path):
    folder = saved(tmp_path, bert())
    pickled(lambda weights: weights)(folder)
    assert same(load_trained(str(folder), two_labels()).model, bert())


def test_a_damaged_stage_of_a_tokenizer_gives_one_line(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    read = stage_loader(AutoTokenizer, load_tokenizer)
    assert read(tmp_path).get_vocab() == tokenizer().get_vocab()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"^cannot read a finished stage from {tmp_path}: "):
        read(tmp_path)


def test_a_name_that_is_not_a_folder(tmp_path):
    file = tmp_path / "teacher.pth"
    torch.save({}, file)
    for name, message in ((str(file), "is a file: pass a folder"), ("x" * 5000, "no model x"),
                            (f"{tmp_path}/{'y' * 400}", "no model /")):  # fmt: skip
        with pytest.raises(UserError, match=message) as raised:
            load_classifier(name, two_labels())
        assert len(str(raised.value)) < 700


def test_any_exception_of_a_parser_becomes_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for error in (RuntimeError("two\nlines"), KeyError("weight"), UnicodeDecodeError("utf-8", b"", 0, 1, "bad byte")):
        with (
            pytest.raises(UserError, match=f"^cannot read a model from {tmp_path}: ") as raised,
            reading(tmp_path, "a model"),
        ):
            raise error
        assert "\n" not in str(raised.value)
    with pytest.raises(KeyboardInterrupt), reading(tmp_path, "a model"):
        raise KeyboardInterrupt


# ---- padding ----


def test_a_decoder_without_a_padding_token_has_the_same_logits_for_padded_texts(tmp_path, capsys):
    words = byte_level_bpe(TEXTS, 280, 32)
    config = GPT2Config(vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, id2label=LABELS, eos_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    words.pad_token = None
    words.save_pretrained(tmp_path)
    found = load_classifier(str(tmp_path), two_labels())
    assert found.tokenizer.pad_token == found.tokenizer.eos_token
    assert found.model.config.pad_token_id == found.tokenizer.pad_token_id is not None
    assert "no padding token" in found.notes[0] and found.notes[0] in capsys.readouterr().out
    texts = Texts.of(two_labels(), found.tokenizer)
    model = found.model.eval()
    keys = ("input_ids", "attention_mask")

    def logits(rows: list[int]) -> torch.Tensor:
        batch = texts.collate([texts.train[i] for i in rows])
        return model(**{key: batch[key] for key in keys}).logits

    with torch.no_grad():
        assert torch.allclose(logits([0, 1, 2, 3]), torch.cat([logits([i]) for i in range(4)]), atol=1e-5)
    found.set_max_length(32)
    with pytest.raises(UserError, match="takes at most 1024 tokens"):
        found.set_max_length(2000)


def test_the_padding_of_a_decoder_is_that_of_its_tokenizer_on_the_right(tmp_path, capsys):
    """A head that takes another token for padding would classify the padding; the config of some checkpoints does."""
    words = byte_level_bpe(TEXTS, 280, 32)
    words.pad_token = words.convert_ids_to_tokens(5)
    shape: dict[str, Any] = {"vocab_size": len(words), "hidden_size": 16, "num_attention_heads": 2}
    config = Qwen2Config(**shape, num_hidden_layers=1, num_key_value_heads=1, intermediate_size=16, pad_token_id=7)
    config.id2label = LABELS
    model = Qwen2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    found = load_classifier(str(tmp_path), two_labels())
    found.tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "right"
    assert (found.tokenizer.padding_side, found.model.config.pad_token_id) == ("right", 5)
    assert [("on the right" in note, "not that of its config.json (7)" in note) for note in found.notes] == [
        (False, True), (True, False)
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert all(note in printed for note in found.notes)
    model, texts = found.model.eval(), ["good", "really good food"]
    logits = []
    for side in ("left", "right"):  # equal for relative positions
        batch = found.tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        logits.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    single = [model(**found.tokenizer([text], return_tensors="pt")).logits for text in texts]
    for batched in logits:
        torch.testing.assert_close(batched, torch.cat(single), atol=1e-5, rtol=1e-4)


# ---- labels ----


def test_data_follow_the_label_order_of_the_model(tmp_path, capsys):
    folder = str(saved(tmp_path, bert({0: "POSITIVE", 1: "NEGATIVE"})))
    data = two_labels()
    ordered = in_label_order(folder, data)
    assert ordered.label_names == ["POSITIVE", "NEGATIVE"]
    assert ordered.splits["train"]["label"][:] == [0, 1, 0, 1]
    assert load_trained(folder, ordered).trained and in_label_order(folder, ordered) is ordered
    assert "class ids follow" in capsys.readouterr().out and "class ids follow" in ordered.notes[-1]


@pytest.mark.parametrize("kind", ["BERT", "GPT-2", "DistilBERT", "bottleneck"])
def test_the_outputs_of_a_classifier_follow_the_labels_of_the_data(tmp_path, capsys, kind):
    """F1 counts label 1 as positive, so the data keep their order. A student may have another than its teacher."""
    names = ["sour", "negative", "positive"]
    data = replace(two_labels(metric="f1"), label_names=["negative", "positive", "sour"])
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    size = len(tokenizer())
    if kind == "GPT-2":
        config = GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, **labels)
        model: Any = GPT2ForSequenceClassification(config)
    elif kind == "DistilBERT":
        model = AutoModelForSequenceClassification.from_config(
            DistilBertConfig(vocab_size=size, dim=3, n_layers=1, n_heads=1, hidden_dim=3, **labels)
        )  # the head is not its only layer of three outputs
    elif kind == "bottleneck":
        shape: dict[str, Any] = {"codebooks": 2, "codebook_size": 4}
        model = BottleneckClassifier.from_encoder(bert().bert, labels["id2label"], "mean", **shape)
    else:
        model = BertForSequenceClassification(BertConfig(vocab_size=size, **SHAPE, **labels))
    folder = str(saved(tmp_path, model))
    assert in_label_order(folder, data) is data
    found = load_classifier(folder, data)
    assert found.trained and "reordered to the labels of the data: negative, positive, sour" in found.notes[0]
    assert found.notes[0] in capsys.readouterr().out
    assert found.model.config.id2label == dict(enumerate(data.label_names))
    batch = found.tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before, after = (one.eval()(**inputs).logits for one in (model, found.model))
    assert not torch.allclose(before[:, 0], before[:, 1])
    torch.testing.assert_close(after, before[:, [1, 2, 0]])


def test_unnamed_labels_are_an_error(tmp_path):
    folder = str(saved(tmp_path, bert({0: "LABEL_0", 1: "LABEL_1"})))
    for read in (load_trained, in_label_order):
        with pytest.raises(UserError, match="does not name its 2 labels .LABEL_0, ....*--label_names, or --trust"):
            read(folder, two_labels())
    assert load_trained(folder, two_labels(("0", "1"))).trained  # the labels of the data are numbers too


def test_other_labels_are_an_error_that_names_both_sets(tmp_path):
    folder = str(saved(tmp_path, bert({0: "a", 1: "b", 2: "c"})))
    with pytest.raises(UserError, match=r"classifies 3 labels \(a, b, c\), tastes has 2 \(negative, positive\)"):
        load_trained(folder, two_labels())


def test_multi_label_classifiers_are_an_error(tmp_path):
    folder = saved(tmp_path, bert())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    with pytest.raises(UserError, match="assigns several labels to a text"):
        load_trained(str(folder), two_labels())


def test_a_base_model_is_loaded_from_a_classifier(tmp_path):
    model = bert()
    assert same(load_model(AutoModel, saved(tmp_path, model), whole=False), model.bert)
