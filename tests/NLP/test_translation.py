"""Translation: data, models, and distillation from end to end on small data."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, T5Config, T5ForConditionalGeneration

from kd.common.metrics.quality import translation_metrics
from kd.common.outputs import Outputs
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError
from kd.nlp.data import number_words
from kd.nlp.data.translation import TranslationCollator, load_translation_data, tokenize_translation
from kd.nlp.scripts.distill_translation import Arguments, TranslationTrainingArguments
from kd.nlp.student_model.layers import alternating_layers, cut_translator
from kd.nlp.student_model.token_objective import divergence_of, token_level
from kd.nlp.student_model.translation import TranslationTask, load_named_models
from kd.nlp.teacher_model.generative import Generator, joint_bpe, random_marian, translate
from kd_testing.evaluations import check_evaluation
from kd_testing.readmes import run_readme
from kd_testing.scripts import recipe_of, run_script
from kd_testing.verdicts import check_verdict, check_verdict_over_seeds

SCRIPT = "NLP/scripts/distill_translation.py"
TINY = (
    "--teacher_layers 1 --teacher_width 32 --student_width 32 --vocabulary_size 120 --max_length 12 --beams 2 "
    "--teacher_epochs 2 --num_train_epochs 2 --per_device_train_batch_size 16 --precision fp32 --report_to none"
).split()
IDS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


# ---- the embedded dataset ----


@pytest.mark.parametrize(
    ("number", "english", "german"),
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (7, "seven", "sieben"),
        (12, "twelve", "zwölf"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (21, "twenty one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (66, "sixty six", "sechsundsechzig"),
        (77, "seventy seven", "siebenundsiebzig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred and one", "einhunderteins"),
        (421, "four hundred and twenty one", "vierhunderteinundzwanzig"),
        (1000, "one thousand", "eintausend"),
        (1005, "one thousand and five", "eintausendfünf"),
        (1200, "one thousand two hundred", "eintausendzweihundert"),
        (21000, "twenty one thousand", "einundzwanzigtausend"),
        (101001, "one hundred and one thousand and one", "einhunderteintausendeins"),
        (
            987654,
            "nine hundred and eighty seven thousand six hundred and fifty four",
            "neunhundertsiebenundachtzigtausendsechshundertvierundfünfzig",
        ),
    ],
)
def test_numbers_in_words(number, english, german):
    assert (number_words.english(number), number_words.german(number)) == (english, german)


@pytest.mark.parametrize(
    ("number", "english", "german"),
    [
        (1, "first", "erste"),
        (3, "third", "dritte"),
        (7, "seventh", "siebte"),
        (8, "eighth", "achte"),
        (12, "twelfth", "zwölfte"),
        (19, "nineteenth", "neunzehnte"),
        (20, "twentieth", "zwanzigste"),
        (31, "thirty first", "einunddreißigste"),
        (101, "one hundred and first", "einhunderterste"),
        (1000, "one thousandth", "eintausendste"),
    ],
)
def test_ordinals_in_words(number, english, german):
    assert (number_words.english_ordinal(number), number_words.german_ordinal(number)) == (english, german)


@pytest.mark.parametrize(
    ("hour", "minutes", "english", "german"),
    [
        (1, 0, "one o'clock", "ein Uhr"),
        (3, 30, "half past three", "halb vier"),
        (12, 30, "half past twelve", "halb eins"),
        (8, 15, "quarter past eight", "Viertel nach acht"),
        (8, 45, "quarter to nine", "Viertel vor neun"),
        (6, 25, "twenty five past six", "fünf vor halb sieben"),
        (6, 35, "twenty five to seven", "fünf nach halb sieben"),
        (12, 50, "ten to one", "zehn vor eins"),
    ],
)
def test_times_in_words(hour, minutes, english, german):
    assert number_words.time(hour, minutes) == (english, german)


@pytest.mark.parametrize(
    ("year", "english", "german"),
    [
        (1999, "nineteen ninety nine", "neunzehnhundertneunundneunzig"),
        (1900, "nineteen hundred", "neunzehnhundert"),
        (1805, "eighteen oh five", "achtzehnhundertfünf"),
        (2026, "two thousand and twenty six", "zweitausendsechsundzwanzig"),
    ],
)
def test_years_in_words(year, english, german):
    assert number_words.year(year) == (english, german)


def test_number_words_are_deterministic_and_splits_are_disjoint():
    splits, again = number_words.load_number_words(), number_words.load_number_words()
    assert {name: len(rows) for name, rows in splits.items()} == number_words.SIZES
    for name, rows in splits.items():
        assert rows[:] == again[name][:]
    sources = [text for rows in splits.values() for text in rows["en"]]
    assert len(set(sources)) == len(sources)
    assert not re.search(r"[{}\d]", " ".join(sources + [text for rows in splits.values() for text in rows["de"]]))


# ---- other data ----

PAIRS = [{"en": f"the {name}", "de": f"{article} {noun}"} for name, article, noun in
         [("dog", "der", "Hund"), ("cat", "die", "Katze"), ("house", "das", "Haus")]]  # fmt: skip


def test_the_nested_layout_of_the_hub_equals_plain_columns(tmp_path):
    nested, plain = tmp_path / "nested", tmp_path / "plain"
    for folder in (nested, plain):
        folder.mkdir()
        for split in ("train", "validation"):
            rows = [{"translation": pair} for pair in PAIRS] if folder == nested else PAIRS
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    (first, second) = (load_translation_data(str(folder), "de", "en") for folder in (nested, plain))
    assert first.splits["train"]["source"][:] == ["der Hund", "die Katze", "das Haus"]
    assert first.splits["train"]["target"][:] == ["the dog", "the cat", "the house"]
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != load_translation_data(str(plain), "en", "de").fingerprint


def test_a_text_column_may_have_the_name_translation(tmp_path):
    rows = [{"text": pair["en"], "translation": pair["de"]} for pair in PAIRS]
    for split in ("train", "validation"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{split}.parquet")
    data = load_translation_data(str(tmp_path), "text", "translation")
    assert data.splits["train"]["target"][:] == ["der Hund", "die Katze", "das Haus"]
    with pytest.raises(UserError, match="no 'en', only text, translation"):
        load_translation_data(str(tmp_path), "en", "de")


def test_a_missing_validation_split_comes_from_train(tmp_path):
    lines = [f"word {i},Wort {i}" for i in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["english,german", *lines]))
    data = load_translation_data(str(tmp_path), "english", "german")
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 36, "validation": 4}
    assert not set(data.splits["train"]["source"][:]) & set(data.splits["validation"]["source"][:])
    assert "4 rows of train" in data.notes[0]
    np.random.seed(1)
    assert load_translation_data(str(tmp_path), "english", "german").fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (PAIRS, ("en", "fr"), "no 'fr', only en, de"),
        (PAIRS, ("en", "en"), "name two columns"),
        (PAIRS[:1], ("en", "de"), "too few training rows"),
        ([{"translation": PAIRS[0]}, {"translation": None}], ("en", "de"), "row 1 of train: no text in column 'en'"),
        ([*PAIRS, {"en": " ", "de": "leer"}], ("en", "de"), "row 3 of train: no text in column 'en'"),
    ],
)
def test_invalid_sentence_pairs(tmp_path, rows, names, message):
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=message):
        load_translation_data(str(tmp_path), *names)


def test_the_tokenizer_decodes_what_it_encodes():
    texts = ["Ein Hund, der läuft.", "A dog's running (fast)!", "Ein Haus"]
    tokenizer = joint_bpe(texts, 100, 50)
    ids = tokenizer(texts)["input_ids"]
    assert all(row[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in row for row in ids)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts


# ---- models ----


def tiny(layers: int = 1, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return random_marian(60, IDS, 32, layers, layers, dropout=0.0, max_length=20).eval()


def two_pairs() -> tuple[list[dict[str, Any]], Any]:
    """Two pairs with different lengths on both sides, and their collator."""
    tokenizer = joint_bpe([pair[language] for pair in PAIRS for language in pair], 60, 20)
    features: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7, 1], "attention_mask": [1] * 4, "labels": [8, 9, 1], "length": 7},
        {"input_ids": [9, 1], "attention_mask": [1] * 2, "labels": [4, 5, 6, 7, 1], "length": 7},
    ]
    return features, TranslationCollator(tokenizer, tiny())


def test_padding_does_not_change_logits():
    model, (features, collate) = tiny(), two_pairs()
    batch = collate(features)
    labels = batch.pop("labels")
    assert labels.tolist() == [[8, 9, 1, -100, -100], [4, 5, 6, 7, 1]]
    assert batch["decoder_input_ids"].tolist() == [[0, 8, 9, 1, 0], [0, 4, 5, 6, 7]]
    together = model(**batch).logits
    for row, feature in enumerate(features):
        alone = collate([feature])
        positions = alone.pop("labels").shape[1]
        torch.testing.assert_close(together[row, :positions], model(**alone).logits[0])


def test_the_word_level_gradient_equals_a_sum_over_tokens():
    """alpha * smoothed cross-entropy + (1 - alpha) * T^2 * KL by their definitions, without padding."""
    student, teacher, (features, collate) = tiny(), tiny(seed=1), two_pairs()
    alpha, temperature, smoothing = 0.3, 2.0, 0.1
    loss = torch.zeros(())
    for feature in features:
        alone = collate([feature])
        labels = alone.pop("labels")[0]
        logits, targets = student(**alone).logits[0], teacher(**alone).logits[0].detach()
        for z, t, label in zip(logits, targets, labels, strict=True):
            log_p = z.log_softmax(0)
            task = -(1 - smoothing) * log_p[label] - smoothing * log_p.mean()
            p, q = (t / temperature).softmax(0), (z / temperature).softmax(0)
            loss = loss + alpha * task + (1 - alpha) * temperature**2 * (p * (p / q).log()).sum()
    expected = torch.autograd.grad(loss / 8, student.model.shared.weight)[0]  # 3 + 5 tokens

    batch = collate(features)
    labels = batch.pop("labels")
    parts = token_level(alpha, divergence_of("kd", temperature), smoothing).objective(
        Outputs(logits=student(**batch).logits), Outputs(logits=teacher(**batch).logits), labels
    )
    found = torch.autograd.grad(sum(parts.values()), student.model.shared.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kept", "layers", "chosen"), [(3, 6, [0, 2, 5]), (3, 12, [0, 6, 11]), (1, 4, [0])])
def test_a_cut_keeps_alternating_layers(kept, layers, chosen):
    assert alternating_layers(kept, layers) == chosen


def test_a_cut_copies_the_kept_layers_and_all_other_weights():
    model = tiny(layers=4)
    same, cut = cut_translator(model, 4, 4), cut_translator(model, 2, 1)
    ids = torch.randint(2, 60, (2, 6))
    assert torch.equal(same(ids, decoder_input_ids=ids).logits, model(ids, decoder_input_ids=ids).logits)
    original = model.state_dict()
    for name, weights in cut.state_dict().items():
        assert torch.equal(weights, original[name.replace("encoder.layers.1.", "encoder.layers.3.")]), name
    assert (cut.config.encoder_layers, cut.config.decoder_layers) == (2, 1)
    assert cut.generate(ids, max_length=5).shape[0] == 2


# ---- from end to end ----


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A folder with a few short sentence pairs of the embedded dataset."""
    folder = tmp_path_factory.mktemp("data") / "few_numbers"
    for split, rows in number_words.load_number_words().items():
        short = rows.filter(lambda row: len(row["en"]) < 24)
        short.select(range(64 if split == "train" else 10)).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def without_test(small, tmp_path_factory) -> Path:
    """The same pairs without a test split, on which each model would translate once more."""
    folder = tmp_path_factory.mktemp("data") / "few_numbers"
    return shutil.copytree(small, folder, ignore=shutil.ignore_patterns("test.*"))


