"""Distillation of a causal language model on prompts: only completions count in losses and metrics."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Self

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.common.data.sources import print_notes
from kd.common.metrics.quality import language_metrics
from kd.common.metrics.verdict import Measurement, is_constant, measure_mean, measure_perplexity
from kd.common.training.inference import column_array
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.prompt_rows import RowCollator, keeps_documents_apart, pack_rows, prompt_ids, token_rows
from kd.nlp.data.prompts import ASSISTANT, MESSAGES, PromptData
from kd.nlp.student_model.generation import Splits
from kd.nlp.student_model.language_model import CONTINUATION, LanguageTask, Sample
from kd.nlp.teacher_model.generative import Generator, byte_level_bpe

EXACT = "exact_match"
SHORT = 32  # tokens of a completion up to which exact match is the primary metric
CHAT_USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "student"  # the path of this model, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
chat = {chat}
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(**inputs, max_new_tokens={new}, do_sample=False)
print(tokenizer.decode(ids[0]))"""


class PromptTask(LanguageTask):
    """The distillation of a language model on prompts and completions. `data` is PromptData; `splits` contain the rows
    of `NLP/data/prompt_rows.py`. Training packs them into blocks if all models keep the rows of a block apart.
    """

    data: PromptData

    @classmethod
    def of(
        cls, run: TrainerRun, args: Any, data: PromptData, teacher: Generator | None, student: Generator | None
    ) -> Self:
        task = super().of(run, args, data, teacher, student)
        task.note(
            f"{len(task.splits['train']):,} rows of train are packed into {len(task.blocks):,} blocks, without "
            "attention between rows"
            if task.packs
            else "rows of train are padded instead of packed into blocks, because a model cannot keep them apart"
        )
        if task.is_short:
            task.note(f"completions have at most {SHORT} tokens, so {EXACT} of greedy answers is the primary metric")
        return task

    def note(self, text: str) -> None:
        self.data.notes.append(text)
        print_notes(self.data.name, [text])

    @staticmethod
    def learn_tokenizer(args: Any, data: Any) -> PreTrainedTokenizerBase:
        rows = data.splits["train"]
        texts = (f"{row['prompt']}{row['completion']}" for row in rows)  # chats need a named teacher
        return byte_level_bpe(texts, args.vocabulary_size, args.block_size)

    @staticmethod
    def tokenize(args: Any, data: Any, tokenizer: PreTrainedTokenizerBase) -> Splits:
        notes: list[str] = []
        splits = {split: token_rows(data, split, tokenizer, args.block_size, notes) for split in data.splits}
        data.notes.extend(notes)
        print_notes(data.name, notes)
        return splits

    # ---- training ----

    @cached_property
    def packs(self) -> bool:
        named = (model for model in (self.pretrained_teacher, self.pretrained_student) if model is not None)
        return all(map(keeps_documents_apart, named))  # GPT-2, the model with random weights, does

    @cached_property
    def blocks(self) -> Dataset:
        """The rows of train in blocks."""
        return pack_rows(self.splits["train"], self.args.block_size)

    def training_rows(self, run: TrainerRun, rows: Dataset) -> Dataset:
        return self.blocks if self.packs else rows

    @property
    def common_arguments(self) -> dict[str, Any]:
        return {"train_sampling_strategy": "random" if self.packs else "group_by_length"}

    def collator(self, model: PreTrainedModel) -> Callable[[Any], dict[str, Any]]:
        return RowCollator(self.tokenizer.eos_token_id)

    # ---- evaluation and report ----

    def size(self, split: str) -> int:
        """Size of a split's completions in UTF-8 bytes."""
        labels = ([label for label in row if label != IGNORED] for row in self.splits[split]["labels"][:])
        return sum(len(text.encode()) for text in self.tokenizer.batch_decode(list(labels), skip_special_tokens=True))

    @cached_property
    def is_short(self) -> bool:
        """Whether all completions that are evaluated are short."""
        rows = [rows for split, rows in self.splits.items() if split != "train"]
        lengths = [column_array(part, "length") - column_array(part, "prompt_length") + 1 for part in rows]
        return bool(np.concatenate(lengths).max() <= SHORT)

    def token_metrics(self, counts: np.ndarray) -> dict[str, float]:
        return self.split_metrics("validation", counts)

    def split_metrics(self, split: str, counts: np.ndarray) -> dict[str, float]:
        """The metrics of a language model, and the share of rows whose greedy answers are equal to their completions.

        A greedy answer is equal exactly if each token of the completion is the most probable one after the tokens
        before it, so that nothing has to be generated.
        """
        return {EXACT: float(exact_rows(counts).mean()), **language_metrics(counts, self.size(split))}

    def measure(self, counts: np.ndarray, choices: np.ndarray) -> Measurement:
        if not self.is_short:
            return measure_perplexity(counts, choices)
        return measure_mean(exact_rows(counts), is_constant(choices))

    def headline(self, vocabulary: int) -> dict[str, Any]:
        if not self.is_short:
            return super().headline(vocabulary)
        chance = constant_match(self.splits)
        return {"metric": EXACT, "floor": chance, "chance": chance}

    def sample(self) -> Sample:
        """The first prompt of the test split or, if there is none, of the validation split."""
        row = self.splits.get("test", self.splits["validation"])[0]
        new = max(1, min(CONTINUATION, self.args.block_size - row["prompt_length"]))
        ids = prompt_ids(row)
        return Sample(str(self.tokenizer.decode(ids)), ids, new)

    def usage(self, sample: Sample) -> str:
        if not self.data.has_chats:
            return super().usage(sample)
        messages = self.data.splits["validation"][0][MESSAGES]
        roles = [message["role"] for message in messages]
        chat = json.dumps(messages[: roles.index(ASSISTANT)], ensure_ascii=False)
        return CHAT_USAGE.format(chat=chat, new=sample.new)


def exact_rows(counts: np.ndarray) -> np.ndarray:
    """1 for each row of `token_counts` (rows, 3) whose tokens are all correct, else 0."""
    return (counts[:, 1] == counts[:, 2]).astype(np.float64)


def constant_match(splits: Mapping[str, Dataset]) -> float:
    """The share of validation rows whose completion is the most frequent one of train."""
    train, validation = (
        [tuple(label for label in row if label != IGNORED) for row in splits[split]["labels"][:]]
        for split in ("train", "validation")
    )
    ((frequent, _),) = Counter(train).most_common(1)
    return validation.count(frequent) / len(validation)
