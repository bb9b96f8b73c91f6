"""Students with another vocabulary than the teacher: bytes of tokens, alignment, groups, and the script."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kd.common import token_terms
from kd.common.metrics.quality import language_metrics
from kd.common.metrics.verdict import measure_bits_per_byte
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.corpora import pack, stack
from kd.nlp.data.vocabularies import (
    UNALIGNED,
    Stream,
    check_text_kept,
    document_ends,
    read_stream,
    same_ends,
    teacher_blocks,
    token_bytes,
    token_groups,
)
from kd.nlp.student_model.across_vocabularies import METHODS, AlignedTeacher, aligned_term
from kd.nlp.student_model.token_objective import divergence_of, token_level
from kd.nlp.teacher_model.generative import byte_level_bpe, random_gpt2
from kd.nlp.teacher_model.masked import word_pieces
from kd_testing.scripts import recipe_of, run_script

SCRIPT = "NLP/scripts/distill_gpt.py"
LETTERS = [letter for _, letter in sorted(bytes_to_unicode().items())]
TEXTS = [
    "The naïve café opened – its first guests came from 東京 and São Paulo.",
    "Les élèves préfèrent déjà l'été; the others prefer the winter, they wrote.",
    "Ein größeres Übel: 3.5 % of the readers of the other theatre never thought 😀 of it.",
    "weather, whether, then; another mother bothers the brother\n\n    of the father",
]


def bpe(*merges: str) -> GPT2Tokenizer:
    """A byte-level tokenizer with the end of the text, all bytes, and merges "a b" in GPT-2's alphabet."""
    pairs: Any = [tuple(merge.split()) for merge in merges]
    tokens = ["<|endoftext|>", *LETTERS, *("".join(pair) for pair in pairs)]
    return GPT2Tokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=pairs)


def stream_of(texts: list[str], tokenizer: Any) -> Stream:
    return read_stream(texts, tokenizer, token_bytes(tokenizer))


# "ï" is the bytes C3 AF. The student has it as a token, the teacher has a token of "a" and its first byte.
STUDENT, TEACHER = bpe("n a", "Ã ¯"), bpe("a Ã")


# ---- bytes and alignment ----


def test_the_bytes_of_byte_level_tokens() -> None:
    texts, vocabulary = token_bytes(TEACHER), TEACHER.get_vocab()
    assert texts[vocabulary["aÃ"]] == b"a\xc3" and texts[vocabulary["Ġ"]] == b" " and texts[0] == b""
    for text in TEXTS:
        assert b"".join(texts[number] for number in TEACHER(text)["input_ids"]) == text.encode()


def test_tokens_that_end_inside_a_character_are_aligned_by_bytes() -> None:
    """Student: end, na, ï, v, e, end; teacher: end, n, a + C3, AF, v, e, end."""
    student, teacher = stream_of(["naïve"], STUDENT), stream_of(["naïve"], TEACHER)
    assert student.ends.tolist() == [1, 3, 5, 6, 7, 8] and teacher.ends.tolist() == [1, 2, 4, 5, 6, 7, 8]
    assert same_ends(student, teacher).tolist() == [0, UNALIGNED, 3, 4, 5, 6]
    assert same_ends(teacher, student).tolist() == [0, UNALIGNED, UNALIGNED, 2, 3, 4, 5]


def test_the_teacher_gets_its_tokens_of_the_text_of_each_block() -> None:
    """Blocks of two: (end, na), (ï, v), (e). The token a + C3 contains the first byte of the second block."""
    student, teacher = stream_of(["naïve"], STUDENT), stream_of(["naïve"], TEACHER)
    blocks = teacher_blocks(student, teacher, block_size=2, most=10)
    assert blocks.starts.tolist() == [0, 2, 5] and blocks.stops.tolist() == [1, 5, 6]
    assert blocks.positions.tolist() == [[0, UNALIGNED], [1, 2], [0, UNALIGNED]]
    assert blocks.aligned == 4 / 5 and blocks.cut == 0
    cut = teacher_blocks(student, teacher, block_size=2, most=2)
    assert cut.positions.tolist() == [[0, UNALIGNED], [1, UNALIGNED], [0, UNALIGNED]]
    assert cut.aligned == 3 / 5 and cut.cut == 1 / 5 and cut.stops.tolist() == [1, 4, 6]