def distill(*words: object) -> None:
    run_script(SCRIPT, recipe_of(*TINY), *words)


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory) -> Path:
    """A finished run of --method sequence_kd+kd."""
    folder = tmp_path_factory.mktemp("runs") / "both"
    distill("--dataset", small, "--output_dir", folder, "--method", "sequence_kd+kd")
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_evaluate_repeats_the_metrics_of_a_run(finished, small, tmp_path):
    check_evaluation(finished, tmp_path, "--predictions", tmp_path / "translations.csv")
    found = pd.read_csv(tmp_path / "translations.csv", keep_default_na=False)
    rows = load_translation_data(str(small), "en", "de").splits["test"]
    of_test = found[found["split"] == "test"]
    assert of_test["source"].tolist() == rows["source"][:] and of_test["label"].tolist() == rows["target"][:]
    scores, _ = translation_metrics(of_test["prediction"].tolist(), rows["target"][:])
    assert scores["bleu"] == pytest.approx(results(finished)["models"]["student"]["metrics"]["test"]["bleu"])


def test_a_run_is_complete(finished):
    found = results(finished)
    assert (found["method"], found["task"]) == ("sequence_kd+kd", "few_numbers en-de")
    assert found["data"]["train"] == 64
    check_verdict(found)
    for model in found["models"].values():
        for split in ("validation", "test"):
            names = {"bleu", "bleu_beam", "chrf", "chrf_beam", "token_accuracy", "perplexity"}
            assert model["metrics"][split].keys() == names
    assert found["sacrebleu"]["bleu"].startswith("nrefs:1|case:mixed")
    assert found["decoding"]["student"]["seconds_per_100_greedy"] > 0
    assert found["seconds"]["teacher_outputs"] > 0
    for name in ("recipe.yaml", "report.md", "curves.png", "student/model.safetensors", "student/README.md"):
        assert (finished / name).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("student", ["scratch", "cut"])
