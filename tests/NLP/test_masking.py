"""Rows of tokens for masked language models, their masks, and word pieces."""

import subprocess
import sys

import datasets
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kd.common.utils.tasks import IGNORED
from kd.nlp.data.masking import MaskedRows, Masking, fixed_masks, token_rows
from kd.nlp.teacher_model.generative import byte_level_bpe
from kd.nlp.teacher_model.masked import SPECIAL
from kd_testing.paths import REPO

# ---- rows ----


def test_word_pieces_cover_their_texts_and_have_an_order(sentences, tokenizer):
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    letters = {letter for text in sentences for letter in text.lower() if letter != " "}
    first = [*SPECIAL, *sorted(letters), *(f"##{letter}" for letter in sorted(letters))]
    assert pieces[: len(first)] == first and pieces[len(first) :] == sorted(pieces[len(first) :])
    assert len(pieces) == 200 and any(len(piece) > 4 for piece in pieces if piece[:2] == "##")
    encoded = tokenizer(sentences, add_special_tokens=False)["input_ids"]
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)


@pytest.mark.slow
def test_word_pieces_are_the_same_in_every_process(tokenizer):
    program = (
        "from kd.nlp.data.intents import load_intents; from kd.nlp.teacher_model.masked import word_pieces;"
        "print(sorted(word_pieces(load_intents()['train']['text'][:200], 200, 16).get_vocab().items()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.splitlines()[-1] == str(sorted(tokenizer.get_vocab().items()))


def test_texts_fill_rows_and_every_token_stays(sentences, tokenizer):
    rows = token_rows(sentences, tokenizer, 16, pack=True, words=True)
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = [row.tolist() for row in rows["input_ids"][:]]
    assert all(row[0] == first and row[-1] == last for row in ids)
    assert {len(row) for row in ids[:-1]} == {16} and rows["length"][:].tolist() == list(map(len, ids))
    stream = [token for row in ids for token in row[1:-1]]
    expected = [t for text in sentences for t in [*tokenizer(text, add_special_tokens=False)["input_ids"], last]]
    assert stream == expected[:-1]


def test_truncated_texts_are_the_rows_of_the_tokenizer(sentences, tokenizer):
    rows = token_rows(sentences, tokenizer, 10, pack=False, words=False)
    expected = tokenizer(sentences, truncation=True, max_length=10)["input_ids"]
    assert [row.tolist() for row in rows["input_ids"][:]] == expected


def test_a_line_continues_the_line_before(tokenizer):
    rows = token_rows(["set an\n", "alarm\n"], tokenizer, 16, pack=True, words=False)
    assert rows[0]["input_ids"].tolist() == tokenizer("set an alarm")["input_ids"]


@pytest.mark.parametrize("kind", ["word pieces", "bytes"])
def test_the_word_of_a_token_starts_where_its_tokenizer_splits(sentences, tokenizer, kind):
    if kind == "bytes":
        tokenizer = byte_level_bpe(sentences, 300, 16)
        tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"})
    rows = token_rows(sentences, tokenizer, 40, pack=False, words=True)
    for text, starts in zip(sentences, rows["starts"][:], strict=True):
        words = tokenizer(text, add_special_tokens=False).word_ids()
        words = words[:38]
        expected = [0, *(words.index(word) + 1 for word in words), len(words) + 1]
        assert starts.tolist() == expected


# ---- masks ----


def masks(rows: datasets.Dataset, masking: Masking, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Original tokens, inputs and labels of all rows, joined."""
    masked = MaskedRows(rows, masking, seed)
    masked.set_epoch(epoch)
    found = [masked[number] for number in range(len(masked))]
    inputs, labels = (torch.cat([row[name] for row in found]) for name in ("input_ids", "labels"))
    return torch.cat(list(rows["input_ids"][:])), inputs, labels


def test_a_mask_of_given_draws(tokenizer):
    """Tokens of three words, A, B B and C, with draws that choose B and C: the mask token, another token, the same."""
    masking = Masking(tokenizer, share=0.15, whole_words=True)
    ids = torch.tensor([tokenizer.cls_token_id, 20, 21, 22, 23, tokenizer.sep_token_id])
    draws = torch.tensor(
        [[0.0, 0.5, 0.1, 0.9, 0.14, 0.0], [0.0, 0.0, 0.79, 0.85, 0.95, 0.0], [0.0, 0.0, 0.0, 0.5, 0.0, 0.0]]
    )
    inputs, labels = masking.mask(ids, draws, starts=torch.tensor([0, 1, 2, 2, 4, 5]))
    other = masking.ordinary[len(masking.ordinary) // 2].item()
    assert inputs.tolist() == [ids[0], 20, tokenizer.mask_token_id, other, 23, ids[-1]]
    assert labels.tolist() == [IGNORED, IGNORED, 21, 22, 23, IGNORED]
    assert masking.mask(ids, draws)[1].tolist() == [IGNORED, IGNORED, 21, IGNORED, 23, IGNORED]


@pytest.mark.parametrize("whole_words", [False, True])
def test_the_shares_of_masks_are_those_of_bert(sentences, tokenizer, whole_words):
    rows = token_rows(sentences * 8, tokenizer, 64, pack=True, words=whole_words)
    ids, inputs, labels = masks(rows, Masking(tokenizer, 0.15, whole_words))
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = labels != IGNORED
    assert not chosen[special].any() and torch.equal(inputs[~chosen], ids[~chosen])
    assert torch.equal(labels[chosen], ids[chosen])
    number, total = (~special).sum().item(), chosen.sum().item()
    assert total / number == pytest.approx(0.15, abs=0.01)
    assert (inputs[chosen] == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.03)
    changed = chosen & (inputs != tokenizer.mask_token_id) & (inputs != ids)
    assert changed.sum() / total == pytest.approx(0.1, abs=0.02)
    assert not torch.isin(inputs[changed], torch.tensor(tokenizer.all_special_ids)).any()
    assert len(inputs[changed].unique()) > 60


def test_whole_words_are_masked_whole(sentences, tokenizer):
    rows = token_rows(sentences, tokenizer, 40, pack=False, words=True)
    pieces = 0
    for row, masked in zip(rows, MaskedRows(rows, Masking(tokenizer, 0.3, True), 0), strict=False):
        chosen = masked["labels"] != IGNORED
        assert torch.equal(chosen, chosen[row["starts"]])
        pieces += (chosen & (row["starts"] != torch.arange(len(chosen)))).sum().item()
    assert pieces > 20


def test_masks_depend_on_seed_epoch_and_row_alone(sentences, tokenizer):
    rows = token_rows(sentences, tokenizer, 16, pack=True, words=False)
    masking = Masking(tokenizer)
    _, inputs, labels = masks(rows, masking)
    assert torch.equal(masks(rows, masking)[1], inputs)
    assert not torch.equal(masks(rows, masking, seed=1)[2], labels)
    assert not torch.equal(masks(rows, masking, epoch=1)[2], labels)
    one = MaskedRows(rows, masking, 0)
    assert torch.equal(one.__getitems__([7, 3, 5])[1]["input_ids"], one[3]["input_ids"])
    fixed = fixed_masks(rows, masking)
    assert torch.equal(torch.cat(list(fixed["labels"][:])), labels)


@pytest.mark.slow
def test_persistent_workers_have_the_masks_of_each_epoch(sentences, tokenizer):
    rows = MaskedRows(token_rows(sentences[:8], tokenizer, 16, False, False), Masking(tokenizer), 0)
    loader = DataLoader(rows, 4, collate_fn=rows.masking.collate, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        found = torch.cat([batch["labels"].flatten() for batch in loader])
        expected = [rows.masking.collate(rows.__getitems__([*range(i, i + 4)]))["labels"].flatten() for i in (0, 4)]
        assert torch.equal(found, torch.cat(expected))


def test_a_batch_is_padded_with_ignored_labels(tokenizer):
    rows = [{"input_ids": torch.arange(5, 5 + n), "labels": torch.full((n,), IGNORED)} for n in (2, 4)]
    batch = Masking(tokenizer).collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, tokenizer.pad_token_id, tokenizer.pad_token_id], [5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1] * 4] and (batch["labels"] == IGNORED).all()
