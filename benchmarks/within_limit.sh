# Sourced by the scripts for a GPU: runs Python modules within LIMIT_S seconds of the script.
# shellcheck shell=bash

# To write a checkpoint after SIGTERM, and to end.
grace_s=30

# Ends the script with exit code 3 where the time is over before the module ends, and with its exit code where it fails.
within_limit() {
    local left=$((${LIMIT_S:-700} - SECONDS - grace_s)) code
    if [ "$left" -le 0 ]; then
        exit 3
    fi
    timeout --signal TERM --kill-after "$grace_s" "$left" "${PYTHON:-python}" -m "$@"
    code=$?
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        exit 3
    elif [ "$code" -ne 0 ]; then
        exit "$code"
    fi
}