@pytest.fixture(scope="module")
def learned() -> tuple[GPT2Tokenizer, GPT2Tokenizer]:
    """Vocabularies of 330 and 290 tokens. The larger one has all merges of the smaller."""
    large, small = (byte_level_bpe(TEXTS * 3, size, 64) for size in (330, 290))
    return large, small


@pytest.mark.parametrize("block_size", [3, 16])
def test_aligned_positions_have_read_the_same_bytes_and_no_other_has(learned: Any, block_size: int) -> None:
    for student, teacher in (learned, learned[::-1]):
        texts, streams = (
            [token_bytes(t) for t in (student, teacher)],
            [stream_of(TEXTS, t) for t in (student, teacher)],
        )
        blocks = teacher_blocks(streams[0], streams[1], block_size, 1000)
        rows = pack(TEXTS, student, block_size)[:]
        both = zip(texts, streams, strict=True)
        read = [np.cumsum([len(text[token]) or 1 for token in stream.tokens]) for text, stream in both]
        aligned = 0
        for row, places in enumerate(blocks.positions):
            for column in (places != UNALIGNED).nonzero().flatten().tolist():
                place, other = row * block_size + column, int(blocks.starts[row] + places[column])
                assert streams[0].tokens[place] == rows["input_ids"][row, column]
                assert read[0][place] == read[1][other]
                assert other < blocks.stops[row] and rows["labels"][row, column] == streams[0].tokens[place + 1]
                aligned += 1
        assert aligned == len(set(read[0][:-1]) & set(read[1]))
        for row, first in enumerate(blocks.starts):  # the token with the first byte of the block
            begin = read[0][row * block_size - 1] if row else 0
            assert read[1][first] > begin and (not first or read[1][first - 1] <= begin)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Like the tokenizers of Llama: spaces are letters, one is added in front, and other bytes are tokens."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.", "▁t"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "t")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_sentence_piece_tokens_are_aligned_with_byte_level_ones() -> None:
    tokenizer, text = sentence_piece(), "to the naïve"
    stream = stream_of([text], tokenizer)
    assert stream.exact.all() and stream.ends[-1] == len(text.encode()) + 2
    assert tokenizer.convert_ids_to_tokens(stream.tokens.tolist())[1:3] == ["▁t", "o"] and stream.ends[1] == 2
    other = stream_of([text], bpe())
    assert (same_ends(stream, other) != UNALIGNED).all()  # the other one has all bytes
    check_text_kept("sentence_piece", tokenizer)


def test_of_several_tokens_with_one_end_the_last_is_aligned() -> None:
    """A space in front that is a token of its bytes: it ends where the text before it ends."""
    ends, exact = document_ends([b" ", b"a", b"b"], b"ab")
    assert ends.tolist() == [0, 1, 2] and exact
    one, two = (Stream(np.zeros(len(e)), np.array(e), np.full(len(e), True)) for e in ([1, 1, 2], [1, 2]))
    assert same_ends(one, two).tolist() == [UNALIGNED, 0, 1] and same_ends(two, one).tolist() == [1, 2]


def test_documents_that_a_tokenizer_changes_are_not_aligned_but_the_others_are(learned: Any) -> None:
    changing = byte_level_bpe(TEXTS, 300, 64)
    changing.backend_tokenizer.normalizer = normalizers.Lowercase()
    student, teacher = (
        stream_of(["an apple", "An Apple", "a pear"], learned[0]),
        stream_of(["an apple", "An Apple", "a pear"], changing),
    )
    aligned = student.ends[same_ends(student, teacher) != UNALIGNED]
    assert not set(aligned) & set(range(11, 19))  # the bytes of the second document
    assert {1, 9, 10, 19, 25, 26} <= set(aligned.tolist())
    assert (np.diff(teacher.ends) >= 0).all()


def test_a_tokenizer_that_drops_spaces_is_refused() -> None:
    with pytest.raises(UserError, match="tokens of BERT do not have the bytes of the text"):
        check_text_kept("BERT", word_pieces(TEXTS, 200, 16))


# ---- groups of tokens ----


def test_tokens_of_one_vocabulary_count_for_the_shared_token_that_they_start_with() -> None:
    """The teacher alone has `the`, which the student reads as th, e. The student alone has `ea`, read as e, a."""
    student, teacher = bpe("t h", "e a"), bpe("t h", "th e")
    groups = token_groups(student, teacher, (len(student), len(teacher)))
    of_student, of_teacher = student.get_vocab(), teacher.get_vocab()
    assert groups.shared == groups.number == 1 + 256 + 1
    assert groups.student[of_student["th"]] == groups.teacher[of_teacher["th"]] == groups.teacher[of_teacher["the"]]
    assert groups.student[of_student["e"]] == groups.student[of_student["ea"]] == groups.teacher[of_teacher["e"]]
    assert groups.student[0] == groups.teacher[0] == 0
    assert len(set(groups.student.tolist())) == len(set(groups.teacher.tolist())) == groups.number


