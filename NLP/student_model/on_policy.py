"""On-policy distillation of language models and translators (GKD, Agarwal et al., arXiv:2306.13649, algorithm 1).

In a share of the updates the student samples the sequences: continuations of prompts, or translations of the sources.
Student and teacher then compute their distributions over the next token in one forward pass each, and D is the
divergence of --method, the mean over the sampled tokens:

    share * D(samples) + (1 - share) * (alpha * cross-entropy + (1 - alpha) * D(data))

Samples have no labels, so D is their whole loss. The loss of the paper has no labels: it is that of alpha = 0. No
gradient passes through the sampling, and matched hidden states keep their weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from kd.common.methods import Method
from kd.common.objective import Objective
from kd.common.outputs import Outputs
from kd.common.training.arguments import LABELS, KDTrainingArguments
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED

Batch = dict[str, Any]

# The settings of a model that define its sequences. Others, such as beams or a repetition penalty, change the
# distribution of the samples.
KEPT_SETTINGS = (
    *("bos_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
)


def check_on_policy(args: Any, training: KDTrainingArguments) -> None:
    """Raises UserError for flags that do not allow --on_policy_share."""
    if not args.on_policy_share:
        return
    if training.fsdp:
        raise UserError(
            "--fsdp splits the weights of a student, which cannot sample then: leave out --on_policy_share"
        )
    if args.method == "sequence_kd":
        raise UserError("--method sequence_kd has no divergence for --on_policy_share: pass --method sequence_kd+kd")
    prompt, block = getattr(args, "prompt_length", None), getattr(args, "block_size", None)
    if prompt is not None and prompt >= block:
        raise UserError(f"--prompt_length must be below --block_size, which is {block}, got {prompt}")


class OnPolicyObjective(Objective):
    """The objective of `method`. In batches that the student sampled, the term of the labels is left out, the term
    `tokens` has weight 1, and the parts of the loss are called sampled_NAME.
    """

    def __init__(self, method: Method) -> None:
        super().__init__(**method.terms)
        terms = {name: term for name, term in method.terms.items() if name != LABELS}
        terms["tokens"] = 1.0, terms["tokens"][1]
        self._of_samples = (Objective(**terms),)  # in a tuple, as the modules of its terms are registered above

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> dict[str, Tensor]:
        if not student.sampled:
            return super().forward(student, teacher, labels)
        (of_samples,) = self._of_samples
        of_samples.set_progress(self.progress)
        return {f"sampled_{name}": part for name, part in of_samples(student, teacher, labels).items()}


@dataclass(frozen=True)
class StudentSamples:
    """Replaces batches of data by the student's samples: `KDTrainer(replace_batch=...)`.

    Which updates are on samples depends on the seed and the number of the update. The samples depend also on the
    micro-batch, the process and the weights. The global generator is unchanged. So a run that is continued draws the
    same samples, and the other updates have the dropout of a run without samples.

    args: Those of the script, with the fields of OnPolicyArguments.
    """

    args: Any
    tokenizer: PreTrainedTokenizerBase
    seed: int
    process: int = 0

    def __call__(self, student: PreTrainedModel, batch: Batch, state: TrainerState, number: int) -> Batch:
        if not self.is_sampled(state.global_step, state.max_steps):
            return batch
        sample = self.translations if student.config.is_encoder_decoder else self.continuations
        seed = np.random.SeedSequence((self.seed, state.global_step, number, self.process))
        with self.sampling(student, int(seed.generate_state(1, np.uint64)[0])):
            return sample(student, {n: v.to(student.device) for n, v in batch.items() if isinstance(v, Tensor)})

    def is_sampled(self, step: int, steps: int) -> bool:
        """Whether the update after `step` of `steps` updates is on samples."""
        is_early = step < self.args.on_policy_start * steps
        return not is_early and np.random.default_rng((self.seed, step)).random() < self.args.on_policy_share

    def translations(self, student: PreTrainedModel, batch: Batch) -> Batch:
        """A batch with sampled targets of its sources (batch, positions)."""
        source = {name: batch[name] for name in ("input_ids", "attention_mask")}
        limit = self.args.max_new_tokens or self.args.max_length
        ids = student.generate(**source, max_new_tokens=limit)  # type: ignore[operator]
        labels = ids[:, 1:].where(until_end(ids[:, 1:], student), IGNORED)
        return source | {"decoder_input_ids": ids[:, :-1], "labels": labels, "sampled": True}

    def continuations(self, student: PreTrainedModel, batch: Batch) -> Batch:
        """A batch with the prompts of another one and sampled continuations, padded at the end. Labels are tokens of
        the next position, as in `pack`.
        """
        prompts, end = self.prompts(batch), self.tokenizer.eos_token_id
        samples = self.samples_after(student, prompts)
        whole = [torch.cat(pair) for pair in zip(prompts, samples, strict=True)]
        labels = [torch.cat([torch.full_like(p[1:], IGNORED), s]) for p, s in zip(prompts, samples, strict=True)]
        return {
            "input_ids": _pad([row[:-1] for row in whole], end),
            "attention_mask": _pad([torch.ones_like(row[:-1]) for row in whole], 0),
            "labels": _pad(labels, IGNORED),
            "sampled": True,
        }

    def samples_after(self, student: PreTrainedModel, prompts: list[Tensor]) -> list[Tensor]:
        """A sampled continuation of each prompt.

        The longest prompt of a call of `generate` limits the samples of all of its rows. Therefore rows whose limits
        differ much are sampled in several calls: a sample may have at least half of the tokens of its limit.
        """
        rooms = [self.args.block_size + 1 - len(prompt) for prompt in prompts]  # the last token is a label only
        limits = [min(self.args.max_new_tokens or room, room) for room in rooms]
        samples: dict[int, Tensor] = {}
        for rows in groups_of_similar(limits):
            ids = _pad([prompts[row] for row in rows], self.tokenizer.eos_token_id, "left")
            mask = _pad([torch.ones_like(prompts[row]) for row in rows], 0, "left")
            most = min(limits[row] for row in rows)
            sampled = student.generate(ids, attention_mask=mask, max_new_tokens=most)[:, ids.shape[1] :]  # type: ignore[operator]
            kept = zip(sampled, until_end(sampled, student), strict=True)
            samples |= dict(zip(rows, (tokens[keep] for tokens, keep in kept), strict=True))
        return [samples[row] for row in range(len(prompts))]

    def prompts(self, batch: Batch) -> list[Tensor]:
        """The prompts of rows or, of a plain text, the first tokens of each block."""
        if {"position_ids", "attention_mask"} & batch.keys():
            return prompts_of_rows(batch)
        length = self.args.prompt_length or self.args.block_size // 2
        sizes = (batch["labels"] != IGNORED).sum(1).clamp(max=length).tolist()  # the last block may be short
        return [row[:size] for row, size in zip(batch["input_ids"], sizes, strict=True)]

    def settings(self, student: PreTrainedModel) -> GenerationConfig:
        """The settings of sampling: those that define the student's sequences, and none that changes its distribution
        except the temperature and top-p.
        """
        config, end = student.generation_config, self.tokenizer.eos_token_id
        others = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = sorted({end, *(other for other in others if other is not None)})
        return GenerationConfig(
            **{name: getattr(config, name, None) for name in KEPT_SETTINGS},
            eos_token_id=ends,
            pad_token_id=end if config.pad_token_id is None else config.pad_token_id,
            do_sample=True,
            temperature=self.args.sampling_temperature,
            top_p=self.args.top_p,
            top_k=0,
            use_cache=True,
        )

    @contextmanager
    def sampling(self, student: PreTrainedModel, seed: int) -> Iterator[None]:
        """Sets eval mode, the settings of sampling and the seed, and restores what was set before."""
        config, was_training = student.generation_config, student.training
        devices = [student.device] if student.device.type == "cuda" else []
        student.generation_config = self.settings(student)
        student.eval()
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                yield
        finally:
            student.generation_config = config
            student.train(was_training)


def prompts_of_rows(batch: Batch) -> list[Tensor]:
    """The tokens before the last completion of each row. Only completions have labels. Rows are padded, or packed into
    blocks in which `position_ids` restart at each row.
    """
    prompts = []
    for number, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        positions = batch["position_ids"][number] if "position_ids" in batch else torch.arange(len(ids))
        starts = (positions == 0).nonzero().flatten().tolist()
        for start, stop in pairwise([*starts, len(ids)]):
            has_label = labels[start:stop] != IGNORED
            is_first = has_label & ~F.pad(has_label[:-1], (1, 0))
            if is_first.any():  # otherwise padding
                prompts.append(ids[start : start + int(is_first.nonzero()[-1]) + 1])
    return prompts


def groups_of_similar(limits: list[int]) -> list[list[int]]:
    """The positions of `limits` in groups, in each of which the smallest limit is at least half of the largest."""
    groups: list[list[int]] = []
    for number in sorted(range(len(limits)), key=limits.__getitem__, reverse=True):
        if groups and 2 * limits[number] >= limits[groups[-1][0]]:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def until_end(tokens: Tensor, student: PreTrainedModel) -> Tensor:
    """Mask (batch, positions) of the tokens up to the first one that ends the sequence, which is included."""
    assert student.generation_config is not None
    is_end = torch.isin(tokens, torch.tensor(student.generation_config.eos_token_id, device=tokens.device))
    return is_end.cumsum(1) - is_end.int() == 0


def _pad(rows: list[Tensor], value: int, side: str = "right") -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
