#!/usr/bin/env bash
# Teacher -> student, by soft targets much more than by labels.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill.py" "$here/soft.yaml" "$@"
