#!/usr/bin/env bash
# LunarLander-v3: a PPO teacher, a student with a tenth of its parameters.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_policy.py" "$here/lunar_lander.yaml" "$@"
