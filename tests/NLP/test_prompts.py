"""Prompts and chats: columns, tokens, packing, and the script from end to end on a few rows."""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, GPT2Tokenizer

from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.answers import load_answers
from kd.nlp.data.corpora import Corpus
from kd.nlp.data.prompt_rows import (
    RowCollator,
    completion_ids,
    encode,
    keeps_documents_apart,
    pack_rows,
    prompt_ids,
    row_of,
    token_rows,
)
from kd.nlp.data.prompts import PromptData, chat_pieces, load_language_data
from kd.nlp.teacher_model.generative import byte_level_bpe, random_gpt2
from kd_testing.evaluations import check_evaluation
from kd_testing.readmes import run_readme
from kd_testing.scripts import recipe_of, run_script
from kd_testing.verdicts import check_verdict

SCRIPT = "NLP/scripts/distill_gpt.py"
TINY = (
    "--teacher_layers 2 --teacher_width 32 --student_layers 1 --block_size 48 --vocabulary_size 300 "
    "--teacher_epochs 1 --num_train_epochs 1 --report_to none --precision fp32 --seed 0"
).split()
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "brief"},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "d"},
]
PAIRS = [{"prompt": f"double {number}:", "completion": f" {2 * number}"} for number in range(30)]


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return byte_level_bpe([f"{row['prompt']}{row['completion']}" for row in PAIRS], 280, 48)


@pytest.fixture
def chat_tokenizer(tokenizer) -> Iterator[GPT2Tokenizer]:
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def load(dataset: object, **flags: object) -> PromptData | Corpus:
    names = ("text_column", "prompt_column", "completion_column", "messages_column")
    defaults = dict.fromkeys((*names, "max_train_samples", "eval_dataset", "max_eval_samples"))
    return load_language_data(Namespace(dataset=str(dataset), **(defaults | flags)))


def write(folder: Path, rows: list[dict], name: str = "train.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ---- data ----


def test_the_embedded_answers_are_right_and_unseen():
    splits = load_answers()
    seen = set()
    for rows in splits.values():
        for row in rows:
            words = row["prompt"].removeprefix("sort ").removesuffix(":").split()
            assert row["completion"] == f" {' '.join(sorted(words))}"
            seen.add(frozenset(words))
    assert len(seen) == sum(map(len, splits.values()))
    assert splits["train"][:] == load_answers()["train"][:]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_prompts_are_read_from_any_file(tmp_path, suffix):
    rows = datasets.Dataset.from_list([*PAIRS, {"prompt": "empty:", "completion": " "}])
    path = tmp_path / f"train.{suffix}"
    {"csv": rows.to_csv, "parquet": rows.to_parquet, "json": rows.to_json}[suffix](path)
    data = load(tmp_path)
    assert isinstance(data, PromptData)
    found = sorted((row["prompt"], row["completion"]) for split in data.splits.values() for row in split)
    assert found == sorted((row["prompt"], row["completion"]) for row in PAIRS)
    notes = "; ".join(data.notes)
    assert "'prompt' contains prompts" in notes and "1 of 31 rows of train" in notes and "set aside" in notes


def test_other_names_of_columns_and_prompts_that_are_also_in_train(tmp_path):
    rows = [{"question": row["prompt"], "answer": int(row["completion"])} for row in PAIRS]
    write(write(tmp_path, rows), rows[:3], "validation.jsonl")
    data = load(tmp_path, prompt_column="question", completion_column="answer")
    assert data.splits["train"][1] == {"prompt": "double 1:", "completion": "2"}
    assert "3 of 3 prompts of validation are also in train" in data.notes
    assert isinstance(load(write(tmp_path / "texts", [{"text": "a b"}] * 20)), Corpus)
    assert isinstance(load(tmp_path, text_column="question"), Corpus)


@pytest.mark.parametrize("as_text", [False, True])
def test_chats_are_lists_or_json(tmp_path, as_text):
    chats = [CHAT, CHAT[:2], *[[*CHAT[1:3], CHAT[3]]] * 18]
    rows = datasets.Dataset.from_dict({"messages": [json.dumps(chat) if as_text else chat for chat in chats]})
    rows.to_parquet(tmp_path / "train.parquet")
    data = load(tmp_path)
    assert data.has_chats and CHAT in data.splits["train"]["messages"][:]
    assert "1 of 20 rows of train lack an assistant's message and are left out" in data.notes


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"prompt": "a", "other": "b"}, {}, "pass --completion_column"),
        ({"completion": "a", "other": "b"}, {}, "pass --prompt_column"),
        ({"prompt": "a", "completion": "b"}, {"prompt_column": "question"}, "question is not in the data"),
        ({"prompt": "a", "completion": " "}, {}, "no row of train has a text in both 'prompt' and 'completion'"),
        ({"prompt": ["a"], "completion": "b"}, {}, "'prompt' of train holds lists, not texts"),
        ({"messages": [{"from": "human", "value": "a"}]}, {}, "without the texts role and content"),
        ({"messages": "[{"}, {}, "chat 0 of train is not JSON"),
        ({"messages": CHAT[:2]}, {}, "no row of train has an assistant's message"),
        ({"prompt": "a", "completion": "b", "messages": CHAT}, {"messages_column": "messages", "prompt_column":
         "prompt"}, "leave out --prompt_column"),
    ],
)  # fmt: skip
def test_unusable_columns_give_one_line(tmp_path, row, flags, message):
    with pytest.raises(UserError, match=message) as error:
        load(write(tmp_path, [row] * 20), **flags)
    assert "\n" not in str(error.value)


