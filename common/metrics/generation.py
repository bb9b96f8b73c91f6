"""Metrics of generated texts."""

from collections.abc import Sequence

from sacrebleu.metrics import BLEU, CHRF


def translation_metrics(
    hypotheses: Sequence[str], references: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Corpus bleu and chrf, 0 to 100, against one reference each, and sacreBLEU's signature of either: the settings
    under which two figures may be compared (arXiv:1804.08771). Texts are as people read them, not tokenized.
    """
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"need one reference a hypothesis, got {len(references)} for {len(hypotheses)}")
    metrics = {"bleu": BLEU(), "chrf": CHRF()}
    scores = {name: metric.corpus_score(hypotheses, [references]).score for name, metric in metrics.items()}
    return scores, {name: str(metric.get_signature()) for name, metric in metrics.items()}
