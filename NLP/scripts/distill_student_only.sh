#!/usr/bin/env bash
# BERT without a bottleneck -> smaller BERT + bottleneck.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_bottleneck.py" "$here/student_only.yaml" "$@"