# ---- tokens ----


def test_the_labels_of_a_hand_made_row():
    row = row_of([([1, 2], False), ([3, 4], True), ([5], False), ([6, 7], True)])
    assert row["input_ids"] == [1, 2, 3, 4, 5, 6]
    assert row["labels"] == [IGNORED, 3, 4, IGNORED, 6, 7]
    assert prompt_ids(row) == [1, 2, 3, 4, 5] and completion_ids(row) == [6, 7]


def test_only_the_messages_of_the_assistant_are_labels(chat_tokenizer):
    (pieces,) = chat_pieces(CHAT, chat_tokenizer)
    row = encode(pieces, chat_tokenizer, is_chat=True)
    text = chat_tokenizer.apply_chat_template(CHAT, tokenize=False).rstrip()
    assert chat_tokenizer.decode([*row["input_ids"], row["labels"][-1]]) == text
    counted = [label for label in row["labels"] if label != IGNORED]
    assert chat_tokenizer.decode(counted) == "b<|endoftext|>d<|endoftext|>"
    prompt = chat_tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    assert chat_tokenizer.decode(prompt_ids(row)) == prompt
    assert chat_tokenizer.decode(completion_ids(row)) == "d<|endoftext|>"


def test_a_template_that_changes_earlier_messages_gives_a_row_per_answer(chat_tokenizer):
    """This one shows the number of messages at the start."""
    chat_tokenizer.chat_template = (
        "{{ messages|length if not add_generation_prompt else messages|length + 1 }}" + TEMPLATE
    )
    first, second = chat_pieces(CHAT, chat_tokenizer)
    assert [piece.text for piece in first][1] == "b<|endoftext|>" and first[0].text.startswith("3<|system|>")
    assert [piece.text for piece in second][1] == "d<|endoftext|>" and "b<|endoftext|>" in second[0].text


def test_a_chat_that_does_not_fit_the_template_gives_one_line(chat_tokenizer, tmp_path):
    data = load(write(tmp_path, [{"messages": CHAT}] * 20))
    for template in ("{{ raise_exception('no system message') }}", "{{ messages[0].content }}"):
        chat_tokenizer.chat_template = template
        with pytest.raises(UserError, match="chat 0 of train does not fit the tokenizer's chat template"):
            list(data.pieces("train", chat_tokenizer))


def test_long_rows_lose_the_beginning_of_their_prompt(tokenizer, tmp_path):
    rows = [*PAIRS[:10], {"prompt": "a " * 60, "completion": " 7"}, {"prompt": "a", "completion": " b" * 60}]
    data, notes = load(write(write(tmp_path, rows), PAIRS, "validation.jsonl")), []
    found = token_rows(data, "train", tokenizer, 16, notes)
    whole = encode(next(iter(data.pieces("train", tokenizer))), tokenizer)
    assert len(found) == 11 and found[0] == whole
    assert max(found["length"][:]) == 16 and tokenizer.decode(completion_ids(found[10])) == " 7<|endoftext|>"
    assert len(notes) == 2 and all(note.startswith("1 of 12 ") for note in notes)
    with pytest.raises(UserError, match="--block_size 1"):
        token_rows(data, "train", tokenizer, 1, notes)


# ---- packing ----


def rows_of(*lengths: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 50, (length + 1,), generator=generator).tolist() for length in lengths]
    return datasets.Dataset.from_list([row_of([(row[:2], False), (row[2:], True)]) for row in tokens])