def test_a_text_is_divided_until_both_vocabularies_contain_its_start() -> None:
    """abcd is the teacher's; the student reads abc, d; abc is not the teacher's, which reads ab, c."""
    student, teacher = bpe("a b", "ab c"), bpe("a b", "c d", "ab cd")
    groups = token_groups(student, teacher, (len(student), len(teacher)))
    expected = groups.student[student.get_vocab()["ab"]]
    assert groups.teacher[teacher.get_vocab()["abcd"]] == groups.student[student.get_vocab()["abc"]] == expected


def test_a_token_that_ends_inside_a_character_counts_for_its_longest_shared_start() -> None:
    student, teacher = bpe("n a"), bpe("n a", "na Ã")
    groups = token_groups(student, teacher, (len(student), len(teacher)))
    assert groups.teacher[teacher.get_vocab()["naÃ"]] == groups.student[student.get_vocab()["na"]]


def test_special_tokens_are_a_group_only_if_both_vocabularies_have_some() -> None:
    plain, padded = bpe(), bpe()
    padded.add_special_tokens({"pad_token": "<pad>"})
    sizes = len(plain), len(padded)
    one = token_groups(plain, padded, sizes)
    assert one.number == 257 and one.teacher[-1] == 257  # left out
    both = token_groups(padded, padded, (sizes[1] + 3, sizes[1]))  # with logits that have no token
    assert both.number == 258 and both.student[-4:].tolist() == [257] * 4


def test_equal_vocabularies_have_one_token_in_each_group(learned: Any) -> None:
    groups = token_groups(learned[0], learned[0], (330, 330))
    assert torch.equal(groups.student, groups.teacher)
    assert sorted(groups.student.tolist()) == list(range(330)) and groups.number == 330


def test_after_aligned_positions_the_next_tokens_of_nested_vocabularies_are_in_one_group(learned: Any) -> None:
    """So the teacher's probability of a group is exactly its probability of the student's next token."""
    for student, teacher in (learned, learned[::-1]):
        one, two = (stream_of(TEXTS, tokenizer) for tokenizer in (student, teacher))
        groups = token_groups(student, teacher, (len(student), len(teacher)))
        places = same_ends(one, two)[:-1]
        aligned = np.flatnonzero(places != UNALIGNED)
        assert len(aligned) > 100
        of_student = groups.student[torch.from_numpy(one.tokens[aligned + 1])]
        assert torch.equal(of_student, groups.teacher[torch.from_numpy(two.tokens[places[aligned] + 1])])


# ---- teacher and objective ----


@pytest.fixture(scope="module")
def across(learned: Any) -> Any:
    """Blocks of both tokenizations, a teacher of the larger vocabulary, and rows of the smaller."""
    teacher, student = learned
    blocks = teacher_blocks(stream_of(TEXTS, student), stream_of(TEXTS, teacher), 12, 1000)
    torch.manual_seed(0)
    model = random_gpt2(len(teacher), 0, layers=1, width=32, positions=64, dropout=0.1)
    return blocks, model, pack(TEXTS, student, 12)


def test_the_teacher_reads_its_tokens_and_is_read_at_the_aligned_positions(across: Any) -> None:
    blocks, model, _ = across
    outputs = AlignedTeacher(model, blocks, "fp32").batch(torch.tensor([2, 0, 5]))
    assert outputs.mask is not None and torch.equal(outputs.mask, blocks.positions[[2, 0, 5]] != UNALIGNED)
    expected = []
    for row in (2, 0, 5):
        ids = blocks.tokens[blocks.starts[row] : blocks.stops[row]]
        logits = model.eval()(input_ids=ids[None]).logits[0]
        expected.append(logits[[place for place in blocks.positions[row].tolist() if place != UNALIGNED]])
    torch.testing.assert_close(outputs.logits, torch.cat(expected))


