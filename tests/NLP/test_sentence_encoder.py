"""Sentence encoders: data, losses of embeddings, narrower students, the script from end to end, and saved students."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import spearmanr
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    MarianConfig,
)

from kd.common.outputs import Outputs
from kd.common.training.inference import column_array
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.nlp.data.sentences import load_pairs, load_sentences, tokenize
from kd.nlp.student_model.layers import cut_layers
from kd.nlp.student_model.narrow import channel_importance, check_narrow, narrow
from kd.nlp.student_model.sentence_encoder import SentenceEncoder, load_sentence_encoder, tiny_sentence_encoder
from kd.nlp.student_model.sentence_evaluation import is_sentence_encoder
from kd.nlp.student_model.sentence_methods import METHODS, EmbeddingPair, parse_methods, simcse, two_views
from kd_testing.readmes import run_readme
from kd_testing.scripts import run_script
from kd_testing.verdicts import check_verdict

SCRIPT = "NLP/scripts/distill_sentence_encoder.py"
TEXTS = [
    "a man is eating food",
    "a woman plays the piano",
    "the dog runs",
    "two dogs run on the grass",
    "a cat sleeps",
]
TINY = (
    "--teacher tiny-bert --texts intents --dataset intent_pairs --max_train_samples 48 --max_eval_samples 30 "
    "--student_layers 2 --per_device_train_batch_size 16 --report_to none --precision fp32 --max_length 16"
).split()

pytestmark = pytest.mark.usefixtures("narrow_bert")


@pytest.fixture(scope="module")
def encoder(narrow_bert: None) -> SentenceEncoder:
    torch.manual_seed(0)
    return tiny_sentence_encoder(TEXTS * 2, max_length=32)


@pytest.mark.parametrize(
    ("config", "architecture", "expected"),
    [
        (BertConfig(), "BertModel", True),
        (BertConfig(), "BertForMaskedLM", False),
        (GPT2Config(), "GPT2LMHeadModel", False),
        (MarianConfig(), "MarianMTModel", False),
        (BertConfig(), None, False),
    ],
)
def test_a_model_without_a_head_is_a_sentence_encoder(config: Any, architecture: str | None, expected: bool) -> None:
    config.architectures = architecture and [architecture]
    assert is_sentence_encoder(config) == expected


# ---- data ----


def test_evaluation_texts_and_repeated_ones_are_left_out(tmp_path: Path) -> None:
    rows = {"one": ["A man eats.", "Dogs run"], "two": ["He eats.", "dogs  running"], "score": [4.5, 3.25]}
    pandas.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)
    lines = ["A man eats.", " a MAN  eats", "He eats!", "A cat", "a cat.", "", "Dogs do not run"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    found = load_sentences([str(tmp_path / "lines.txt")], None, str(tmp_path / "pairs.csv"))
    assert found.texts == ["A cat", "Dogs do not run"]
    assert "2 of 7 training texts; left out: 1 texts of pairs.csv, 2 that differ" in found.notes[-1]
    assert "2 empty or repeated" in found.notes[-1]


def test_texts_come_from_all_text_columns_of_train_and_of_several_sources(tmp_path: Path) -> None:
    folder = tmp_path / "questions"
    folder.mkdir()
    train: dict[str, list[Any]] = {
        "first": [f"first {i}" for i in range(4)],
        "second": [f"second {i}" for i in range(4)],
        "same": [0, 1] * 2,
    }
    pandas.DataFrame(train).to_parquet(folder / "train.parquet")
    pandas.DataFrame({**train, "first": list("abcd")}).to_parquet(folder / "validation.parquet")
    (tmp_path / "more.jsonl").write_text('{"text": "a line"}\n{"text": null}\n')
    sources = [str(folder), str(tmp_path / "more.jsonl")]
    texts = train["first"] + train["second"] + ["a line"]
    assert load_sentences(sources, ["first", "second", "text"], "intent_pairs").texts == texts
    assert load_sentences(sources, ["second", "text"], "intent_pairs").texts == texts[4:]
    assert load_sentences(sources[:1], None, "intent_pairs").texts == texts[:8]
    with pytest.raises(UserError, match="more.jsonl has no column second, only text.*--texts_columns"):
        load_sentences(sources, ["second"], "intent_pairs")
    some = load_sentences(sources, None, "intent_pairs", most=5).texts
    assert len(some) == 5 and set(some) <= set(texts)


def test_no_pair_trains_so_train_is_a_test_split(tmp_path: Path) -> None:
    rows = {
        "text1": [f"one {i}" for i in range(40)],
        "text2": [f"two {i}" for i in range(40)],
        "score": np.linspace(0, 5, 40),
    }
    pandas.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)
    pairs = load_pairs(str(tmp_path / "pairs.csv"))
    assert {name: len(rows) for name, rows in pairs.splits.items()} == {"validation": 4, "test": 36}
    assert pairs.task == "regression" and "so train is the test split" in pairs.notes[-1]
    evaluated = load_pairs(str(tmp_path / "pairs.csv"), needs_validation=False)
    assert {name: len(rows) for name, rows in evaluated.splits.items()} == {"test": 40}
    pandas.DataFrame(rows).drop(columns="text2").to_csv(tmp_path / "single.csv", index=False)
    with pytest.raises(UserError, match="one text per row.*--text_columns"):
        load_pairs(str(tmp_path / "single.csv"))


# ---- methods ----


def outputs_of(hidden: torch.Tensor, mask: torch.Tensor, embedding: torch.Tensor) -> tuple[Outputs, Outputs]:
    return Outputs(features={"hidden": hidden}, mask=mask), Outputs(features={"embedding": embedding})


def test_terms_compare_pooled_states_with_the_embedding() -> None:
    hidden, mask = torch.randn(4, 3, 6, requires_grad=True), torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    embedding = torch.randn(4, 6)
    mean = torch.stack([hidden[i, : mask[i].sum()].mean(0) for i in range(4)])
    cosine = torch.nn.functional.cosine_similarity
    method = parse_methods("embedding:weight=2+similarity")(EmbeddingPair(6, 6, "mean"))
    found = method.objective(*outputs_of(hidden, mask, embedding), None)
    torch.testing.assert_close(found["embedding"], 2 * (1 - cosine(mean, embedding)).mean())
    pairs = [
        (cosine(mean[i], mean[j], 0) - cosine(embedding[i], embedding[j], 0)) ** 2 for i in range(4) for j in range(4)
    ]
    torch.testing.assert_close(found["similarity"], 10 * torch.stack(pairs).mean())


@pytest.mark.parametrize("name", METHODS)
def test_a_student_of_another_width_gets_gradients(name: str) -> None:
    hidden, mask = torch.randn(4, 3, 4, requires_grad=True), torch.ones(4, 3, dtype=torch.long)
    method = parse_methods(name)(EmbeddingPair(4, 6, "mean"))
    found = method.objective(*outputs_of(hidden, mask, torch.randn(4, 6)), None)
    torch.stack(list(found.values())).sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    assert method.auxiliary_parameters == (4 * 6 + 6 if name == "embedding" else 0)


def test_simcse_reads_two_views_of_each_row(encoder: SentenceEncoder) -> None:
    batch = two_views(encoder.collate)(list(tokenize(TEXTS, encoder.tokenizer)))
    first, second = batch["input_ids"].chunk(2)
    assert torch.equal(first, second)
    hidden = torch.randn(6, 2, 4)
    states = Outputs(features={"hidden": hidden}, mask=torch.ones(6, 2, dtype=torch.long))
    loss = simcse("mean", 0.05).objective(states, None, None)["contrastive"]
    first, second = torch.nn.functional.normalize(hidden.mean(1), dim=-1).chunk(2)
    torch.testing.assert_close(loss, -(first @ second.T / 0.05).log_softmax(-1).diagonal().mean())


# ---- narrower students ----


def test_pruning_channels_without_effect_changes_nothing() -> None:
    """A BERT of width 8 inside one of width 16 whose other channels, heads and neurons are zero."""
    sizes: dict[str, Any] = {"vocab_size": 10, "num_hidden_layers": 2, "layer_norm_eps": 0.0}
    small = BertModel(BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=12, **sizes)).eval()
    config = BertConfig(hidden_size=16, num_attention_heads=4, intermediate_size=24, **sizes)
    large = BertModel(config).eval()
    kept = torch.tensor([0, 2, 5, 7, 8, 11, 12, 15])
    heads, neurons = torch.cat([torch.arange(4) + 4, torch.arange(4) + 12]), torch.arange(12) * 2
    weights = {}
    for name, tensor in large.state_dict().items():
        source, rows, columns = small.state_dict()[name], kept, kept
        if "attention.self" in name:
            rows = heads
        elif "intermediate" in name:
            rows = neurons
        elif "embeddings.weight" in name:
            rows = torch.arange(len(tensor))
        if "attention.output.dense" in name:
            columns = heads
        elif "output.dense" in name:
            columns = neurons
        weights[name] = torch.zeros_like(tensor)
        weights[name][rows if tensor.dim() == 1 else (rows[:, None], columns)] = source
    large.load_state_dict(weights)
    importance = torch.zeros(16).index_fill(0, kept, 1.0)
    narrowed = narrow(large, 8, importance).eval()
    for name, tensor in small.state_dict().items():
        assert torch.equal(narrowed.state_dict()[name], tensor), name
    ids = torch.randint(10, (2, 5))
    torch.testing.assert_close(narrowed(ids).last_hidden_state, small(ids).last_hidden_state)


def test_importance_is_the_variance_over_tokens(encoder: SentenceEncoder) -> None:
    rows = tokenize(TEXTS, encoder.tokenizer)
    states = []
    for row in rows:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            states.append(torch.stack(encoder.model.eval()(**inputs, output_hidden_states=True).hidden_states)[:, 0])
    expected = torch.cat(states, dim=1).var(dim=1).sum(dim=0)
    torch.testing.assert_close(channel_importance(encoder.model, rows, encoder.collate), expected)


def test_widths_and_layouts_that_cannot_be_narrowed(encoder: SentenceEncoder) -> None:
    for width in (0, 24, 32, 64):  # heads have width 16
        with pytest.raises(UserError, match="--student_width must be a multiple of 16"):
            check_narrow(encoder.model, width)
    other = DistilBertModel(DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=10))
    with pytest.raises(UserError, match="--student_width needs the layout of BERT"):
        check_narrow(other, 16)


def test_the_kept_layers_are_those_of_the_teacher(encoder: SentenceEncoder) -> None:
    student = cut_layers(encoder.model, 2, kept=[0, 3])
    for place, layer in enumerate((0, 3)):
        original = encoder.model.get_submodule(f"encoder.layer.{layer}").state_dict()
        for name, tensor in student.get_submodule(f"encoder.layer.{place}").state_dict().items():
            assert torch.equal(tensor, original[name])


# ---- loading and saving ----


def test_a_saved_encoder_computes_the_same_embeddings(encoder: SentenceEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    loaded = load_sentence_encoder(str(tmp_path))
    assert (loaded.pooling, loaded.notes, loaded.tokenizer.model_max_length) == ("mean", [], 32)
    embeddings = encoder.embed(tokenize(TEXTS, encoder.tokenizer))
    np.testing.assert_allclose(loaded.embed(tokenize(TEXTS, loaded.tokenizer)), embeddings, atol=1e-6)
    model, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    for text, embedding in zip(TEXTS, embeddings, strict=True):  # by hand: no padding, so the mean of all tokens
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(mean / mean.norm(), embedding, atol=1e-5)


def test_sentence_transformers_loads_the_student(encoder: SentenceEncoder, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    for pooling in ("mean", "cls", "last"):
        folder = tmp_path / pooling
        one = SentenceEncoder(encoder.model, encoder.tokenizer, pooling)
        one.save_pretrained(folder)
        model = library.SentenceTransformer(str(folder), device="cpu")
        assert model.max_seq_length == 32
        np.testing.assert_allclose(model.encode(TEXTS), one.embed(tokenize(TEXTS, one.tokenizer)), atol=1e-5)
        model.save(str(folder / "again"))
        assert load_sentence_encoder(str(folder / "again")).pooling == pooling


@pytest.mark.parametrize(
    "config, modules, expected",
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, [], "cls"),
        ({"pooling_mode": "mean"}, ["models.Pooling", "models.Normalize"], "mean"),
        (
            {"pooling_mode": ["cls", "mean"]},
            [],
            "cls_token and mean_tokens, and only .* are supported: pass another --teacher",
        ),
        ({"pooling_mode_max_tokens": True}, [], "max_tokens, and only cls_token"),
        ({"pooling_mode": "mean"}, ["models.Pooling", "models.Dense"], "module Dense, which is not supported"),
    ],
)
def test_poolings_of_sentence_transformers(
    config: dict[str, object], modules: list[str], expected: str, encoder: SentenceEncoder, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (tmp_path / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.{name}"} for name in modules]))
    if " " not in expected:
        assert load_sentence_encoder(str(tmp_path)).pooling == expected
        return
    with pytest.raises(UserError, match=expected):
        load_sentence_encoder(str(tmp_path))


def test_a_folder_without_pooling_is_noted(encoder: SentenceEncoder, tmp_path: Path) -> None:
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded = load_sentence_encoder(str(tmp_path), 16)
    assert loaded.pooling == "mean" and "names no pooling" in loaded.notes[0]
    with pytest.raises(UserError, match="--max_length 1000"):
        load_sentence_encoder(str(tmp_path), 1000)


# ---- the script ----


@pytest.fixture(scope="module")
def finished(narrow_bert: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "encoder"
    run_script(SCRIPT, *TINY, "--student_width", 16, "--output_dir", run)
    return run


def test_the_script_distills_and_reports(finished: Path) -> None:
    results = read_json(finished / "results.json")
    models = results["models"]
    assert set(models) == {"teacher", "control", "student", "untrained"}
    assert models["control"]["parameters"] == models["student"]["parameters"] < models["teacher"]["parameters"]
    assert results["primary_metric"] == {"split": "validation", "name": "spearman"}
    assert results["data"]["train"] == 48 and results["data"]["validation"] == results["data"]["test"] == 30
    assert set(results["verdict"]["others"]) == {"untrained"}
    report = (finished / "report.md").read_text()
    assert "the untrained model" in report and "left out: 0 texts of intent_pairs" in report
    check_verdict(results)
    card = (finished / "student" / "README.md").read_text()
    for line in ("library_name: sentence-transformers", "pipeline_tag: sentence-similarity", "spearmanr"):
        assert line in card


def test_the_reported_metric_is_that_of_the_saved_student(finished: Path) -> None:
    student, pairs = load_sentence_encoder(str(finished / "student")), load_pairs("intent_pairs", most=30)
    assert student.model.config.hidden_size == 16
    metrics = read_json(finished / "results.json")["models"]["student"]["metrics"]
    for split, rows in pairs.splits.items():
        first, second = (student.embed(tokenize(rows[name][:], student.tokenizer)) for name in ("text", "text_pair"))
        expected = spearmanr((first * second).sum(1), column_array(rows, "label")).statistic
        assert metrics[split]["spearman"] == pytest.approx(expected, abs=1e-6)


def test_evaluate_reproduces_the_report(finished: Path, tmp_path: Path) -> None:
    files = "--json", tmp_path / "metrics.json", "--predictions", tmp_path / "similarities.csv"
    run_script("NLP/scripts/evaluate.py", finished, *files)
    reported = read_json(finished / "results.json")["models"]["student"]["metrics"]
    found = read_json(tmp_path / "metrics.json")["metrics"]
    for split in ("validation", "test"):
        assert found[split]["spearman"] == pytest.approx(reported[split]["spearman"], abs=1e-6)
    table = pandas.read_csv(tmp_path / "similarities.csv")
    validation = table[table.split == "validation"]
    expected = spearmanr(validation.label, validation.similarity).statistic
    assert len(table) == 60 and expected == pytest.approx(found["validation"]["spearman"], abs=1e-6)


@pytest.mark.slow
def test_an_interrupted_run_continues(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its results, and with the finished control, the run gives the same student."""
    run = tmp_path / "encoder"
    shutil.copytree(finished, run)
    (run / "results.json").unlink()
    for folder in ("student", "stages/student"):
        shutil.rmtree(run / folder)
    run_script(SCRIPT, *TINY, "--student_width", 16, "--output_dir", run, "--resume_from_checkpoint")
    again, before = (read_json(folder / "results.json")["models"] for folder in (run, finished))
    assert again["student"]["metrics"] == before["student"]["metrics"]


