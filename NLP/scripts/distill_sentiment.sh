#!/usr/bin/env bash
# SST-2 (sentiment): BERT -> a student with six layers, as in DistilBERT, cut from the fine-tuned teacher.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_classifier.py" "$here/sentiment.yaml" "$@"
