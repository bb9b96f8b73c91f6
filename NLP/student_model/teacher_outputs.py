"""The outputs of a frozen text teacher for the training texts: cached, or live where there are too many."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from kd.common.methods import Method
from kd.common.training.batching import column_array
from kd.common.training.run import TrainerRun
from kd.common.training.teacher_outputs import JoinedOutputs, TeacherOutputs, cache_teacher_outputs
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.methods import width

FEATURE_BYTES = 4 * 2**30  # above this the teacher runs in every step instead of its hidden states being cached


def teacher_kwargs(
    run: TrainerRun,
    teacher: PreTrainedModel,
    texts: Texts,
    method: Method,
    *,
    logits: bool = True,
    ensemble: Sequence[tuple[PreTrainedModel, Texts]] = (),
) -> dict[str, Any]:
    """The arguments of KDTrainer for a frozen teacher: its cached outputs or, where the features that `method` reads
    exceed FEATURE_BYTES, the live model. Both record features by hooks on the same submodules.

    Args:
        logits: whether the method reads logits.
        ensemble: further teachers, with the texts in their tokens, whose logits are averaged with the teacher's: the
            geometric mean of their distributions (arXiv:1503.02531).

    Raises UserError where an ensemble would have to run live.
    """
    paths = method.teacher_features
    if column_array(texts.train, "length").sum() * len(paths) * width(teacher) * 2 > FEATURE_BYTES:
        if ensemble:
            raise UserError("the hidden states are too many to cache, which several teachers need: name one")
        return {"teacher": teacher, "teacher_features": paths}
    first = cached_outputs(run, teacher, texts, paths, logits)
    others = [cached_outputs(run, model, tokens) for model, tokens in ensemble]
    return {"teacher_outputs": JoinedOutputs([first, *others]) if others else first}


def cached_outputs(
    run: TrainerRun,
    teacher: PreTrainedModel,
    texts: Texts,
    features: dict[str, str] | None = None,
    logits: bool = True,
) -> TeacherOutputs:
    """What a teacher computes for the training texts: its logits, and outputs of submodules by name, {name: path}."""
    folder = (run.shared or run.folder) / "teacher_outputs"
    with run.timed("teacher_outputs"):
        return cache_teacher_outputs(
            teacher,
            texts.train,
            texts.collate,
            folder,
            features=features,
            logits=logits,
            precision=run.args.precision,
        )
