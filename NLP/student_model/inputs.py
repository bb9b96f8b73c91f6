"""Data and pretrained models for distilling a text classifier, and checks of the arguments against them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import set_seed

from kd.common.bottleneck.module import meta_bottleneck
from kd.common.cli import reject_unused
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData, Texts
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments, TextArguments, TextBottleneckArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.layers import kept_layers, layer_paths
from kd.nlp.student_model.methods import (
    PLAIN,
    check_method,
    check_needs_no_labels,
    check_smoothing,
    check_submodules,
    layer_pairs,
    needs_features,
)
from kd.nlp.student_model.pooling import Pooling, head_pooling
from kd.nlp.teacher_model.teacher import Pretrained, in_label_order, load_classifier, load_trained, number_of_layers
from kd.nlp.teacher_model.untrained import load_student

OTHER_TOKENS = "teacher and student read texts in different tokens: features are matched through characters"


@dataclass(frozen=True)
class Inputs:
    """Data and pretrained models. Training copies the models and leaves these unchanged.

    data: has the class ids of the teacher if that is a classifier of these labels.
    teacher: fine-tuned by the run unless `teacher.trained`.
    student: the model of --student; None if the student is cut from the teacher.
    control_init: the encoder that the control is cut from if the teacher is already trained.
    ensemble: further teachers, whose logits are averaged with the teacher's.
    texts, student_texts: the data, tokenized with the tokenizer of the teacher and of the student.
    student_layers: number of layers of a student that is cut from the teacher.
    """

    data: TextData
    teacher: Pretrained
    student: Pretrained | None
    control_init: Pretrained | None
    ensemble: list[Pretrained]
    texts: Texts
    student_texts: Texts
    student_layers: int

    @property
    def models(self) -> dict[str, Pretrained | None]:
        """All pretrained models by role."""
        others: dict[str, Pretrained | None] = {f"ensemble_teacher_{i}": t for i, t in enumerate(self.ensemble, 1)}
        return {"teacher": self.teacher, "student": self.student, "control_init": self.control_init} | others

    @property
    def notes(self) -> list[str]:
        models = [self.teacher, *self.ensemble, self.student, self.control_init]
        notes = list(dict.fromkeys(note for model in models if model for note in model.notes))
        return notes if self.same_tokens else [*notes, OTHER_TOKENS]

    @cached_property
    def same_tokens(self) -> bool:
        """Whether teacher and student read the training texts in the same tokens."""
        student = self.student
        if not student or student.tokenizer is self.teacher.tokenizer:
            return True
        both = (self.texts.train, self.student_texts.train)
        ids, student_ids = (rows.select_columns("input_ids").with_format("arrow")[:] for rows in both)
        return ids.equals(student_ids) and student.tokenizer.get_vocab() == self.teacher.tokenizer.get_vocab()

    @property
    def matched_texts(self) -> Texts:
        """The texts in the tokens of the student; the columns of the teacher if the tokens are the same."""
        return self.texts if self.same_tokens else self.student_texts

    @property
    def pooling(self) -> tuple[Pooling, Pooling]:
        """The hidden states that the heads of student and teacher read. A student's mean over other tokens than the
        teacher's has no counterpart: `tokens`.
        """
        models = (self.student or self.teacher).model, self.teacher.model
        student, teacher = (head_pooling(model, self.data.task) for model in models)
        return "tokens" if student == "mean" and not self.same_tokens else student, teacher


def load_inputs(
    text: TextArguments,
    pair: PairArguments,
    training: KDTrainingArguments,
    data: TextData,
    ensemble: Sequence[str] = (),
) -> Inputs:
    """Loads all models and tokenizes the data."""
    data = in_label_order(pair.teacher, data)
    others = [load_trained(name, data) for name in ensemble]
    teacher, student, control_init = load_pretrained(text, pair, training, data, training.seed)
    texts = Texts.of(data, teacher.tokenizer)
    student_texts = Texts.of(data, student.tokenizer) if student else texts
    layers = pair.student_layers or max(1, number_of_layers(teacher) // 2)
    inputs = Inputs(data, teacher, student, control_init, others, texts, student_texts, layers)
    if not inputs.same_tokens:
        print(f"note: {OTHER_TOKENS}")
    return inputs


def load_encoder_inputs(name: str, text: TextArguments, training: KDTrainingArguments, data: TextData) -> Inputs:
    """The encoder NAME and the tokenized data, for training a classifier on labels alone.

    Raises UserError if the model is trained on these labels already, or if no row of train has a label.
    """
    set_seed(training.seed)
    teacher = load_classifier(name, data)
    if teacher.trained:
        raise UserError(f"{name} is a classifier of these labels already: pass an encoder, or use evaluate.py")
    teacher.set_max_length(text.max_length)
    texts = Texts.of(data, teacher.tokenizer)
    if not len(texts.labelled_train):
        raise UserError("no row of train has a label: add labels")
    check_smoothing(training, data.name, data.num_labels)
    return Inputs(data, teacher, None, None, [], texts, texts, student_layers=len(layer_paths(teacher.encoder)))


def load_pretrained(
    text: TextArguments, pair: PairArguments, training: KDTrainingArguments, data: TextData, seed: int
) -> tuple[Pretrained, Pretrained | None, Pretrained | None]:
    """Loads teacher, student and the control's initial model. The seed sets random weights."""
    set_seed(seed)
    teacher = load_classifier(pair.teacher, data)
    student = load_student(pair.student, data, teacher) if pair.student else None
    has_control_init = pair.control_init and not (pair.student or training.no_control)
    control_init = load_classifier(str(pair.control_init), data) if has_control_init else None
    for model in filter(None, (teacher, student, control_init)):
        model.set_max_length(text.max_length)
    return teacher, student, control_init


