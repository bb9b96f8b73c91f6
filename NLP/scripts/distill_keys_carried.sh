#!/usr/bin/env bash
# BERT + bottleneck -> smaller BERT + bottleneck with the teacher's keys.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_bottleneck.py" "$@"
