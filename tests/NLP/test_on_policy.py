"""On-policy distillation: the samples of the student, their loss, and training on them."""

import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from kd.common.cli import parse
from kd.common.outputs import Outputs
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.trainer import KDTrainer
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.intents import load_intents
from kd.nlp.data.prompt_rows import RowCollator, pack_rows, prompt_ids, row_of
from kd.nlp.scripts.distill_gpt import Arguments as LanguageArguments
from kd.nlp.scripts.distill_translation import Arguments as TranslationArguments
from kd.nlp.student_model.on_policy import OnPolicyObjective, StudentSamples, check_on_policy, groups_of_similar
from kd.nlp.student_model.token_objective import DIVERGENCES, divergence_of, token_level
from kd.nlp.teacher_model.generative import random_gpt2, random_marian
from kd_testing.processes import in_processes
from kd_testing.scripts import recipe_of, run_script
from kd_testing.tiny import arguments

END = 9
IDS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": END, "decoder_start_token_id": 0}
STEP = TrainerState(global_step=3, max_steps=10)
KINDS = ["continuations", "translations"]


def samples_of(kind: str, share: float = 1.0, **flags: Any) -> StudentSamples:
    base: dict[str, Any] = {"block_size": 8, "prompt_length": 3} if kind == KINDS[0] else {"max_length": 6}
    create: Any = LanguageArguments if kind == KINDS[0] else TranslationArguments
    args = create(on_policy_share=share, **(base | flags))
    return StudentSamples(args, SimpleNamespace(eos_token_id=END), seed=0)  # type: ignore[arg-type]


def network(kind: str, seed: int = 0, dropout: float = 0.1) -> PreTrainedModel:
    torch.manual_seed(seed)
    if kind == KINDS[0]:
        return random_gpt2(20, END, layers=1, width=32, positions=8, dropout=dropout)
    return random_marian(20, IDS, 32, 1, 1, dropout, max_length=8)


def rows_of(kind: str, number: int = 12) -> list[dict[str, Tensor]]:
    """Blocks of 8 tokens, or pairs of 5 source and 6 target tokens."""
    tokens = torch.randint(10, 20, (number, 14), generator=torch.Generator().manual_seed(1))
    if kind == KINDS[0]:
        return [{"input_ids": row[:8], "labels": row[1:9]} for row in tokens]
    start = torch.tensor([0])
    return [
        {
            "input_ids": row[:5],
            "attention_mask": torch.ones(5, dtype=torch.long),
            "labels": row[5:11],
            "decoder_input_ids": torch.cat([start, row[5:10]]),
        }
        for row in tokens
    ]


def batch_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# ---- samples ----


def counting_gpt2() -> PreTrainedModel:
    """A GPT-2 in train mode that is certain, without dropout, that the next token is the current one plus 1."""
    model: Any = random_gpt2(20, END, layers=1, width=32, positions=8, dropout=0.5).train()
    for name, weight in model.state_dict().items():
        if "c_proj" in name or "wpe" in name:
            weight.zero_()
    tokens = torch.eye(20, 32)
    model.transformer.wte.weight.data = tokens
    model.lm_head.weight = torch.nn.Parameter(100 * tokens.roll(1, dims=0))  # no longer tied
    return model


def test_continuations_come_from_the_student_and_end_where_it_ends_them():
    ids = torch.tensor([[4, 5, 6, 17, 17, 17, 17, 17], [14] + 7 * [END]])
    labels = torch.tensor([[5, 6, 17, 17, 17, 17, 17, 17], [17] + 7 * [IGNORED]])  # the last block may be short
    student, skip = counting_gpt2(), IGNORED
    batch = samples_of("continuations")(student, {"input_ids": ids, "labels": labels}, STEP, 0)
    assert batch.pop("sampled") is True and student.training
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[4, 5, 6, 7, 8, END], [14, 15, 16, 17, 18, 19]],  # the first row is padded with END
        "attention_mask": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
        "labels": [[skip, skip, 7, 8, END, skip], [15, 16, 17, 18, 19, 0]],
    }


