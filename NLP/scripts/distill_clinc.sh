#!/usr/bin/env bash
# CLINC150 with the 10 epochs and batches of 48 of a well-known notebook: soft targets and hidden states.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_classifier.py" "$here/clinc.yaml" "$@"
