#!/usr/bin/env bash
# Distills GLUE tasks with several systems and seeds, and writes one table.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_glue.py" "$here/glue.yaml" "$@"
