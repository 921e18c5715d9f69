# Sourced by ci/test: target engines in environments of their own, under .engines.
#
#   install_engines NAME...   installs each that is not there yet; sets TORCHSPEC_ENGINES
#
# ENGINES="vllm" chooses; ENGINES="" leaves them out, and the tests that need them say so.

default_engines() {
    # What their CPU builds were tested on.
    if [ "$(uname -sm)" = "Linux x86_64" ] &&
        "$VENV/bin/python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; then
        echo "vllm sglang"
    fi
}

install_engines() {
    export TORCHSPEC_ENGINES="${TORCHSPEC_ENGINES:-$PWD/.engines}"
    local name
    for name in "$@"; do
        "$VENV/bin/python" -P -m torchspec engine install "$name" --device cpu >&2 ||
            fail "the engine $name could not be installed. Without it: ENGINES= $0"
    done
}
