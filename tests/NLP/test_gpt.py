"""Distillation of language models: corpora, packing, objectives, and the script from end to end on a few texts."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

from kd.common.outputs import Outputs
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data import corpora
from kd.nlp.data.corpora import Corpus, load_corpus, pack, with_texts_of
from kd.nlp.scripts.distill_gpt import Arguments, LanguageTrainingArguments
from kd.nlp.student_model.arguments import DIVERGENCE_NAMES
from kd.nlp.student_model.language_model import LanguageTask, load_named_models
from kd.nlp.student_model.layers import cut_layers
from kd.nlp.student_model.token_objective import DIVERGENCES, divergence_of, token_level
from kd.nlp.teacher_model.generative import byte_level_bpe, random_gpt2
from kd_testing.evaluations import EVALUATE, check_evaluation
from kd_testing.paths import REPO
from kd_testing.readmes import run_readme
from kd_testing.scripts import recipe_of, run_script
from kd_testing.verdicts import check_verdict, check_verdict_over_seeds

SCRIPT = "NLP/scripts/distill_gpt.py"
TINY = (
    "--teacher_layers 3 --teacher_width 32 --student_layers 1 --block_size 16 --vocabulary_size 300 "
    "--teacher_epochs 2 --num_train_epochs 2 --report_to none --precision fp32 --seed 0"
).split()


# ---- corpora ----


@pytest.fixture(scope="session")
def embedded() -> Corpus:
    return load_corpus("python")


def test_the_embedded_corpus_is_large_and_its_splits_share_no_paragraph(embedded):
    sizes = {split: embedded.size(split) for split in embedded.splits}
    assert sizes["train"] > 1_000_000
    assert min(sizes["validation"], sizes["test"]) > 50_000
    words = [
        {" ".join(p.split()) for text in texts for p in re.split(r"\n\s*\n", text)}
        for texts in embedded.splits.values()
    ]
    assert not any(one & other for one, other in combinations(words, 2))


def test_the_embedded_corpus_has_help_and_docstrings_once_and_without_heading_rules(embedded):
    text = "\n\n".join(document for documents in embedded.splits.values() for document in documents)
    sentence = 'The "while" statement is used for repeated execution'
    assert sum(sentence in topic for topic in topics.values()) > 1
    assert text.count(sentence) == 1
    assert json.__doc__.strip().split("\n\n")[0] in text
    assert not re.search(r"^[*=]{4,}$", text, re.MULTILINE)


def test_a_repeated_paragraph_stays_in_the_shortest_document():
    documents = {"long": "a  b\n\ne\n \nc\nd", "short": "c d", "none": "a\nb"}
    assert corpora.drop_repeated_paragraphs(documents) == {"short": "c d", "none": "a\nb", "long": "e"}


def test_a_python_without_the_texts_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="pass --dataset"):
        load_corpus("python")


def test_lines_of_text_files_keep_their_newlines(tmp_path):
    for split, text in (("train", "one\n\ntwo\nthree"), ("valid", "four\n"), ("notes", "five\n")):
        (tmp_path / f"{split}.txt").write_text(text)
    corpus = load_corpus(str(tmp_path))
    assert corpus.splits == {"train": ["one\n", "\n", "two\n", "three"], "validation": ["four\n"]}
    assert corpus.size("train") == len("one\n\ntwo\nthree")


def test_the_text_column_of_a_csv_file_is_inferred_and_its_documents_are_strings(tmp_path):
    (tmp_path / "train.csv").write_text("\ufeffid,body\n1,first\n2,second\n")
    (tmp_path / "validation.csv").write_text("id,body\n1,007\n2,true\n")
    corpus = load_corpus(str(tmp_path))
    assert corpus.splits == {"train": ["first", "second"], "validation": ["007", "true"]}
    assert "column 'body' contains the texts" in corpus.notes


@pytest.mark.parametrize(("encoding", "message"), [("cp1252", "is not UTF-8"), ("utf-16", "UTF-16")])
def test_text_files_in_another_encoding_are_an_error(tmp_path, encoding, message):
    (tmp_path / "train.txt").write_bytes("na\u00efve\n".encode(encoding))
    with pytest.raises(UserError, match=f"train.txt .*{message}"):
        load_corpus(str(tmp_path))
    (tmp_path / "train.txt").write_bytes(("one\r\ntwo\r\n" * 10).encode("utf-8-sig"))
    assert load_corpus(str(tmp_path)).splits["train"][:2] == ["one\n", "two\n"]


@pytest.mark.parametrize("change", [lambda rows: rows[::-1], lambda rows: rows[:-1], lambda rows: ["x", *rows[1:]]])
def test_the_fingerprint_of_a_corpus_depends_on_its_documents_and_their_order(tmp_path, change):
    rows = [f"text {i}" for i in range(20)]
    for name, texts in (("one", rows), ("again", rows), ("other", change(rows))):
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / name / "train.parquet")
    one, again, other = (load_corpus(str(tmp_path / name)).fingerprint for name in ("one", "again", "other"))
    assert one == again != other


def test_a_missing_validation_split_is_the_end_of_train(tmp_path):
    rows = [{"body": f"text {i}", "title": "t"} for i in range(20)] + [{"body": "", "title": ""}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="--text_column"):
        load_corpus(str(tmp_path))
    corpus = load_corpus(str(tmp_path), "body")
    assert corpus.splits["validation"] == ["text 18", "text 19"]
    assert corpus.splits["train"] == [f"text {i}" for i in range(18)]
    assert "set aside" in corpus.notes[-1]
    assert "1 of 21 rows of train have no text and are left out" in corpus.notes


# ---- packing ----


class Letters:
    """A tokenizer with a token for each letter, a = 1, and the end-of-text token 0."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) - ord("a") + 1 for letter in text if letter.isalpha()] for text in texts]}