def test_the_control_starts_like_the_student_but_without_trained_weights(without_test, tmp_path, student):
    """With a learning rate too small for fp32, students keep their initial weights."""
    words = ["--student", student, "--method", "kd", "--learning_rate", 1e-50, "--teacher_learning_rate", 1e-2]
    distill("--dataset", without_test, "--output_dir", tmp_path, *words)
    start, control, teacher = (
        load_file(tmp_path / "stages" / role / "model.safetensors") for role in ("student", "control", "teacher")
    )
    same = all(torch.equal(start[name], control[name]) for name in start)
    assert same == (student == "scratch")
    name = "model.encoder.layers.0.fc1.weight"
    assert (start[name].shape == teacher[name].shape and torch.equal(start[name], teacher[name])) == (student == "cut")


@pytest.mark.parametrize("method", ["kd", "sequence_kd", "sequence_kd+skew_reverse_kl:skew=0.2"])
def test_word_and_sequence_level_methods(finished, small, tmp_path, method):
    words = ["--teacher", finished / "stages" / "teacher", "--teacher_epochs", 0, "--no_control", "--method", method]
    distill("--dataset", small, "--output_dir", tmp_path / "run", *words)
    found = results(tmp_path / "run")
    assert (found["method"], found["models"]["control"]) == (method, None)
    assert found["models"]["teacher"]["metrics"] == results(finished)["models"]["teacher"]["metrics"]
    assert (found["seconds"]["teacher_outputs"] > 0) == (method != "kd")
    first, second = (load_file(run / "student" / "model.safetensors") for run in (finished, tmp_path / "run"))
    assert not torch.equal(first["model.shared.weight"], second["model.shared.weight"])


