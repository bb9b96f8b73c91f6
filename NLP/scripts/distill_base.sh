#!/usr/bin/env bash
# BERT -> smaller BERT, by alignment and soft targets.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_classifier.py" "$here/base.yaml" "$@"