def test_packing_of_a_small_example():
    """0 abc 0 de fg 0, because "de" is a line of a longer text: ten tokens, nine labels, blocks of four."""
    blocks = pack(["abc", "de\n", "f\ng\n"], Letters(), 4)
    assert torch.equal(blocks[:]["input_ids"], torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6], [7, 0, 0, 0]]))
    assert torch.equal(blocks[:]["labels"], torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7], [0, *[IGNORED] * 3]]))


@pytest.mark.parametrize("block_size", [2, 7, 30, 500])
def test_every_token_is_a_label_once_and_follows_its_input(block_size, embedded):
    texts = [text[:2000] for text in embedded.splits["test"][:4]]
    tokenizer = byte_level_bpe(texts, 300, 500)
    blocks = pack(texts, tokenizer, block_size)[:]
    labels = blocks["labels"].flatten()
    labels = labels[labels != IGNORED]
    assert tokenizer.decode(labels) == "".join(f"{text}{tokenizer.eos_token}" for text in texts)
    assert torch.equal(blocks["input_ids"].flatten()[1 : len(labels)], labels[:-1])
    assert blocks["input_ids"][0, 0] == tokenizer.eos_token_id


def test_logits_do_not_depend_on_their_labels():
    """The logits at t predict labels[t], the input at t + 1, and do not change with inputs from t + 1 on."""
    model = random_gpt2(50, 0, layers=2, width=32, positions=12, dropout=0.0).eval()
    ids = torch.randint(1, 50, (1, 12))
    for t in (0, 5, 10):
        changed = ids.clone()
        changed[:, t + 1 :] = ids[:, t + 1 :] % 49 + 1  # another token
        before, after = model(ids).logits, model(changed).logits
        torch.testing.assert_close(before[:, : t + 1], after[:, : t + 1])
        assert not torch.allclose(before[:, t + 1 :], after[:, t + 1 :])


def test_networks_are_gpt2s():
    """With the weights in transformers' GPT-2, whose activation is written in elementary operations."""
    model = random_gpt2(50, 0, layers=2, width=32, positions=12, dropout=0.0).eval()
    original = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_layer=2, n_embd=32, n_head=1, n_positions=12)).eval()
    original.load_state_dict(model.state_dict())
    ids = torch.randint(50, (2, 12))
    assert original.config.activation_function != model.config.activation_function
    torch.testing.assert_close(model(ids).logits, original(ids).logits)


# ---- objective ----


