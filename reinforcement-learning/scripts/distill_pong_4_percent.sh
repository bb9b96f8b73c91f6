#!/usr/bin/env bash
# ALE/Pong-v5 from frames, into 4 % of the DQN network.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_policy.py" "$here/pong_4_percent.yaml" "$@"
