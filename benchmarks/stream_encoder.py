"""An encoder of texts that is trained end to end in a stream, for `streams.py`."""

import torch
import torch.nn.functional as F
from embeddings import Source, tokenized
from heads import Head, Rows, step
from stream_heads import Learner, Replay, Sizes
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kd.common.utils.devices import autocast, best_device, resolve_precision
from kd.nlp.student_model.layers import disable_dropout, load_encoder
from kd.nlp.student_model.pooling import pool

RATES = 1e-7, 1e-6, 1e-5, 1e-4  # of AdamW
PREDICTED = 256  # texts in a batch of predictions


def token_ids(source: Source) -> tuple[dict[str, Tensor], list[str]]:
    """Token ids (rows, longest) of each split, padded, and labels (rows,), as `train` and `train_labels`; the class
    names.
    """
    _, texts = tokenized(source)
    padding, found = texts.collate.tokenizer.pad_token_id, {}
    for split, rows in texts.splits.items():
        ids = [torch.tensor(row) for row in rows["input_ids"][:]]
        found[split] = pad_sequence(ids, batch_first=True, padding_value=padding)
        found[f"{split}_labels"] = torch.tensor(rows["labels"][:])
    return found, texts.data.label_names


class TunedEncoder(Head):
    """An encoder and a linear layer, from zero, on its mean hidden states. A step of AdamW for each batch, without
    dropout. `Rows.embeddings` are token ids, as of `token_ids`.
    """

    def __init__(self, encoder: str, classes: int, rate: float) -> None:
        super().__init__()
        self.device, self.precision = best_device(), resolve_precision("auto")
        self.encoder = load_encoder(encoder)
        disable_dropout(self.encoder)
        self.encoder.set_attn_implementation("eager")  # the faster one for short texts in bf16 on a CPU
        self.layer = nn.Linear(self.encoder.config.hidden_size, classes)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.to(self.device)
        self.optimizer = torch.optim.AdamW(self.parameters(), rate, weight_decay=0, fused=True)

    def forward(self, rows: Rows) -> Tensor:
        mask = rows.embeddings != self.encoder.config.pad_token_id
        used = mask.any(0)
        ids, mask = (part[:, used].to(self.device) for part in (rows.embeddings, mask))
        with autocast(self.device, self.precision):
            hidden = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return self.layer(pool(hidden, mask, "mean")).cpu()

    def fit(self, rows: Rows) -> Head:
        step(self.optimizer, F.cross_entropy(self(rows), rows.labels))
        return self

    @torch.no_grad()
    def predict(self, rows: Rows) -> Tensor:
        lengths = (rows.embeddings != self.encoder.config.pad_token_id).sum(1)
        order = lengths.argsort()
        logits = torch.cat([self(rows[part]) for part in order.split(PREDICTED)])
        return torch.empty_like(logits).index_copy(0, order, logits)


def tuned(sizes: Sizes, rate: float) -> Head:
    return TunedEncoder(sizes.encoder, sizes.classes, rate)


TUNED_ENCODERS = [
    Learner("fine-tuned encoder", tuned, RATES, end_to_end=True),
    Learner(
        "fine-tuned encoder, replay of 1 %",
        lambda sizes, rate: Replay(tuned(sizes, rate), sizes.examples // 100),
        RATES,
        end_to_end=True,
    ),
]
