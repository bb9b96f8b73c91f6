"""Metrics of regressors."""

import numpy as np
from scipy.stats import pearsonr, spearmanr


def regression_metrics(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """pearson, spearman and mse of predictions and targets (samples,).

    A correlation with a constant is undefined and reported as 0, because NaN is no JSON.
    """
    if predictions.shape != targets.shape or predictions.ndim != 1:
        raise ValueError(f"need two arrays (samples,), got {predictions.shape} and {targets.shape}")
    predictions, targets = predictions.astype(np.float64), targets.astype(np.float64)
    varies = np.ptp(predictions) > 0 and np.ptp(targets) > 0
    return {
        "pearson": float(pearsonr(predictions, targets).statistic) if varies else 0.0,
        "spearman": float(spearmanr(predictions, targets).statistic) if varies else 0.0,
        "mse": float(np.square(predictions - targets).mean()),
    }
