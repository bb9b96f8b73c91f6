"""The outputs of the frozen teacher of a text classifier: cached, or computed in every step."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from kd.common.methods import Method
from kd.common.training.inference import column_array
from kd.common.training.teacher_outputs import JoinedOutputs, TeacherOutputs, cache_teacher_outputs
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.alignment import AlignedOutputs, LiveOutputs
from kd.nlp.student_model.methods import width
from kd.nlp.student_model.pooling import Pooling

FEATURE_BYTES = 4 * 2**30  # hidden states above this size are not cached; the teacher then runs in every step


def teacher_kwargs(
    run: TrainerRun,
    teacher: PreTrainedModel,
    texts: Texts,
    method: Method,
    *,
    logits: bool = True,
    ensemble: Sequence[tuple[PreTrainedModel, Texts]] = (),
    ensemble_weights: Sequence[float] | None = None,
    student_texts: Texts | None = None,
    pooling: tuple[Pooling, Pooling] = ("tokens", "tokens"),
) -> dict[str, Any]:
    """The arguments of KDTrainer for a frozen teacher: its cached outputs, or the model itself if the features of
    `method` exceed FEATURE_BYTES. Both record features with hooks on the same submodules.

    Args:
        logits: Whether the method needs logits.
        ensemble: Further teachers, each with the texts tokenized for it. Their logits are averaged with the teacher's,
            which is the geometric mean of the distributions (arXiv:1503.02531).
        ensemble_weights: One weight for the teacher and for each of the ensemble (default: equal).
        student_texts: The texts in the student's tokens, if these may differ: features, and the logits of words, are
            then moved to them (`AlignedOutputs`).
        pooling: What the heads of student and teacher read.

    Raises UserError if an ensemble would have to run in every step.
    """
    paths, student_texts = method.teacher_features, student_texts or texts
    is_large = column_array(texts.train, "length").sum() * len(paths) * width(teacher) * 2 > FEATURE_BYTES
    moves_features = bool(paths) and (student_texts is not texts or pooling[0] != pooling[1])
    if is_large and ensemble:
        raise UserError("an ensemble needs cached hidden states, and these are too large to cache: use one teacher")
    if is_large and not moves_features:
        return {"teacher": teacher, "teacher_features": paths}

    def aligned(outputs: TeacherOutputs, tokens: Texts, features: bool = False) -> TeacherOutputs:
        moves_words = texts.data.task == "token_classification" and tokens is not student_texts
        if not (features or moves_words):
            return outputs
        return AlignedOutputs(outputs, student_texts, tokens, pooling if features else None)

    first = LiveOutputs(teacher, texts, paths) if is_large else cached_outputs(run, teacher, texts, paths, logits)
    found = [aligned(first, texts, moves_features)]
    found += [aligned(cached_outputs(run, model, tokens), tokens) for model, tokens in ensemble]
    return {"teacher_outputs": JoinedOutputs(found, ensemble_weights) if ensemble else found[0]}


def cached_outputs(
    run: TrainerRun,
    teacher: PreTrainedModel,
    texts: Texts,
    features: dict[str, str] | None = None,
    logits: bool = True,
) -> TeacherOutputs:
    """The teacher's outputs for the training texts: logits, and outputs of submodules by name, {name: path}."""
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
