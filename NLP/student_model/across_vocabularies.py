"""Distillation of a causal language model into a student with another vocabulary.

Each model trains and is evaluated on blocks of its tokens. While the student trains, the teacher reads its tokens of
the text of each block. Where a token of both ends at the same byte, both predict what follows the same text, and their
distributions are compared. Models are compared in bits per byte, which do not depend on the vocabulary.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kd.common import losses
from kd.common.data.sources import print_notes
from kd.common.methods import Method, parse_method
from kd.common.metrics.verdict import Measurement, measure_bits_per_byte
from kd.common.objective import Divergence, Term
from kd.common.outputs import Outputs
from kd.common.pretrained import load_tokenizer, stage_loader
from kd.common.token_terms import label_term, sum_over_rows
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.devices import autocast
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Positive
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.corpora import Corpus
from kd.nlp.data.vocabularies import (
    UNALIGNED,
    TeacherBlocks,
    TokenGroups,
    read_stream,
    teacher_blocks,
    token_bytes,
    token_groups,
)
from kd.nlp.student_model.arguments import VOCABULARY_METHODS
from kd.nlp.student_model.generation import label_tokens
from kd.nlp.student_model.language_model import LanguageEvaluation, LanguageTask, Sample
from kd.nlp.teacher_model.generative import Generator, byte_level_bpe

# ---- methods: values (positions,) at aligned positions ----


def uld(student: Tensor, teacher: Tensor, *, temperature: Positive = 2.0) -> Tensor:
    """Distance of the sorted probabilities, whatever the tokens (arXiv:2402.12030)."""
    return losses.sorted_probabilities(student, teacher, temperature, "none")


def shared_tokens(student: Tensor, teacher: Tensor, groups: TokenGroups, *, temperature: Positive = 2.0) -> Tensor:
    """KL(teacher || student) over the tokens that both vocabularies contain, as `token_groups` groups them."""
    of_student, of_teacher = groups.student.to(student.device), groups.teacher.to(student.device)
    return losses.grouped_kl(student, teacher, of_student, of_teacher, groups.number, temperature, "none")


METHODS: dict[str, Callable[..., Tensor]] = dict(zip(VOCABULARY_METHODS, (uld, shared_tokens), strict=True))


def aligned_term(divergence: Divergence, blocks: TeacherBlocks) -> Term:
    """A divergence at the positions of the teacher's mask, in chunks of positions. The teacher's logits are those of
    these positions alone.

    The sum over positions is divided by their expected number, the aligned share of the labels. So each position has
    the same weight, whatever the batch, and gradient accumulation changes nothing.
    """

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.logits is not None and labels is not None
        assert teacher is not None and teacher.logits is not None and teacher.mask is not None
        aligned = teacher.mask.flatten()
        targets, places = teacher.logits, aligned.cumsum(dim=0) - 1

        def total(logits: Tensor, rows: Tensor) -> Tensor:
            return divergence(logits, targets[places[rows]]).sum()

        sums = sum_over_rows(total, student.logits.flatten(0, 1), aligned.nonzero().flatten())
        return sums / (blocks.aligned * (labels != IGNORED).sum().clamp(min=1))

    return term


# ---- the run ----


@dataclass(frozen=True)
class AcrossVocabularies(LanguageTask):
    """The distillation of a language model into a student whose `tokenizer` may differ from the teacher's.

    teacher_task: The teacher's training and evaluation, in its tokens.
    blocks: The teacher's tokens of the training blocks.
    groups: The tokens of both vocabularies; None for methods that do not compare tokens.
    """

    teacher_task: LanguageTask
    blocks: TeacherBlocks
    groups: TokenGroups | None

    @classmethod
    def of(
        cls, run: TrainerRun, args: Any, data: Corpus, teacher: Generator | None, student: Generator | None
    ) -> Self:
        """Tokenizes the data with both tokenizers. The student has the tokenizer of a named student, one that is
        learned for --student_vocabulary_size, or the teacher's.
        """
        of_teacher = LanguageTask.of(run, args, data, teacher, None)
        if student is not None:
            tokenizer = student.tokenizer
        elif args.student_vocabulary_size is not None:
            read = stage_loader(AutoTokenizer, load_tokenizer)
            tokenizer = run.stage("student_tokenizer", partial(cls.learn_student_tokenizer, args, data), read)
        else:
            tokenizer = of_teacher.tokenizer
        blocks = blocks_of(data, tokenizer, of_teacher.tokenizer, args.block_size, context_length(args, teacher))
        groups = None
        if args.method.split(":")[0] == shared_tokens.__name__:
            sizes = logits_of(student, tokenizer), logits_of(teacher, of_teacher.tokenizer)
            groups = token_groups(tokenizer, of_teacher.tokenizer, sizes)
        splits = cls.tokenize(args, data, tokenizer)
        splits["train"] = splits["train"].add_column("sample_id", np.arange(len(splits["train"])))
        of_student = student and student.model
        return cls(args, data, tokenizer, splits, teacher and teacher.model, of_student, of_teacher, blocks, groups)

    @staticmethod
    def learn_student_tokenizer(args: Any, data: Corpus) -> PreTrainedTokenizerBase:
        return byte_level_bpe(data.splits["train"], args.student_vocabulary_size, args.block_size)

    # ---- models and training ----

    @property
    def vocabulary(self) -> int:
        return len(self.tokenizer)

    def train_teacher(self, run: TrainerRun) -> PreTrainedModel:
        return self.teacher_task.train_teacher(run)

    def method(self, training: KDTrainingArguments, model: PreTrainedModel, teacher: PreTrainedModel | None) -> Method:
        if teacher is None:
            return super().method(training, model, teacher)
        divergence = parse_method(self.args.method, METHODS, temperature=training.temperature)
        if self.groups is not None:
            divergence = partial(divergence, groups=self.groups)
        task = label_term(training.label_smoothing_factor, self.token_weights)
        tokens = aligned_term(divergence, self.blocks)
        return Method({"task": (training.alpha, task), "tokens": (1 - training.alpha, tokens)})

    def teacher_arguments(self, run: TrainerRun, teacher: PreTrainedModel) -> dict[str, Any]:
        return {"teacher_outputs": AlignedTeacher(teacher, self.blocks, run.args.precision)}

    # ---- evaluation and report ----

    def evaluate(
        self, run: TrainerRun, role: str, model: PreTrainedModel, teacher: LanguageEvaluation | None = None
    ) -> LanguageEvaluation:
        """Evaluates a model on its tokens of every split but train. There is no agreement of different tokens."""
        if role == "teacher":
            return self.teacher_task.evaluate(run, role, model)
        return super().evaluate(run, role, model)

    def measure(self, counts: np.ndarray, choices: np.ndarray) -> Measurement:
        return measure_bits_per_byte(counts, self.data.size("validation"), choices)

    def measurements(self, evaluations: dict[str, LanguageEvaluation]) -> dict[str, Measurement]:
        """Those of control and student: the blocks of the teacher are others."""
        return {role: found.measurement for role, found in evaluations.items() if role != "teacher"}

    def continued(self, role: str, model: PreTrainedModel, sample: Sample) -> str:
        if role != "teacher":
            return super().continued(role, model, sample)
        fits = self.args.block_size - sample.new  # the teacher may need more tokens than the student
        ids = self.teacher_task.tokenizer(sample.prompt)["input_ids"][-fits:]
        return self.teacher_task.continued(role, model, sample._replace(ids=ids))

    def headline(self, vocabulary: int) -> dict[str, Any]:
        """The primary metric, bits per byte, and the sizes of the vocabularies."""
        found, number = super().headline(vocabulary), len(label_tokens(self.splits["validation"]))
        chance = math.log2(found["chance"]) * number / self.data.size("validation")
        sizes = {"student": len(self.tokenizer), "teacher": len(self.teacher_task.tokenizer)}
        shared = {} if self.groups is None else {"shared": self.groups.shared}
        vocabularies = sizes | shared | {"aligned share": self.blocks.aligned}
        return found | {"metric": "bits_per_byte", "chance": chance, "vocabularies": vocabularies}


class AlignedTeacher(TeacherOutputs):
    """The logits of a teacher that reads its tokens of the student's blocks in every step.

    Args:
        blocks: The teacher's tokens of the blocks, by sample id.
        precision: Of the teacher's forward pass.
    """

    def __init__(self, teacher: PreTrainedModel, blocks: TeacherBlocks, precision: str) -> None:
        self.teacher, self.blocks, self.precision = teacher.eval().requires_grad_(False), blocks, precision

    @torch.no_grad()
    def batch(self, sample_ids: Tensor, positions: int | None = None, device: torch.device | None = None) -> Outputs:
        """Logits (aligned, vocabulary) at the aligned positions of all samples, and the mask (batch, positions) of
        these positions.
        """
        rows, device = sample_ids.cpu(), device or torch.device("cpu")
        parts = [self.blocks.tokens[self.blocks.starts[row] : self.blocks.stops[row]] for row in rows.tolist()]
        ids = pad_sequence(parts, batch_first=True).to(device)  # on the right, where a causal model does not read it
        with autocast(device, self.precision):
            logits = self.teacher.to(device)(input_ids=ids).logits
        places = self.blocks.positions[rows].to(device)
        mask = places != UNALIGNED
        return Outputs(logits=logits[mask.nonzero()[:, 0], places[mask]], mask=mask)


# ---- the data in both tokenizations ----


def logits_of(model: Generator | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of logits of a named model, or of one with random weights."""
    return len(tokenizer) if model is None else int(model.model.config.vocab_size)


