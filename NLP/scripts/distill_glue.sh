#!/usr/bin/env bash
# GLUE tasks x systems x seeds, one table.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_glue.py" "$here/glue.yaml" "$@"
