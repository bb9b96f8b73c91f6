#!/usr/bin/env bash
# Sentiment: SST-2, BERT -> the six-layer student of DistilBERT's shape, cut from the fine-tuned teacher.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_classifier.py" "$here/sentiment.yaml" "$@"
