#!/usr/bin/env bash
# From a fresh checkout to a trained model: sets up, then trains the `quickstart` experiment.
# Arguments are overrides of its settings, as in: launch/quickstart.sh run.steps=20
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec entroray train experiment=quickstart "$@"