def inputs_of_seed(
    inputs: Inputs, text: TextArguments, pair: PairArguments, training: KDTrainingArguments, seed: int
) -> Inputs:
    """The same inputs, with random weights of another seed."""
    if seed == training.seed:
        return inputs
    teacher, student, control_init = load_pretrained(text, pair, training, inputs.data, seed)
    return replace(inputs, teacher=teacher, student=student, control_init=control_init)


def validate_arguments(inputs: Inputs, pair: PairArguments, training: KDTrainingArguments) -> None:
    """Raises UserError for arguments of any method that do not fit the models. Called before anything is written."""
    teacher, student, control_init = inputs.teacher, inputs.student, inputs.control_init
    layers = number_of_layers(teacher)
    check_smoothing(training, inputs.data.name, inputs.data.num_labels)
    from_scratch = any(model.from_scratch for model in (teacher, student, control_init) if model)
    labelled = len(inputs.student_texts.labelled_train)
    if not labelled and not teacher.trained:
        raise UserError(
            f"no row of train has a label, and {pair.teacher} has to be trained on labels: pass a classifier of these "
            "labels as --teacher, or add labels"
        )
    if not labelled and not training.no_control:
        raise UserError("no row of train has a label, so there is nothing to train a control on: pass --no_control")
    pair.reject_unused_flags(teacher.trained, teacher.from_scratch, from_scratch)
    if student is None:
        if not 1 <= inputs.student_layers <= layers:
            raise UserError(
                f"--student_layers must be between 1 and the teacher's {layers}, got {inputs.student_layers}"
            )
        if teacher.trained and not pair.control_init and not training.no_control:
            raise UserError(
                f"teacher {pair.teacher} is trained already, so a control cut from it would learn from a teacher: "
                "pass the pretrained encoder of the teacher as --control_init, or pass --no_control"
            )
        kept_layers(teacher.encoder, inputs.student_layers)  # raises UserError
        if control_init:
            _validate_control_init(inputs, control_init, pair)
    if pair.align_epochs:
        kept = len(layer_paths(student.encoder)) if student else inputs.student_layers
        layer_pairs("uniform", kept, len(layer_paths(teacher.encoder)))


def _validate_control_init(inputs: Inputs, control_init: Pretrained, pair: PairArguments) -> None:
    """Raises UserError if the control cannot be cut from the model of --control_init."""
    name, teacher = pair.control_init, pair.teacher
    if control_init.trained:
        raise UserError(f"--control_init {name} is trained already: pass the pretrained encoder of {teacher}")
    if control_init.tokenizer.get_vocab() != inputs.teacher.tokenizer.get_vocab():
        raise UserError(
            f"--control_init {name} and teacher {teacher} have different vocabularies: pass the pretrained encoder "
            "of the teacher"
        )
    if (layers := number_of_layers(control_init)) < inputs.student_layers:
        raise UserError(
            f"--control_init {name} has fewer layers ({layers}) than the control needs ({inputs.student_layers}): "
            "pass the pretrained encoder of the teacher, or --student_layers"
        )
    kept_layers(control_init.encoder, inputs.student_layers)  # raises UserError