def test_with_equal_vocabularies_the_objective_is_that_of_kd(learned: Any) -> None:
    tokenizer = learned[0]
    rows = stack(list(pack(TEXTS, tokenizer, 12)))
    blocks = teacher_blocks(stream_of(TEXTS, tokenizer), stream_of(TEXTS, tokenizer), 12, 12)
    assert blocks.aligned == 1 and blocks.cut == 0
    student, teacher = (random_gpt2(330, 0, 1, 32, positions=12, dropout=0.0).eval() for _ in range(2))
    logits, groups = student(rows["input_ids"]).logits, token_groups(tokenizer, tokenizer, (330, 330))
    aligned = AlignedTeacher(teacher, blocks, "fp32").batch(torch.arange(len(rows["labels"])))
    found = aligned_term(lambda s, t: METHODS["shared_tokens"](s, t, groups, temperature=3.0), blocks)
    expected = token_level(0.0, divergence_of("kd", 3.0)).objective
    live = Outputs(logits=teacher(rows["input_ids"]).logits.detach())
    value = expected(Outputs(logits=logits), live, rows["labels"])["tokens"]
    torch.testing.assert_close(found(Outputs(logits=logits), aligned, rows["labels"]), value)


def test_each_aligned_position_has_the_same_weight_in_any_batch(across: Any) -> None:
    """The gradient of micro-batches, weighted by their labels as the trainer does, is that of the whole batch."""
    blocks, model, data = across
    teacher, rows = AlignedTeacher(model, blocks, "fp32"), stack(list(data))
    logits = torch.randn(len(data), 12, 290)
    term = aligned_term(lambda s, t: METHODS["uld"](s, t, temperature=1.0), blocks)

    def loss(chosen: list[int]) -> Tensor:
        return term(Outputs(logits=logits[chosen]), teacher.batch(torch.tensor(chosen)), rows["labels"][chosen])

    def number(chosen: list[int]) -> int:
        return int((rows["labels"][chosen] >= 0).sum())

    numbers = list(range(len(data)))
    parts = [numbers[:3], numbers[3:4], numbers[4:]]
    shares = torch.stack([loss(part) * number(part) / number(numbers) for part in parts])
    torch.testing.assert_close(shares.sum(), loss(numbers))
    each = METHODS["uld"](logits[blocks.positions != UNALIGNED], teacher.batch(torch.arange(len(data))).logits,
                          temperature=1.0)  # fmt: skip
    torch.testing.assert_close(loss(numbers), each.mean())


@pytest.mark.parametrize("method", METHODS)
def test_chunks_have_the_value_and_the_gradient_of_all_positions_at_once(
    across: Any, learned: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    blocks, model, data = across
    groups = token_groups(learned[1], learned[0], (290, 330))
    divergence = METHODS[method] if method == "uld" else partial(METHODS[method], groups=groups)
    chosen, rows = torch.tensor([1, 4, 0]), stack(list(data))
    teacher = AlignedTeacher(model, blocks, "fp32").batch(chosen)
    logits = torch.randn(3, 12, 290, requires_grad=True)
    aligned, labels = logits[blocks.positions[chosen] != UNALIGNED], rows["labels"][chosen]
    expected = divergence(aligned, teacher.logits).sum() / (blocks.aligned * (labels != IGNORED).sum())
    for chunk in (1, 2 * 290, 2**30):
        monkeypatch.setattr(token_terms, "CHUNK", chunk)
        found = aligned_term(divergence, blocks)(Outputs(logits=logits), teacher, labels)
        torch.testing.assert_close(found, expected)
        pair = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, expected)]
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_aligned_positions_has_no_loss_and_no_gradient(across: Any, learned: Any, method: str) -> None:
    groups = token_groups(learned[1], learned[0], (290, 330))
    divergence = METHODS[method] if method == "uld" else partial(METHODS[method], groups=groups)
    logits, labels = torch.randn(2, 12, 290, requires_grad=True), torch.full((2, 12), IGNORED)
    teacher = Outputs(logits=torch.randn(0, 330), mask=torch.zeros(2, 12, dtype=torch.bool))
    value = aligned_term(divergence, across[0])(Outputs(logits=logits), teacher, labels)
    value.backward()
    assert value == 0 and logits.grad is not None and not logits.grad.any()


def test_bits_per_byte_of_all_blocks_are_those_of_the_metrics() -> None:
    counts = np.abs(np.random.default_rng(0).normal(size=(7, 3))) * 100 + 1
    measured = measure_bits_per_byte(counts, 321)
    assert measured.score(np.arange(7)) == pytest.approx(language_metrics(counts, 321)["bits_per_byte"])
    assert measured.examples == 7