T = 2.0
REFERENCES = {  # the divergences of distributions p of the teacher and q of the student, from their papers
    "kd": lambda p, q: T**2 * divergence(p, q),
    "reverse_kl": lambda p, q: T**2 * divergence(q, p),
    "js:beta=0.7": lambda p, q: T**2 * (0.7 * divergence(p, m := 0.7 * p + 0.3 * q) + 0.3 * divergence(q, m)),
    "skew_kl": lambda p, q: T**2 * divergence(p, 0.1 * p + 0.9 * q),
    "skew_reverse_kl:skew=0.2": lambda p, q: T**2 * divergence(q, 0.8 * p + 0.2 * q),
    "tv": lambda p, q: T * (p - q).abs().sum() / 2,
    "abkd": lambda p, q: T**2 * 2 * (p.sqrt() - q.sqrt()).square().sum(),
}


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def test_every_divergence_has_a_reference_and_is_in_the_help():
    assert {name.split(":")[0] for name in REFERENCES} == set(DIVERGENCES) == set(DIVERGENCE_NAMES)


@pytest.mark.parametrize("kind", REFERENCES)
def test_gradient_of_the_objective(kind):
    logits, teacher = torch.randn(2, 4, 9, requires_grad=True), torch.randn(2, 4, 9)
    labels = torch.randint(0, 9, (2, 4))
    labels[1, 2:] = IGNORED
    loss = token_level(0.3, divergence_of(kind, T), smoothing=0.1).objective
    parts = loss(Outputs(logits=logits), Outputs(logits=teacher), labels)
    (found,) = torch.autograd.grad(torch.stack(list(parts.values())).sum(), logits)
    rows, targets = logits.flatten(0, 1)[:6], teacher.flatten(0, 1)[:6]
    task = F.cross_entropy(rows, labels.flatten()[:6], label_smoothing=0.1)
    pairs = zip((targets / T).softmax(1), (rows / T).softmax(1), strict=True)
    expected = 0.3 * task + 0.7 * sum(REFERENCES[kind](p, q) for p, q in pairs) / 6
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, gradient)
    assert not found[1, 2:].any()


def test_cutting_keeps_evenly_spaced_layers():
    teacher = random_gpt2(50, 0, layers=4, width=32, positions=8, dropout=0.0)
    student = cut_layers(teacher, 2)
    for new, old in ((0, 1), (1, 3)):
        kept, source = student.transformer.h[new].state_dict(), teacher.transformer.h[old].state_dict()
        assert all(torch.equal(kept[name], source[name]) for name in source)
    assert torch.equal(student.transformer.wte.weight, teacher.transformer.wte.weight)
    assert student.lm_head.weight is student.transformer.wte.weight
    whole = cut_layers(teacher, 4).eval()
    ids = torch.randint(0, 50, (2, 8))
    assert torch.equal(whole(ids).logits, teacher.eval()(ids).logits)


