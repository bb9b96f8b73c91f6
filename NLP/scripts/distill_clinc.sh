#!/usr/bin/env bash
# CLINC150 with soft targets and hidden states. Epochs and batch size are those of a well-known notebook.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_classifier.py" "$here/clinc.yaml" "$@"
