#!/usr/bin/env bash
# ALE/Pong-v5 from frames, into 7 % of the DQN network.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_policy.py" "$here/pong_7_percent.yaml" "$@"
