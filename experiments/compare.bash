# Sourced by the scripts beside it: `compare FLAGS` is fp4jax.compare as the environment says:
#   PYTHON   (.venv/bin/python)
#   JOBS     runs at a time on the same devices (1); step times mean something with 1 alone
#   LIMIT    seconds from the script's start after which the runs under way save their step and the report is written
compare() {
    local limit=()
    if [[ -n ${LIMIT:-} ]]; then
        local left=$((LIMIT - SECONDS))
        # In the foreground, so that INT reaches this one process, which passes it on to the runs.
        limit=(timeout --foreground --signal=INT --kill-after=60 $((left > 1 ? left : 1)))
    fi
    "${limit[@]}" "${PYTHON:-.venv/bin/python}" -m fp4jax.compare --jobs="${JOBS:-1}" "$@"
}