def test_blocks_of_a_hand_made_example():
    rows = rows_of(3, 4, 2, 5)
    blocks = pack_rows(rows, 6)
    assert blocks["length"][:] == [3, 4 + 2, 5]  # the third row fits into both open blocks, and fills the second one
    assert blocks[1]["position_ids"] == [0, 1, 2, 3, 0, 1]
    assert blocks[1]["input_ids"] == rows[1]["input_ids"] + rows[2]["input_ids"]
    assert blocks[1]["labels"] == rows[1]["labels"] + rows[2]["labels"]
    batch = RowCollator(0)([blocks[0], blocks[1]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 0, 1]]
    assert batch["labels"][0].tolist() == [*rows[0]["labels"], *[IGNORED] * 3]
    padded = RowCollator(0)([rows[0], rows[1]])
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_logits_of_a_row_in_a_block_are_those_of_the_row_alone(attention):
    """In train mode, as in training, and with a cache by default, as a teacher has. A block-diagonal mask built by
    hand gives the same logits.
    """
    model = random_gpt2(50, 0, layers=2, width=32, positions=24, dropout=0.0).train()
    model.set_attn_implementation(attention)
    rows = rows_of(5, 7, 3, 9, 4)
    blocks = pack_rows(rows, 16)
    batch = RowCollator(0)(list(blocks))
    labels = batch.pop("labels")
    logits = model(**batch).logits
    alone = {tuple(row["labels"]): model(torch.tensor([row["input_ids"]])).logits[0] for row in rows}
    for found, block, targets, positions in zip(logits, blocks, labels, batch["position_ids"], strict=True):
        starts = [*(place for place in range(block["length"]) if positions[place] == 0), block["length"]]
        for start, end in zip(starts, starts[1:], strict=False):
            torch.testing.assert_close(found[start:end], alone.pop(tuple(targets[start:end].tolist())))
        document = (positions[: block["length"]] == 0).cumsum(0)
        same = (document[:, None] == document[None]).tril()
        mask = torch.zeros(same.shape).masked_fill(~same, torch.finfo(torch.float32).min)
        by_hand = model(
            torch.tensor([block["input_ids"]]),
            position_ids=torch.tensor([block["position_ids"]]),
            attention_mask=mask[None, None],
        ).logits[0]
        torch.testing.assert_close(found[: block["length"]], by_hand)
    assert not alone


def test_a_model_that_takes_no_positions_does_not_keep_documents_apart():
    assert keeps_documents_apart(random_gpt2(50, 0, layers=1, width=32, positions=16, dropout=0.1))
    assert not keeps_documents_apart(BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)))


# ---- the script ----


def distill(folder: Path, data: Path, *words: object) -> dict:
    run_script(SCRIPT, recipe_of(*TINY), "--dataset", data, "--output_dir", folder, *words)
    return json.loads((folder / "results.json").read_text())


def test_a_run_reports_the_exact_match_of_greedy_answers(tmp_path, capsys):
    data = write(tmp_path / "data", [{"prompt": f"say {n % 3}:", "completion": f" {n % 3}"} for n in range(400)])
    words = ["--per_device_train_batch_size", 4, "--from_scratch_learning_rate", 1e-2, "--num_train_epochs", 2]
    found = distill(tmp_path / "run", data, *words)
    check_verdict(found)
    assert found["primary_metric"]["name"] == "exact_match"
    assert "packed into" in found["data_notes"] and "'prompt' contains prompts" in found["data_notes"]
    folder = tmp_path / "run" / "student"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = load(data).splits["validation"]
    right = 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        right += tokenizer.decode(answer[0, ids.shape[1] :]) == f"{row['completion']}<|endoftext|>"
    assert found["models"]["student"]["metrics"]["validation"]["exact_match"] == pytest.approx(right / len(rows))
    assert right
    check_evaluation(tmp_path / "run", tmp_path)
    capsys.readouterr()
    run_readme(folder)
    assert "say" in capsys.readouterr().out


def test_rows_are_padded_for_a_model_that_cannot_keep_them_apart(tokenizer, tmp_path):
    """Bloom derives its positions from the attention mask."""
    teacher, data = tmp_path / "teacher", write(tmp_path / "data", PAIRS)
    tokenizer.save_pretrained(teacher)
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    BloomForCausalLM(config).save_pretrained(teacher)
    words = ["--dataset", data, "--output_dir", tmp_path / "run", "--report_to", "none", "--precision", "fp32"]
    words += ["--teacher", teacher, "--teacher_epochs", 1, "--num_train_epochs", 1, "--block_size", 32]
    run_script(SCRIPT, *words, "--student", "scratch", "--student_width", 32)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "padded instead of packed" in found["data_notes"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").eval()
    losses = []
    for row in token_rows(load(data), "validation", tokenizer, 32, []):  # one at a time, so without padding
        logits = student(torch.tensor([row["input_ids"]])).logits[0]
        losses.append(F.cross_entropy(logits, torch.tensor(row["labels"]), reduction="none"))
    tokens = torch.cat(losses)
    perplexity = tokens[tokens > 0].mean().exp().item()  # IGNORED labels have the loss 0
    assert found["models"]["student"]["metrics"]["validation"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_chats_with_a_chat_model_and_without_one(chat_tokenizer, tmp_path, capsys):
    data = write(tmp_path / "data", [{"messages": [*CHAT[1:3], *CHAT[3:]]}] * 20)
    teacher = tmp_path / "teacher"
    chat_tokenizer.save_pretrained(teacher)
    random_gpt2(len(chat_tokenizer), 0, layers=2, width=32, positions=64, dropout=0.1).save_pretrained(teacher)
    words = ["--dataset", data, "--output_dir", tmp_path / "run", "--report_to", "none", "--precision", "fp32"]
    run_script(
        SCRIPT, *words, "--teacher", teacher, "--teacher_epochs", 1, "--num_train_epochs", 1, "--block_size", 64
    )
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["corpus"]["bytes"]["validation"] == 2 * found["data"]["validation"]  # "b" and "d"
    run_readme(tmp_path / "run" / "student")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        distill(tmp_path / "other", data)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "--teacher" in error and "chat template" in error and not (tmp_path / "other").exists()
