#!/usr/bin/env bash
# Makes .venv with everything `make train` and `make test` need. Safe to run again. Options, from the environment:
#   PYTHON=/path/to/python   use this interpreter          CUDA=0   leave the GPU packages out
set -euo pipefail
cd "$(dirname "$0")/.."
venv_python=.venv/bin/python

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

# Every candidate on PATH is tried, not just the first: a pyenv shim may stand before a Python that works.
find_python() {
    local candidate
    while read -r candidate; do
        if new_enough "$candidate" && "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done < <(type -aP python3.12 python3.13 python3)
    return 1
}

make_venv() {
    local python
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python >= 3.12 that runs."
        "$PYTHON" -m venv .venv
    elif python=$(find_python); then
        "$python" -m venv .venv
    elif command -v uv >/dev/null; then
        uv venv --quiet --seed --python "$(cat .python-version)" .venv
    else
        fail "no Python >= 3.12 with the venv module on PATH. Install one (apt install python3.12-venv," \
            "pyenv install 3.12, or uv), or name it: make PYTHON=/path/to/python3.12 ..."
    fi
}

"$venv_python" -m pip --version >/dev/null 2>&1 || make_venv # missing, or left half-made
new_enough "$venv_python" || fail ".venv holds no Python >= 3.12: remove it (rm -r .venv) and run this again."
echo "setup: installing into .venv ($("$venv_python" --version))"
pip() { "$venv_python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet -r requirements-test.txt

if [ "${CUDA:-1}" != 0 ] && nvidia-smi >/dev/null 2>&1; then
    jax=$(sed -n 's/^jax==\([0-9.]*\).*/\1/p' requirements.txt)
    echo "setup: NVIDIA GPU found, installing jax[cuda13]==$jax"
    pip install --quiet -c requirements.txt "jax[cuda13]==$jax"
    "$venv_python" -c 'import jax; jax.devices("gpu")' 2>/dev/null ||
        fail "nvidia-smi works but JAX $jax cannot use the GPU (CUDA 13 needs driver >= 580)." \
            "Update the driver, or run on the CPU: rm -r .venv && make CUDA=0 ..."
fi
