#!/usr/bin/env bash
# Makes the virtual environment that the Makefile uses: setup.sh PYTHON VENV. Debian's missing packages first, where it may.
set -euo pipefail
python=$1 venv=$2
cd "$(dirname "$0")/.."

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "hybridtrain needs Python 3.11 or newer as $python (make PYTHON=...)" >&2
    exit 2
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if ! { command -v apt-get >/dev/null && as_root apt-get update -qq && as_root apt-get install -y -qq python3-venv; }; then
        echo "$python cannot make virtual environments; install python3-venv" >&2
        exit 2
    fi
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
# torch first and by its exact version: any looser requirement would let the resolver fetch a CUDA build of gigabytes
$pip install -q "$(grep '^torch==' requirements.lock)"
$pip install -q -r requirements.lock
$pip install -q --no-deps --no-build-isolation -e .