def test_the_prompts_of_rows_end_before_the_last_completion():
    """A chat of two completions, a prompt of one token, and padding: packed into a block, or as padded rows."""
    i = IGNORED
    chat = [1, 2, 3, 4, 5, 6], [i, 3, 4, i, 6, 7]
    short = [8, 9], [9, 10]
    packed = {"input_ids": [[*chat[0], *short[0], 0]], "labels": [[*chat[1], *short[1], i]]}
    rows = {"input_ids": [chat[0], [*short[0], 0, 0, 0, 0]], "labels": [chat[1], [*short[1], i, i, i, i]]}
    packed["position_ids"], rows["attention_mask"] = [[0, 1, 2, 3, 4, 5, 0, 1, 0]], [[1] * 6, [1, 1, 0, 0, 0, 0]]
    for columns in (packed, rows):
        batch: dict[str, Any] = {name: torch.tensor(value) for name, value in columns.items()} | {"use_cache": False}
        prompts = samples_of("continuations").prompts(batch)
        assert [prompt.tolist() for prompt in prompts] == [[1, 2, 3, 4, 5], [8]]
    sampled = samples_of("continuations")(counting_gpt2(), batch, STEP, 0)
    assert sampled["labels"].tolist() == [[i, i, i, i, 6, 7, 8, END], [END] + 7 * [i]]


def test_a_long_prompt_does_not_shorten_the_samples_of_the_others():
    """Blocks of 8: after 7 tokens there is space for two more, the last as a label; after 1 and 2, for 8 and 7."""
    i, lengths = IGNORED, torch.tensor([[1], [7], [2]])
    places = torch.arange(8)
    batch = {
        "input_ids": torch.tensor([[13, *7 * [END]], [*range(10, 17), END], [13, 14, *6 * [END]]]),
        "labels": torch.where(places == lengths - 1, END, i),
        "attention_mask": (places < lengths).long(),
    }
    found = samples_of("continuations")(counting_gpt2(), batch, STEP, 0)["labels"]
    assert [row[row != i].tolist() for row in found] == [
        [14, 15, 16, 17, 18, 19, 0],  # as long as the limit of the third
        [17, 18],
        [15, 16, 17, 18, 19, 0, 1],
    ]
    few = samples_of("continuations", max_new_tokens=2)(counting_gpt2(), batch, STEP, 0)["labels"]
    assert [row[row != i].tolist() for row in few] == [[14, 15], [17, 18], [15, 16]]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [([5, 5, 5], [[0, 1, 2]]), ([3, 8, 4, 1], [[1, 2], [0], [3]]), ([1, 2], [[1, 0]]), ([], [])],
)
def test_groups_of_rows_with_similar_limits(limits, expected):
    assert groups_of_similar(limits) == expected


def test_the_prompts_of_packed_rows_are_those_of_the_rows():
    lengths = [(3, 2), (1, 4), (6, 1), (2, 2), (4, 3)]
    rows = [row_of([(range(10, 10 + prompt), False), (range(30, 30 + answer), True)]) for prompt, answer in lengths]
    packed = pack_rows(datasets.Dataset.from_list(rows), 10)
    for data in (rows, list(packed)):
        prompts = samples_of("continuations").prompts(RowCollator(0)(data))
        assert sorted(prompt.tolist() for prompt in prompts) == sorted(map(prompt_ids, rows))


@pytest.mark.parametrize(("token", "expected"), [(5, [5, 5, 5, 5, 5, 5]), (END, [END])])
def test_translations_come_from_the_student_and_end_where_it_ends_them(token, expected):
    student = network("translations")
    student.final_logits_bias[0, token] = 1e4  # certain
    student.generation_config.update(num_beams=4, repetition_penalty=1e9, min_length=4)  # not those of samples
    config = student.generation_config
    batch = samples_of("translations")(student.train(), batch_of(rows_of("translations", 2)), STEP, 0)
    assert batch["labels"].tolist() == [expected, expected]
    assert batch["decoder_input_ids"].tolist() == 2 * [[0, *expected[:-1]]]
    assert student.training and student.generation_config is config


def test_tokens_after_the_end_have_no_label():
    """The second of two translations ends first."""
    student, samples = network("translations"), samples_of("translations")
    student.generate = lambda *_, **__: torch.tensor([[0, 3, 4, 5, END], [0, 6, END, 0, 0]])
    batch = samples.translations(with_settings(student, samples), batch_of(rows_of("translations", 2)))
    assert batch["labels"].tolist() == [[3, 4, 5, END], [6, END, IGNORED, IGNORED]]
    assert batch["decoder_input_ids"].tolist() == [[0, 3, 4, 5], [0, 6, END, 0]]