def validate_matching(
    inputs: Inputs, pair: PairArguments, matching: MatchingArguments, training: KDTrainingArguments
) -> None:
    """Raises UserError for a method or feature weights that teacher and student do not support."""
    teacher, student = inputs.teacher, inputs.student
    weights = matching.hidden_weight or matching.embedding_weight or matching.attention_weight
    reads_features = bool(weights) or needs_features(matching.method)
    has_bottleneck = isinstance(teacher.model, BottleneckClassifier)
    logits_only = "set --hidden_weight, --embedding_weight and --attention_weight to 0, and use a --method on logits"
    if reads_features or pair.align_epochs:
        validate_alignment(inputs, pair, matching)
    if needs_features(matching.method) and inputs.ensemble:
        raise UserError(f"--method {matching.method} needs a single teacher: leave out --ensemble_teachers")
    check_method(matching.method, training, inputs.data.name, inputs.data.num_labels)
    if inputs.data.task in ("multi_label", "token_classification") and matching.method != PLAIN:
        raise UserError(
            f"--method {matching.method} is for one label per text, and {inputs.data.name} is a task of type "
            f"{inputs.data.task}: pass --method {PLAIN}"
        )
    if len(inputs.texts.labelled_train) < len(inputs.texts.train):
        check_needs_no_labels(matching.method)
    if matching.attention_weight and inputs.ensemble:
        raise UserError("--attention_weight needs a single teacher: set it to 0, or leave out --ensemble_teachers")
    if reads_features and has_bottleneck:
        raise UserError(f"teacher {pair.teacher} has a bottleneck, whose features cannot be matched: {logits_only}")
    if all(model.from_scratch for model in (teacher, student, inputs.control_init) if model):
        reject_unused(
            "models without pretrained weights train at --from_scratch_learning_rate", training, "learning_rate"
        )
    for model in filter(None, (teacher, student)):
        check_submodules(model.model, matching.embedding_weight, matching.attention_weight)
    if matching.hidden_weight or matching.attention_weight:
        layers = len(layer_paths(student.encoder)) if student else inputs.student_layers
        layer_pairs(matching.layer_map, layers, len(layer_paths(teacher.encoder)))
    if has_bottleneck and not student:
        raise UserError(
            f"teacher {pair.teacher} has a bottleneck, so it cannot be cut to a plain student: pass --student"
        )
    if matching.student_from == "pretrained" and (teacher.trained or student):
        raise UserError("--student_from pretrained needs a teacher that is fine-tuned here and a student cut from it")


def validate_alignment(inputs: Inputs, pair: PairArguments, matching: MatchingArguments) -> None:
    """Raises UserError for features that cannot be matched between different tokens."""
    if not inputs.student or (inputs.same_tokens and inputs.pooling[0] == inputs.pooling[1]):
        return
    differ = f"student {pair.student} and teacher {pair.teacher} read a text in different tokens"
    logits_only = "pass --align_epochs 0 and a --method on logits, and set --hidden_weight and --embedding_weight to 0"
    if matching.attention_weight:
        raise UserError(
            f"{differ}, so their attention distributions cannot be matched: set --attention_weight to 0, or pass a "
            "student with the teacher's tokenizer"
        )
    for name, one in ((pair.teacher, inputs.teacher), (pair.student, inputs.student)):
        if not one.tokenizer.is_fast:
            raise UserError(
                f"{differ}, and the tokenizer of {name} has no character offsets to match them: save it as a fast "
                f"tokenizer (tokenizer.json), or {logits_only}"
            )
        if one.tokenizer.padding_side == "left":
            raise UserError(f"{differ}, and {name} pads texts on the left: {logits_only}")
    if head_pooling(inputs.student.model, inputs.data.task) == "mean" and needs_features(matching.method):
        raise UserError(
            f"{differ}, so the mean of the hidden states that {pair.student} classifies has no counterpart: use a "
            '--method on logits, or set "classifier_pooling": "cls" in its config.json'
        )


def validate_bottleneck(inputs: Inputs, pair: PairArguments, bottleneck: TextBottleneckArguments) -> None:
    """Raises UserError for a bottleneck that does not fit the data, or teacher and student."""
    if inputs.data.task in ("multi_label", "token_classification"):
        raise UserError(
            f"a bottleneck predicts one label per text, and {inputs.data.name} is a task of type {inputs.data.task}: "
            "use distill_classifier.py"
        )
    teacher, student = inputs.teacher, inputs.student
    if pair.align_epochs and not inputs.same_tokens:
        raise UserError(
            f"student {pair.student} and teacher {pair.teacher} have different vocabularies, so the inputs of their "
            "bottlenecks cannot be matched: pass --align_epochs 0, or a student with the teacher's vocabulary"
        )
    if teacher.trained:
        reject_unused(f"teacher {pair.teacher} is trained already", bottleneck, "freeze_teacher_encoder")
    elif bottleneck.freeze_teacher_encoder:
        reason = "--freeze_teacher_encoder does not train the teacher's encoder"
        reject_unused(reason, pair, "teacher_epochs", "from_scratch_epochs")
    widths = [model.encoder.config.hidden_size for model in (teacher, student) if model]
    shapes = [meta_bottleneck(width, inputs.data.num_labels, bottleneck.shape()) for width in widths]
    if bottleneck.keys not in ("carried", "reused"):
        return
    if isinstance(teacher.model, BottleneckClassifier):
        pooling = teacher.model.config.pooling
        if pooling != bottleneck.pooling:
            raise UserError(
                f"the keys of teacher {pair.teacher} are for --pooling {pooling}, not {bottleneck.pooling}: pass "
                f"--pooling {pooling}, or --keys new"
            )
        try:
            shapes[0].check_compatible(teacher.model.bottleneck, values=bottleneck.keys == "reused")
        except ValueError as error:
            raise UserError(
                f"{error}; use the shape of the bottleneck of {pair.teacher}, or pass --keys new"
            ) from error
    if len(set(widths)) > 1:
        raise UserError(
            f"student {pair.student} has width {widths[1]}, but the teacher's keys have width {widths[0]}: pass a "
            "student of that width, --student_layers, or --keys new"
        )
