#!/usr/bin/env bash
# Plain BERT -> smaller BERT with a bottleneck.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_bottleneck.py" "$here/student_only.yaml" "$@"
