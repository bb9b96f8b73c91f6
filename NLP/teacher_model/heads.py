"""The head of a classifier: its outputs in another order."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd.common.utils.errors import UserError

PROBE = 4  # tokens of the text that shows whether the right layer was reordered


@torch.no_grad()
def reorder_outputs(name: str, model: PreTrainedModel, places: Sequence[int], labels: Sequence[str]) -> None:
    """Reorders the outputs of the classifier NAME in place: output i becomes the former output places[i], `labels[i]`.

    Raises UserError for a classifier whose outputs are not those of a linear layer.
    """
    order = torch.tensor(places)
    expected = _logits(model)[:, order]
    for head in reversed([module for module in model.modules() if isinstance(module, nn.Linear)]):
        if head.out_features != len(places):
            continue
        before = [parameter.clone() for parameter in head.parameters()]
        for parameter in head.parameters():
            parameter.copy_(parameter[order])
        if torch.allclose(_logits(model), expected, atol=1e-6):
            model.config.id2label = dict(enumerate(labels))
            model.config.label2id = {label: i for i, label in enumerate(labels)}
            return
        for parameter, old in zip(head.parameters(), before, strict=True):
            parameter.copy_(old)
    raise UserError(
        f"the labels of {name} have another order than those of the data and the other models, and its outputs, which "
        "are not those of a linear layer, cannot be reordered: pass another --teacher or --student"
    )


def _logits(model: PreTrainedModel) -> Tensor:
    """Logits (1 or tokens, classes) of a text of a few tokens."""
    was_training = model.training
    vocabulary: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    ids = torch.arange(1, 1 + PROBE)[None] % len(vocabulary)
    logits: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model.train(was_training)
    return logits.reshape(-1, logits.shape[-1])