# ---- the script ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few texts in a folder: 40 of train and 12 of validation."""
    path = tmp_path_factory.mktemp("texts")
    for split, number in (("train", 40), ("validation", 12)):
        rows = [{"text": f"{TEXTS[i % 4]} And {i} {TEXTS[(i * 7 + 1) % 4]}"} for i in range(number)]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory, learned: Any) -> Path:
    """A folder with a GPT-2 of the smaller vocabulary."""
    path = tmp_path_factory.mktemp("models") / "small"
    learned[1].save_pretrained(path)
    random_gpt2(len(learned[1]), 0, layers=1, width=32, positions=16, dropout=0.0).save_pretrained(path)
    return path


def distill(texts: Path, output: Path, *words: object) -> dict[str, Any]:
    sizes = "--teacher_layers 1 --teacher_width 32 --vocabulary_size 330 --teacher_epochs 1 --num_train_epochs 1"
    recipe = recipe_of(*sizes.split(), *"--block_size 16 --report_to none --precision fp32".split())
    data = () if "--dataset" in words else ("--dataset", texts)
    run_script(SCRIPT, recipe, *data, "--output_dir", output, *words)
    results: dict[str, Any] = json.loads((output / "results.json").read_text())
    return results


SMALLER = ("--student", "scratch", "--student_width", 32, "--student_vocabulary_size", 290)


def test_a_student_with_a_smaller_vocabulary_and_its_continued_run(folder: Path, tmp_path: Path) -> None:
    words = (*SMALLER, "--method", "shared_tokens:temperature=1")
    found = distill(folder, tmp_path / "run", *words)
    assert found["primary_metric"]["name"] == "bits_per_byte" and found["vocabularies"]["shared"] == 290
    score = {role: m["metrics"]["validation"]["bits_per_byte"] for role, m in found["models"].items()}
    assert found["verdict"]["control"]["gain"] == pytest.approx(score["control"] - score["student"], abs=1e-9)
    assert found["verdict"]["teacher"] is None
    assert 0.5 < found["vocabularies"]["aligned share"] < 1
    assert "agreement" not in found["models"]["student"]["metrics"]["validation"]
    saved = [AutoTokenizer.from_pretrained(tmp_path / "run" / name) for name in ("student", "stages/teacher")]
    assert [len(tokenizer) for tokenizer in saved] == [290, 330]
    for name in ("student", "stages/student"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "results.json").unlink()
    again = distill(folder, tmp_path / "run", *words, "--resume_from_checkpoint")
    assert again["models"]["student"]["metrics"] == found["models"]["student"]["metrics"]


@pytest.mark.slow
def test_a_named_student_two_seeds_accumulation_and_a_short_context(folder: Path, named: Path, tmp_path: Path) -> None:
    words = "--method", "uld", "--seeds", "0,1", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"
    found = distill(folder, tmp_path / "run", "--student", named, *words)
    assert found["seeds"] == [0, 1] and found["verdict"]["control"]["seeds"] == 2
    short = distill(folder, tmp_path / "short", "--teacher", named, "--teacher_epochs", "0", "--student", "scratch",
                    "--student_width", 32, "--student_vocabulary_size", 600, "--method", "uld")  # fmt: skip
    assert "the teacher reads at most 16 tokens" in short["data_notes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student", "SMALL"], "different vocabularies: pass --method uld, --method shared_tokens, "),
        (["--student", "SMALL", "--method", "reverse_kl"], "different vocabularies: pass --method uld"),
        (SMALLER, "--student_vocabulary_size needs a method for different vocabularies: pass --method uld or"),
        (["--method", "uld", "--student_vocabulary_size", 290], "--student is not scratch"),
        ([*SMALLER, "--method", "uld", "--hidden_weight", 1], "--hidden_weight needs the same tokens"),
        ([*SMALLER, "--method", "uld", "--on_policy_share", 0.5], "--on_policy_share needs the same tokens"),
        ([*SMALLER, "--method", "uld:beta=1"], "method uld has no argument 'beta'"),
        ([*SMALLER[:-1], 10, "--method", "uld"], "--student_vocabulary_size must be at least"),
        (["--student", "SMALL", "--method", "uld", "--block_size", 32], "at most 16"),
        (["--method", "uld", "--dataset", "answers"], "--method uld learns from plain texts"),
    ],
)
def test_invalid_arguments_give_one_line(
    folder: Path, named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Any, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        distill(folder, tmp_path / "run", *[named if word == "SMALL" else word for word in words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error, error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