def with_settings(student: PreTrainedModel, samples: StudentSamples) -> PreTrainedModel:
    student.generation_config = samples.settings(student)
    return student


def test_padding_on_the_left_does_not_change_the_most_probable_continuation():
    student = network("continuations", dropout=0.0).eval()
    ids = torch.tensor([[14, 11, 17, 0, 0, 0, 0, 0], [12] + 7 * [END]])
    labels = torch.tensor([[0] * 8, [0] + 7 * [IGNORED]])
    almost_greedy = samples_of("continuations", sampling_temperature=1e-6, max_new_tokens=4)
    batch = almost_greedy(student, {"input_ids": ids, "labels": labels}, STEP, 0)
    for row, prompt in zip(batch["input_ids"], ([14, 11, 17], [12]), strict=True):
        alone = student.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=END)[0]
        assert row[: len(alone) - 1].tolist() == alone[:-1].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_depend_on_seed_update_micro_batch_process_and_weights_alone(kind):
    student, batch, samples = network(kind), batch_of(rows_of(kind)), samples_of(kind)
    state = torch.get_rng_state()
    first = samples(student, batch, STEP, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert same(samples(student, batch, STEP, 0), first)
    next_step = TrainerState(global_step=4, max_steps=10)
    others = [samples(student, batch, STEP, 1), samples(student, batch, next_step, 0)]
    others += [replace(samples, **{name: 1})(student, batch, STEP, 0) for name in ("seed", "process")]
    others.append(samples(network(kind, seed=5), batch, STEP, 0))
    assert not any(same(first, other) for other in others)


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one if name != "sampled")


def test_temperature_and_top_p_restrict_the_samples():
    batch, student = batch_of(rows_of("translations")), network("translations")
    greedy = student.eval()(**{n: v for n, v in batch.items() if n != "labels"}).logits[:, 0].argmax(1)
    for flags in ({"sampling_temperature": 1e-6}, {"top_p": 1e-6}):
        found = samples_of("translations", max_new_tokens=1, **flags)(student, batch, STEP, 0)
        assert torch.equal(found["labels"][:, 0], greedy)
    found = samples_of("translations", max_new_tokens=1)(student, batch, STEP, 0)
    assert not torch.equal(found["labels"][:, 0], greedy)


def test_the_share_of_updates_on_samples():
    samples = samples_of("translations", share=0.3, on_policy_start=0.5)
    drawn = [samples.is_sampled(step, 4000) for step in range(4000)]
    assert not any(drawn[:2000]) and sum(drawn[2000:]) == pytest.approx(600, abs=60)  # three standard deviations
    assert drawn == [samples.is_sampled(step, 4000) for step in range(4000)]
    assert drawn != [replace(samples, seed=1).is_sampled(step, 4000) for step in range(4000)]
    assert all(samples_of("translations").is_sampled(step, 99) for step in range(99))
    batch = batch_of(rows_of("translations"))
    assert samples_of("translations", share=0.0)(network("translations"), batch, STEP, 0) is batch


# ---- the loss ----


def outputs_of_samples(logits: Tensor) -> Outputs:
    return Outputs(logits=logits, sampled=True)


def test_the_loss_of_a_sampled_batch_is_the_divergence_at_its_sampled_tokens():
    """Against values by hand: KL((0.9, 0.1) || (0.5, 0.5)) and KL((0.5, 0.5) || (0.8, 0.2))."""
    method = token_level(0.7, divergence_of("kd", 1.0))
    labels = torch.tensor([[IGNORED, 1, 0, IGNORED]])
    student = torch.tensor([[[9.0, 1.0], [0.5, 0.5], [0.8, 0.2], [3.0, 1.0]]]).log().requires_grad_()
    teacher = torch.tensor([[[0.2, 0.8], [0.9, 0.1], [0.5, 0.5], [0.3, 0.7]]]).log()
    parts = OnPolicyObjective(method)(outputs_of_samples(student), Outputs(logits=teacher), labels)
    first = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    second = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert list(parts) == ["sampled_tokens"]
    assert parts["sampled_tokens"].item() == pytest.approx((first + second) / 2)
    parts["sampled_tokens"].backward()
    assert student.grad is not None
    assert student.grad.abs().sum(-1).bool().tolist() == [[False, True, True, False]]