def test_a_cut_keeps_the_attention_type_of_each_layer(tmp_path):
    """Layers of GPT-Neo alternate between global and local attention."""
    config = GPTNeoConfig(
        vocab_size=50,
        hidden_size=16,
        num_layers=4,
        num_heads=2,
        max_position_embeddings=8,
        attention_types=[[["global", "local"], 2]],
        window_size=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    teacher = GPTNeoForCausalLM(config)
    student = cut_layers(teacher, 2).eval()
    assert [block.attn.attention_type for block in student.transformer.h] == ["local", "local"]  # layers 2 and 4
    student.save_pretrained(tmp_path)
    ids = torch.randint(0, 50, (2, 8))
    assert torch.equal(GPTNeoForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, student(ids).logits)


# ---- the script ----


@pytest.fixture(scope="session")
def texts(tmp_path_factory, embedded) -> Path:
    """A folder with a few short texts."""
    folder = tmp_path_factory.mktemp("data") / "few_topics"
    few = sorted(embedded.splits["train"], key=len)[10:34]
    for split, chosen in (("train", few[::2]), ("validation", few[1::4]), ("test", few[3::4])):
        datasets.Dataset.from_dict({"text": chosen}).to_parquet(folder / f"{split}.parquet")
    return folder


def distill(folder: Path, texts: Path, *words: object) -> dict:
    run_script(SCRIPT, recipe_of(*TINY), "--dataset", texts, "--output_dir", folder, *words)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def finished(texts, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "gpt"
    distill(folder, texts)
    return folder


def test_evaluate_repeats_the_metrics_of_a_run(finished, tmp_path):
    check_evaluation(finished, tmp_path)
    (tmp_path / "new.txt").write_text("Other text.\n\nMore of it.\n")
    run_script(EVALUATE, finished, "--dataset", tmp_path / "new.txt", "--json", tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text())["metrics"].keys() == {"test"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--label_column", "text"], "GPT2LMHeadModel, which has no labels: leave out --label_column"),
        (["--text_columns", "a", "b", "c"], "must be 1 or 2, got 3"),
        (["--predictions", "p.csv"], "no prediction for each row"),
    ],
)
def test_evaluate_refuses_flags_without_a_meaning(finished, words, message, capsys):
    with pytest.raises(SystemExit):
        run_script(EVALUATE, finished, *words)
    assert message in capsys.readouterr().err


def test_evaluate_refuses_a_language_model_outside_of_a_run(finished, texts, tmp_path, capsys):
    shutil.copytree(finished / "student", tmp_path / "model")
    with pytest.raises(SystemExit):
        run_script(EVALUATE, tmp_path / "model", "--dataset", texts)
    assert "outside of a run" in capsys.readouterr().err


def test_a_run_is_complete_and_reports_the_perplexity_of_the_saved_student(finished, texts):
    found = json.loads((finished / "results.json").read_text())
    score = {role: model["metrics"]["validation"]["perplexity"] for role, model in found["models"].items()}
    assert found["retention"] == score["teacher"] / score["student"]
    assert found["gain_over_control"] == score["control"] - score["student"]
    check_verdict(found)
    assert found["sample"]["prompt"]
    for name in ("recipe.yaml", "report.md", "curves.png"):
        assert (finished / name).stat().st_size > 0
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    model = AutoModelForCausalLM.from_pretrained(finished / "student").eval()
    for split in ("validation", "test"):
        blocks = pack(load_corpus(str(texts)).splits[split], tokenizer, 16)[:]
        with torch.no_grad():
            loss = F.cross_entropy(model(blocks["input_ids"]).logits.flatten(0, 1), blocks["labels"].flatten())
        assert found["models"]["student"]["metrics"][split]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_other_texts_are_a_split_with_the_name_of_their_dataset(tmp_path):
    """The test split, or the only one, of a folder or a file; --text_column is that of the data if both have it."""
    corpus = Corpus("few", {"train": ["a"], "validation": ["b"], "test": ["c"]}, ["note"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "validation.csv").write_text("text,body\none,1st\n")
    assert with_texts_of(corpus, str(other)).splits == corpus.splits | {"other:validation": ["one"]}
    assert with_texts_of(corpus, str(other), "body").splits["other:validation"] == ["1st"]
    (other / "test.csv").write_text("text\ntwo\nthree\n\n")
    found = with_texts_of(corpus, str(other), "body", max_eval_samples=1)
    assert found.splits["other:test"] == ["two"] and found.size("other:test") == 3
    assert found.fingerprint != corpus.fingerprint and found.notes == ["note", "1 of 2 documents of other:test"]
    (tmp_path / "test.txt").write_text("four\n\nfive")
    found = with_texts_of(corpus, str(tmp_path / "test.txt"))
    assert found.splits == corpus.splits | {"test.txt:test": ["four\n", "\n", "five"]}


def test_bits_per_byte_of_other_texts_are_those_of_the_saved_student(texts, tmp_path):
    """The bits of all tokens of the text, computed from the saved models without padding, and of its bytes."""
    text = "the naïve statement\nis a list of names\n"
    (tmp_path / "other.txt").write_text(text)
    found = distill(tmp_path / "run", texts, "--eval_dataset", tmp_path / "other.txt", "--num_train_epochs", "1")
    for role, folder in (("student", "student"), ("control", "stages/control"), ("teacher", "stages/teacher")):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / folder)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / folder).eval()
        ids = [
            tokenizer.eos_token_id,
            *(token for line in text.splitlines(True) for token in tokenizer(line)["input_ids"]),
        ]
        bits = 0.0
        for start in range(0, len(ids) - 1, 16):  # blocks
            with torch.no_grad():
                log_p = model(torch.tensor([ids[start : start + 16]])).logits[0].double().log_softmax(-1)
            bits -= sum(log_p[i, t].item() for i, t in enumerate(ids[start + 1 : start + 17])) / math.log(2)
        metrics = found["models"][role]["metrics"]["other.txt:test"]
        assert metrics["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-4)
    assert found["corpus"]["bytes"]["other.txt:test"] == len(text) + 1
    assert "| other.txt:test | bits per byte |" in (tmp_path / "run" / "report.md").read_text()


def test_documents_are_limited_and_lines_stay_consecutive(tmp_path):
    lines = [f"line {number}\n" for number in range(40)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    corpus = load_corpus(str(tmp_path), max_train_samples=10, max_eval_samples=5)
    assert corpus.splits == {"train": lines[:10], "validation": lines[:5]}
    assert corpus.size("validation") == len("".join(lines[:5])) and "10 of 40 documents of train" in corpus.notes
    documents = [{"text": f"a whole document {number}"} for number in range(40)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").unlink()
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    corpus = load_corpus(str(tmp_path), max_train_samples=4)
    assert corpus.splits["train"] == [f"a whole document {number}" for number in (0, 10, 20, 30)]
    assert len(corpus.splits["validation"]) == 40


def test_the_saved_student_loads_with_the_code_of_its_model_card(finished, capsys):
    ids = torch.randint(0, 300, (2, 16))
    student, stage = (AutoModelForCausalLM.from_pretrained(finished / name) for name in ("student", "stages/student"))
    assert torch.equal(student(ids).logits, stage(ids).logits)
    tokenizers = [AutoTokenizer.from_pretrained(finished / name) for name in ("student", "stages/tokenizer")]
    assert tokenizers[0]("The same – text")["input_ids"] == tokenizers[1]("The same – text")["input_ids"]
    run_readme(finished / "student")
    prompt = json.loads((finished / "results.json").read_text())["sample"]["prompt"]
    assert " ".join(capsys.readouterr().out.split()).startswith(prompt)


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "reverse_kl", "--hidden_weight", "1", "--alpha", "0", "--load_best_model_at_end",
         "--metric_for_best_model", "perplexity", "--greater_is_better", "false"],
        pytest.param(["--method", "js:beta=0.1", "--student", "scratch", "--student_width", "64", "--hidden_weight",
         "0.5", "--gradient_accumulation_steps", "2"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_other_divergences_and_hidden_states(texts, tmp_path, words):
    found = distill(tmp_path / "run", texts, "--no_control", *words)
    assert found["models"]["control"] is None
    selected = found["selection"].startswith("best checkpoint by validation perplexity")
    assert selected == ("--load_best_model_at_end" in words)
    student = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert not [name for name in student if "regressor" in name]
    assert found["models"]["student"]["metrics"]["validation"]["perplexity"] < 300  # the vocabulary's size


def test_a_continued_run_with_a_finished_teacher_gives_the_same_student(finished, texts):
    expected, found = figures_and_weights(finished)
    for name in ("student", "stages/student", "stages/control"):
        shutil.rmtree(finished / name)
    (finished / "results.json").unlink()
    distill(finished, texts, "--resume_from_checkpoint")
    again, weights = figures_and_weights(finished)
    assert again == expected
    assert all(torch.equal(weight, weights[name]) for name, weight in found.items())


@pytest.mark.slow
def test_several_seeds_share_a_teacher_and_continue(texts, tmp_path):
    found = distill(tmp_path / "run", texts, "--seeds", "0,1", "--num_train_epochs", "1", "--teacher_epochs", "1")
    assert found["seeds"] == [0, 1]
    runs = [json.loads((tmp_path / "run" / f"seed{seed}" / "results.json").read_text()) for seed in (0, 1)]
    perplexity = [run["models"]["student"]["metrics"]["validation"]["perplexity"] for run in runs]
    mean = found["models"]["student"]["metrics"]["validation"]["perplexity"]
    check_verdict_over_seeds(found, runs)
    assert perplexity[0] != perplexity[1] and mean == pytest.approx(sum(perplexity) / 2)
    assert runs[0]["models"]["teacher"] == runs[1]["models"]["teacher"]
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "seed1")
    again = distill(tmp_path / "run", texts, "--resume_from_checkpoint", "--seeds", "0,1", "--num_train_epochs", "1",
                    "--teacher_epochs", "1")  # fmt: skip
    assert again["models"]["student"]["metrics"] == found["models"]["student"]["metrics"]


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_student(finished, texts, tmp_path):
    """SIGKILL at two moments: teacher and student continue from their checkpoints."""
    run = tmp_path / "run"
    command = [sys.executable, str(REPO / SCRIPT), *TINY, "--dataset", str(texts), "--output_dir", str(run)]
    for stage, resume in (("teacher", []), ("student", ["--resume_from_checkpoint"])):
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(run.glob(f"checkpoints/{stage}/checkpoint-*/SHA256SUMS")):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / "stages" / stage).exists()
    distill(run, texts, "--resume_from_checkpoint")
    (expected, whole), (again, resumed) = figures_and_weights(finished), figures_and_weights(run)
    assert again == expected
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def figures_and_weights(run: Path) -> tuple[dict, dict[str, Tensor]]:
    """The metrics and the weights of a run's student."""
    metrics = json.loads((run / "results.json").read_text())["models"]["student"]["metrics"]
    return metrics, load_file(run / "student" / "model.safetensors")


# ---- named teachers and students ----


@pytest.fixture(scope="session")
def gpt2(texts, tmp_path_factory) -> Path:
    """A folder with a small GPT-2 and its tokenizer, like one from the Hub."""
    return saved_gpt2(tmp_path_factory.mktemp("models") / "gpt2", texts, 280)


def saved_gpt2(folder: Path, texts: Path, vocabulary: int) -> Path:
    tokenizer = byte_level_bpe(load_corpus(str(texts)).splits["train"], vocabulary, 24)
    tokenizer.save_pretrained(folder)
    random_gpt2(len(tokenizer), 0, layers=3, width=32, positions=24, dropout=0.1).save_pretrained(folder)
    return folder


def test_a_named_teacher_is_fine_tuned_and_the_control_is_cut_from_the_original(texts, gpt2, tmp_path, monkeypatch):
    args = Arguments(teacher=str(gpt2), teacher_epochs=1, student_layers=1, block_size=16)
    training = LanguageTrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", precision="fp32")
    run = TrainerRun(training, args)
    task = LanguageTask.of(run, args, load_corpus(str(texts)), *load_named_models(args))
    teacher = task.train_teacher(run)
    monkeypatch.setattr(LanguageTask, "train", lambda task, run, role, model, *_, **__: model)
    original = AutoModelForCausalLM.from_pretrained(gpt2)
    for model, source in ((task.train_control(run, teacher), original), (task.train_student(run, teacher), teacher)):
        expected = cut_layers(source, 1).state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert not torch.equal(original.lm_head.weight, teacher.lm_head.weight)


def test_a_named_teacher_without_epochs_and_a_named_student(texts, gpt2, tmp_path):
    """With the recipe for GPT-2, but a small model and few texts."""
    words = ["--teacher", gpt2, "--teacher_epochs", 0, "--student", gpt2, "--no_control", "--block_size", 16]
    words += ["--dataset", texts, "--output_dir", tmp_path / "run", "--report_to", "none", "--num_train_epochs", 1]
    run_script(SCRIPT, REPO / "NLP" / "scripts" / "gpt.yaml", *words)
    assert not (tmp_path / "run" / "stages" / "teacher").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "student").vocab_size == 280


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "Salesforce/wikitext:wikitext-2-raw-v1"], "--dataset"),
        (["--dataset", "nonsense"], "nonsense"),
        (["--teacher", "gpt2"], "gpt2"),
        (["--teacher", "OTHER", "--student", "GPT2"], "different vocabularies"),
        (["--student", "GPT2"], "different vocabularies"),
        (["--teacher", "GPT2", "--student_layers", "4"], "cannot be cut from the teacher's 3"),
        (["--teacher", "GPT2", "--block_size", "32"], "at most 24"),
        (["--method", "js:beta=1"], "beta must be above 0 and below 1"),
        (["--method", "abkd:alpha=0:beta=0"], "abkd needs alpha or beta above 0"),
        (["--teacher_epochs", "0"], "untrained"),
        (["--eval_dataset", "nowhere"], "unknown dataset 'nowhere'"),
        (["--dataset", "answers", "--eval_dataset", "python"], "not evaluated on plain texts"),
        (
            ["--method", "sideways"],
            f"no method 'sideways', only {', '.join([*DIVERGENCE_NAMES, 'uld', 'shared_tokens'])}",
        ),
        (["--student", "scratch", "--student_layers", "4", "--hidden_weight", "1"], "has 4 layers to match"),
        (["--load_best_model_at_end"], "needs --metric_for_best_model"),
    ],
)
def test_invalid_arguments_give_one_line(capsys, texts, gpt2, tmp_path, words, message):
    if "OTHER" in words:
        saved_gpt2(tmp_path / "other", texts, 290)
    words = [{"OTHER": tmp_path / "other", "GPT2": gpt2}.get(word, word) for word in words]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        distill(tmp_path / "run", texts, *words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error
    assert not (tmp_path / "run").exists()
