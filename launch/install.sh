#!/usr/bin/env bash
# Makes an environment elsewhere that needs this checkout no more: launch/install.sh ~/entroray-env
# setup.sh beside it does the work, and README.md says what can be set; again brings the environment up to date.
set -euo pipefail
[[ $# == 1 && $1 != -* ]] || { echo "usage: launch/install.sh FOLDER" >&2 && exit 2; }
ENTRORAY_INTO=$(realpath -m "$1")
[[ ! -e $ENTRORAY_INTO || -f $ENTRORAY_INTO/pyvenv.cfg || -f $ENTRORAY_INTO/entroray-setup || -z $(ls -A "$ENTRORAY_INTO") ]] ||
    { echo "install: $ENTRORAY_INTO is there and no environment: give another folder" >&2 && exit 2; }
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
say "entroray is in $VENV and needs nothing else:  $VENV/bin/entroray doctor"
