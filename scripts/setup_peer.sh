#!/usr/bin/env bash
# Makes .venv-peer: PyTorch and the Transformer Engine wheel, whose Python reference the peer tests run in a process of
# its own. Apart from .venv, because this Python only has to be one that PyTorch has a CPU build for.
#   PEER_PYTHON=/path/to/python   use this interpreter (default: the first of python3.11, python3.12, python3 that runs)
# On x86-64 Linux the default package index has PyTorch with CUDA, several GB; pip's PIP_INDEX_URL or PIP_FIND_LINKS
# can point it to a CPU build of the same version.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'setup_peer: %s\n' "$*" >&2; exit 1; }

# Every candidate on PATH is tried, not just the first: a pyenv shim may stand before a Python that works.
find_python() {
    local candidate
    while read -r candidate; do
        if "$candidate" -c 'import venv' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done < <(type -aP python3.11 python3.12 python3)
    return 1
}

python=${PEER_PYTHON:-$(find_python)} || fail "no Python with the venv module on PATH; name one: PEER_PYTHON=/path/to/python"
rm -rf .venv-peer
"$python" -m venv --without-pip .venv-peer # pip comes from .venv: some systems' Pythons have none to give
pip() { .venv/bin/python -m pip --disable-pip-version-check --python .venv-peer/bin/python "$@"; }
echo "setup_peer: installing into .venv-peer ($(.venv-peer/bin/python --version))"
pip install --quiet -r requirements-peer.txt
pip install --quiet --no-deps -r requirements-peer-no-deps.txt