def context_length(args: Any, teacher: Generator | None) -> int:
    """Maximum number of tokens that the teacher reads."""
    return (
        args.block_size if teacher is None else getattr(teacher.model.config, "max_position_embeddings", sys.maxsize)
    )


def blocks_of(
    data: Corpus, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, block_size: int, most: int
) -> TeacherBlocks:
    """The teacher's tokens of the training blocks. Adds notes on positions that are not aligned.

    Raises UserError if none is aligned.
    """
    streams = [
        read_stream(data.splits["train"], tokenizer, token_bytes(tokenizer)) for tokenizer in (student, teacher)
    ]
    blocks = teacher_blocks(streams[0], streams[1], block_size, most)
    if not blocks.aligned:
        raise UserError("no token of the student ends where one of the teacher ends: pass a student of another kind")
    notes = [f"{blocks.aligned:.1%} of the student's tokens of train end where a token of the teacher ends"]
    for name, stream in zip(("student", "teacher"), streams, strict=True):
        if (changed := 1 - stream.exact.mean()) > 0:
            notes.append(f"the tokenizer of the {name} changes texts with {changed:.1%} of its tokens: not aligned")
    if blocks.cut:
        notes.append(
            f"{blocks.cut:.1%} of the student's tokens of train are not aligned, because the teacher reads at most "
            f"{most} tokens of a block: a smaller --block_size aligns them"
        )
    data.notes.extend(notes)
    print_notes(data.name, notes)
    return blocks
