#!/usr/bin/env bash
# Distills mainly by soft targets.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill.py" "$here/soft.yaml" "$@"