def test_a_batch_of_data_has_the_loss_of_a_method_without_samples():
    method, labels = token_level(0.7, divergence_of("kd", 1.0)), torch.tensor([[IGNORED, 1, 0]])
    student, teacher = (Outputs(logits=torch.randn(1, 3, 5)) for _ in range(2))
    assert OnPolicyObjective(method)(student, teacher, labels) == method.objective(student, teacher, labels)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_that_of_the_sampled_tokens(name):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 7).unbind()
    labels = torch.tensor([[IGNORED, 4, IGNORED], [1, 2, IGNORED]])
    divergence = divergence_of(name, 2.0)
    objective = OnPolicyObjective(token_level(1.0, divergence))
    (loss,) = objective(outputs_of_samples(student), Outputs(logits=teacher), labels).values()
    each = [divergence(student[row, place], teacher[row, place]) for row, place in ((0, 1), (1, 0), (1, 1))]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    assert (
        objective(outputs_of_samples(teacher), Outputs(logits=teacher), labels)["sampled_tokens"].abs() < 1e-6 < loss
    )


# ---- training ----


class Stopped(Exception):
    pass


class StopAfter(TrainerCallback):
    """Stops once the checkpoint of a step is complete."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stopped


def train(
    kind: str,
    folder: Path,
    share: float,
    rows: list[dict[str, Tensor]] | None = None,
    stop_after: int = 0,
    resume: bool = False,
    **settings: Any,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Six updates of two rows at `share`. Returns the weights of the student and the logs."""
    student, teacher = network(kind), network(kind, seed=1)
    training = arguments(folder, per_device_train_batch_size=2, logging_steps=6, **settings)
    samples = replace(samples_of(kind, share), process=training.process_index)
    trainer = KDTrainer(
        model=student, teacher=teacher, objective=OnPolicyObjective(token_level(0.5, divergence_of("kd", 1.0))),
        train_dataset=rows or rows_of(kind), args=training, replace_batch=samples if share else None,
    )  # fmt: skip
    trainer.add_callback(StopAfter(stop_after))
    torch.manual_seed(3)
    with suppress(Stopped):
        trainer.train(resume_from_checkpoint=resume)
    trainer.finish()
    return {name: weight.clone() for name, weight in student.state_dict().items()}, trainer.state.log_history


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_training_continues_to_the_same_weights(kind, tmp_path):
    """With gradient accumulation and dropout; the logs have the losses of both kinds of batches."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2,
                                "num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 1e-2}  # fmt: skip
    whole, logs = train(kind, tmp_path / "whole", 0.5, **settings)
    assert {"loss_task", "loss_tokens", "loss_sampled_tokens"} <= logs[0].keys()
    assert logs[0]["loss_sampled_tokens"] > 0
    train(kind, tmp_path / "run", 0.5, stop_after=3, **settings)
    resumed, _ = train(kind, tmp_path / "run", 0.5, resume=True, **settings)
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


@pytest.mark.parametrize("kind", KINDS)
def test_share_1_uses_no_label_and_share_0_changes_nothing(kind, tmp_path):
    plain, _ = train(kind, tmp_path, 0.0)
    tiny_share, _ = train(kind, tmp_path, 1e-9)
    assert all(torch.equal(weight, tiny_share[name]) for name, weight in plain.items())
    others = [dict(row) for row in rows_of(kind)]
    for row in others:  # of a block, all that follows the prompt
        row["labels"] = torch.where(torch.arange(len(row["labels"])) < 3 * (kind == KINDS[0]), row["labels"], 12)
        if kind == KINDS[0]:
            row["input_ids"] = torch.where(torch.arange(8) < 3, row["input_ids"], 12)
    (first, logs), (second, _) = train(kind, tmp_path, 1.0), train(kind, tmp_path, 1.0, others)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert "loss_task" not in logs[0] and "loss_sampled_tokens" in logs[0]
    assert any(not torch.equal(weight, plain[name]) for name, weight in first.items())


def test_micro_batches_weigh_by_their_sampled_tokens(tmp_path):
    """One update over two micro-batches of samples is that of all their tokens."""
    kind, weights = "translations", network("translations", dropout=0.0)
    samples, rows = samples_of(kind), rows_of(kind, 4)
    first = TrainerState(global_step=0, max_steps=1)
    student, teacher = weights, network(kind, seed=1).eval()
    batches = [samples(student.eval(), batch_of(rows[i : i + 2]), first, i // 2) for i in (0, 2)]
    total, number = torch.zeros(()), 0
    for batch in batches:
        keep = batch["labels"] != IGNORED
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "sampled")}
        logits = (model(**inputs).logits[keep] for model in (student, teacher))
        number += int(keep.sum())
        total = total + divergence_of("kd", 1.0)(*logits).mean() * keep.sum()
    (total / number).backward()
    expected = {name: p.detach() - 0.05 * p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert len({int((batch["labels"] != IGNORED).sum()) for batch in batches}) == 2, "of different numbers of tokens"
    trained = trained_without_dropout(tmp_path, rows, samples)
    for name, weight in expected.items():
        torch.testing.assert_close(trained[name], weight)


def trained_without_dropout(folder: Path, rows: list[dict[str, Tensor]], samples: StudentSamples) -> dict[str, Tensor]:
    student = network("translations", dropout=0.0)
    trainer = KDTrainer(
        model=student, teacher=network("translations", seed=1), train_dataset=rows, replace_batch=samples,
        objective=OnPolicyObjective(token_level(0.5, divergence_of("kd", 1.0))),
        args=arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0),
    )  # fmt: skip
    trainer.train()
    return dict(student.named_parameters())


def test_two_processes_train_the_same_student(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    found = in_processes(2, tmp_path, lambda: train("translations", tmp_path, 0.5, **settings)[0])
    start = network("translations").state_dict()
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
    assert any(not torch.equal(weight, start[name]) for name, weight in found[0].items())


# ---- flags ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "sequence_kd"}, "sequence_kd has no divergence"),
        ({"prompt_length": 8, "block_size": 8}, "--prompt_length must be below --block_size, which is 8"),
        ({"fsdp": True}, "--fsdp splits the weights"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    args = SimpleNamespace(**({"on_policy_share": 0.5, "method": "kd"} | flags))
    training: Any = SimpleNamespace(fsdp=flags.get("fsdp"))
    with pytest.raises(UserError, match=message):
        check_on_policy(args, training)
    args.on_policy_share = 0.0
    check_on_policy(args, training)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top_p", "0.9"], "--top_p has no effect, because --on_policy_share is 0"),
        (["--on_policy_share", "1", "--alpha", "0.3"], "--alpha has no effect, because --on_policy_share 1 uses no"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [LanguageArguments, TranslationArguments])
def test_flags_without_effect(kind, words, message):
    with pytest.raises(UserError, match=message):
        parse(kind, KDTrainingArguments, argv=[*words, "--output_dir", "unused"])


# ---- the scripts ----


TINY = "--teacher_width 32 --num_train_epochs 1 --precision fp32 --report_to none".split()


def test_a_translator_is_distilled_on_policy(tmp_path, capsys):
    tokens = "--student_width 32 --teacher_layers 1 --vocabulary_size 120 --max_length 12 --beams 2".split()
    words = ["--max_train_samples", 32, "--max_eval_samples", 8, "--teacher_epochs", 1, "--method", "kd"]
    tokens += "--on_policy_share 0.5 --max_new_tokens 6".split()
    recipe = recipe_of(*TINY, *tokens, "--per_device_train_batch_size", "4")
    run_script("NLP/scripts/distill_translation.py", recipe, *words, "--output_dir", tmp_path / "run")
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if "sampled tokens" in line]
    assert lines and all(line.startswith("student") and "task" in line for line in lines)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["method"] == "kd_on_policy_0.5"


def test_a_language_model_is_distilled_on_policy_with_hidden_states(tmp_path, capsys):
    words = "--teacher_layers 1 --block_size 12 --vocabulary_size 300 --prompt_length 4 --student scratch".split()
    words += "--hidden_weight 1 --on_policy_share 1 --teacher_epochs 1".split()
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        texts = {"text": load_intents()[split]["text"][:24]}
        datasets.Dataset.from_dict(texts).to_parquet(tmp_path / "data" / f"{split}.parquet")
    recipe = recipe_of(*TINY, *words, "--gradient_accumulation_steps", "2", "--student_width", "64")
    flags = ["--dataset", tmp_path / "data", "--output_dir", tmp_path / "run", "--no_control"]
    run_script("NLP/scripts/distill_gpt.py", recipe, *flags)
    printed = capsys.readouterr()
    (line,) = [line for line in (printed.out + printed.err).splitlines() if line.startswith("student, epoch 1: loss")]
    assert "sampled tokens" in line and "sampled hidden" in line and "task" not in line