@pytest.mark.slow
def test_the_exported_student_computes_its_embeddings(
    finished: Path, onnx_operators_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("common/export/__main__.py", finished, "--format", "onnx")
    student = load_sentence_encoder(str(finished / "student"))
    texts = ["cancel my meeting", "call off the meeting", "how far is the moon"]
    embeddings = run_readme(finished / "export")["embeddings"]
    np.testing.assert_allclose(embeddings, student.embed(tokenize(texts, student.tokenizer)), atol=1e-5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--teacher", "owner/no-such-encoder"], "--teacher tiny-bert, which needs no download"),
        (["--texts", "owner/no-such-texts"], "pass --texts FOLDER with lines"),
        (["--dataset", "owner/no-such-pairs"], "pass --dataset FOLDER"),
        (["--method", "embed"], "did you mean embedding"),
        (["--student_layers", "9"], "--student_layers must be between 1 and the teacher's 4"),
        (["--kept_layers", "2", "1"], "--kept_layers must be layers of the teacher in order, from 0 to 3"),
        (["--student_width", "20"], "--student_width must be a multiple of 16"),
        (["--alpha", "0.5"], "--alpha has no effect"),
        (["--no_control", "--dropout", "0.2"], "--dropout has no effect, because --no_control is set"),
    ],
)
def test_refusals_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags_of_tiny = dict(zip(TINY[::2], TINY[1::2], strict=True))
    kept = {flag: value for flag, value in flags_of_tiny.items() if flag != "--student_layers" and flag not in flags}
    words = [word for pair in kept.items() for word in pair]
    with pytest.raises(SystemExit) as stopped:
        run_script(SCRIPT, *words, *flags, "--output_dir", tmp_path / "run")
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and message in error[-1]
    assert not (tmp_path / "run").exists()


# ---- a published encoder ----


@pytest.mark.slow
def test_a_published_encoder_and_its_cuts(shared: Path) -> None:
    """The figures of the teacher and of its untrained cuts on STS-B validation."""
    from kd.nlp.student_model.sentence_evaluation import similarities

    pairs = load_pairs(str(shared / "data" / "glue_stsb"))
    del pairs.splits["test"]
    teacher = load_sentence_encoder(str(shared / "models" / "all-MiniLM-L6-v2"))
    labels = column_array(pairs.splits["validation"], "label")
    for kept, expected in (([0, 1, 2, 3, 4, 5], 0.867), ([0, 2, 5], 0.820), ([1, 3, 5], 0.761)):
        student = SentenceEncoder(cut_layers(teacher.model, len(kept), kept), teacher.tokenizer)
        found = spearmanr(similarities(student, pairs)["validation"], labels).statistic
        assert found == pytest.approx(expected, abs=6e-4)