def test_a_saved_student_reproduces_the_reported_bleu(finished, small):
    model = AutoModelForSeq2SeqLM.from_pretrained(finished / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    data = load_translation_data(str(small), "en", "de")
    texts = []
    for source in data.splits["test"]["source"]:
        ids = model.generate(**tokenizer(source, return_tensors="pt"))
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    measured = results(finished)["models"]["student"]["metrics"]["test"]
    scores, _ = translation_metrics(texts, data.splits["test"]["target"][:])
    assert scores == pytest.approx({name: measured[name] for name in scores})


def test_sentence_pairs_are_limited():
    whole, part = (
        load_translation_data("number_words", "en", "de"),
        load_translation_data("number_words", "en", "de", max_train_samples=50, max_eval_samples=20),
    )
    assert {split: len(rows) for split, rows in part.splits.items()} == {"train": 50, "validation": 20, "test": 20}
    assert set(part.splits["train"]["source"][:]) <= set(whole.splits["train"]["source"][:])
    assert part.fingerprint != whole.fingerprint
    assert f"50 of {len(whole.splits['train']):,} train rows" in part.notes


def test_the_code_of_the_model_card_runs(finished, capsys):
    run_readme(finished / "student")
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_a_continued_run_gives_the_same_student(finished, small, tmp_path):
    """The run continues after the teacher's stage, without the files of later stages."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("student", "stages/student", "stages/control", "teacher_outputs"):
        shutil.rmtree(run / name)
    (run / "results.json").unlink()
    distill("--dataset", small, "--output_dir", run, "--method", "sequence_kd+kd", "--resume_from_checkpoint")
    for name in ("student", "stages/control"):
        whole, continued = (load_file(folder / name / "model.safetensors") for folder in (finished, run))
        assert all(torch.equal(whole[weight], continued[weight]) for weight in whole)


@pytest.mark.slow
def test_several_seeds_share_a_teacher_and_its_translations(without_test, tmp_path):
    words = ["--seeds", "0,1", "--method", "sequence_kd", "--num_train_epochs", 1, "--teacher_epochs", 1]
    distill("--dataset", without_test, "--output_dir", tmp_path, *words)
    found = results(tmp_path)
    assert found["seeds"] == [0, 1]
    check_verdict_over_seeds(found, [results(tmp_path / f"seed{seed}") for seed in (0, 1)])
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("teacher_outputs")] == ["teacher_outputs"]
    students = [load_file(tmp_path / f"seed{seed}" / "student" / "model.safetensors") for seed in (0, 1)]
    assert not torch.equal(*(weights["model.shared.weight"] for weights in students))
    assert results(tmp_path / "seed1")["seconds"]["teacher_outputs"] > 0


def test_sequence_level_labels_are_the_teachers_translations(finished, small, tmp_path):
    args = Arguments(
        dataset=str(small), max_length=12, beams=3, teacher=str(finished / "stages" / "teacher"), teacher_epochs=0
    )
    run = TrainerRun(
        TranslationTrainingArguments(output_dir=str(tmp_path / "run"), precision="fp32", report_to="none"), args
    )
    teacher, _ = load_named_models(args)
    task = TranslationTask.of(run, args, load_translation_data(str(small), "en", "de"), teacher, None)
    model, shuffled = task.train_teacher(run), task.splits["train"].shuffle(seed=1)
    rows = replace(task, splits=task.splits | {"train": shuffled}).translate_training_set(run, model)
    assert rows["sample_id"][:] == shuffled["sample_id"][:]
    assert len(list((tmp_path / "run" / "teacher_outputs").glob("*/*/outputs.arrow"))) == 1  # of 64 sentences
    assert rows["labels"][:] != shuffled["labels"][:]
    for row in rows.select(range(8)):
        ids = model.generate(torch.tensor([row["input_ids"]]), num_beams=3)[0].tolist()
        assert [0, *row["labels"]] == ids
        assert row["length"] == len(row["input_ids"]) + len(row["labels"])


# ---- named models ----


@pytest.fixture(scope="session")
def t5(small, tmp_path_factory) -> Path:
    """A T5 with random weights and its tokenizer, like one from the Hub."""
    folder = tmp_path_factory.mktemp("models") / "t5"
    train = load_translation_data(str(small), "en", "de").splits["train"]
    tokenizer = joint_bpe([*train["source"], *train["target"]], 120, 64)
    shape: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    config = T5Config(vocab_size=len(tokenizer) + 8, **shape, **IDS)  # as in T5, with more ids than tokens
    model = T5ForConditionalGeneration(config)
    model.generation_config.update(num_beams=4, early_stopping=True, length_penalty=2.0)  # arguments of beam search
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "kind"),
    [
        ("cut", "t5"),
        ("scratch", "marian"),
        ("by name", "t5"),
    ],
)
def test_a_t5_as_teacher(without_test, t5, tmp_path, student, kind):
    """The student is a cut of it, or has random weights, or is the same T5 by name."""
    words = ["--student", t5 if student == "by name" else student, "--teacher", t5, "--teacher_epochs", 0]
    words += ["--no_control", "--source_prefix", "translate: ", "--max_steps", 2]
    words += [] if student == "by name" else ["--student_encoder_layers", 2]
    distill("--dataset", without_test, "--output_dir", tmp_path / "run", *words)
    saved = tmp_path / "run" / "student"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    assert model.config.model_type == kind
    assert model.get_encoder().config.num_hidden_layers == (3 if student == "by name" else 2)
    ids = model.generate(**tokenizer("translate: twenty one", return_tensors="pt"))
    assert isinstance(tokenizer.decode(ids[0], skip_special_tokens=True), str)
    assert "translate: " in (saved / "README.md").read_text()


def test_an_empty_translation_ends_at_once(small, t5):
    translator = Generator(AutoModelForSeq2SeqLM.from_pretrained(t5), AutoTokenizer.from_pretrained(t5))
    for parameter in translator.model.parameters():
        parameter.data.zero_()  # all logits are equal, and the first token is padding
    rows = tokenize_translation(load_translation_data(str(small), "en", "de"), translator.tokenizer)["validation"]
    assert translate(translator, rows, beams=1) == [[translator.tokenizer.eos_token_id]] * len(rows)


# ---- invalid input: one line, exit code 2, no output files ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "some-owner/some-pairs"], "--dataset number_words"),
        (["--dataset", "nonsense"], "unknown dataset 'nonsense'"),
        (["--target", "fr"], "--source and --target"),
        (["--teacher", "no/such-model"], "scratch, which needs no download"),
        (["--teacher_epochs", "0"], "untrained"),
        (["--student_width", "40"], "multiple of 32"),
        (["--student", "cut", "--student_decoder_layers", "3"], "--student_decoder_layers 3"),
        (["--student", "T5"], "different vocabularies"),
        (["--load_best_model_at_end"], "needs --metric_for_best_model"),
        (["--methid", "kd"], "did you mean --method"),
        (
            ["--method", "sequence_kd+kl"],
            "no method 'kl', only kd, reverse_kl, js, skew_kl, skew_reverse_kl, tv, abkd",
        ),
        (["--method", "sequence"], "abkd, sequence_kd; did you mean sequence_kd?"),
    ],
)
def test_invalid_flags(capsys, tmp_path, small, t5, words, message):
    with pytest.raises(SystemExit) as stopped:
        distill(
            "--output_dir", tmp_path / "run", "--dataset", small, *(t5 if word == "T5" else word for word in words)
        )
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and message in error
    assert error.strip().count("\n") == 0, error
    assert not (tmp_path / "run").exists()


def test_a_student_with_another_vocabulary_is_an_error(capsys, tmp_path, small, t5, finished):
    with pytest.raises(SystemExit) as stopped:
        distill(
            "--output_dir", tmp_path / "run", "--dataset", small, "--teacher", t5, "--student", finished / "student"
        )
    assert stopped.value.code == 2
    assert "different vocabularies" in capsys.readouterr().err


def test_a_model_other_than_a_translator_is_an_error(capsys, tmp_path, small, t5):
    from transformers import BertConfig, BertModel

    bert = tmp_path / "bert"
    BertModel(BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        bert
    )
    AutoTokenizer.from_pretrained(t5).save_pretrained(bert)
    with pytest.raises(SystemExit) as stopped:
        distill("--output_dir", tmp_path / "run", "--dataset", small, "--teacher", bert)
    assert stopped.value.code == 2
    assert "(bert) is not an encoder-decoder" in capsys.readouterr().err
