# Sourced by ci/quickstart and ci/test: makes .venv with torchspec in it. Quick when nothing has changed.
#
#   prepare_environment EXTRAS    e.g. "" or "[test]"; sets $VENV
#
# PYTHON=... names the interpreter; TORCH=... the torch requirement (default: ci/requirements/torch.txt).

say() { printf '[%4ds] %s\n' "$SECONDS" "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" || fail "PYTHON=$PYTHON is not a Python from 3.11 to 3.14"
        command -v "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if command -v "$candidate" >/dev/null && supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python from 3.11 to 3.14 found ($(python3 --version 2>/dev/null || echo 'no python3 at all')). Install one, or name it: PYTHON=/path/to/python $0"
}

make_venv() {
    local python=$1
    say "making $VENV with $("$python" --version)"
    rm -rf "$VENV"
    "$python" -m venv "$VENV" >&2 || fail "$python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"
}

# Compiling everything takes longer than installing it; what is imported is compiled then, and kept.
unset PYTHONDONTWRITEBYTECODE
pip_install() { "$VENV/bin/python" -m pip install --no-compile --disable-pip-version-check --no-input --progress-bar off "$@" >&2 </dev/null; }

install_torch() {
    local wanted=${TORCH:-$(grep -v '^#' ci/requirements/torch.txt)}
    local cpu_index=https://download.pytorch.org/whl/cpu
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        say "installing $wanted for the NVIDIA GPU found here (several GB)"
        pip_install "$wanted"
        return
    fi
    if [ "$(uname -s)" = Linux ] && "$VENV/bin/python" -c "
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + '/torch/', timeout=5).close()" "$cpu_index" 2>/dev/null; then
        say "installing the CPU build of $wanted from $cpu_index"
        pip_install "$wanted" --index-url "$cpu_index" && return
    fi
    say "installing $wanted from pip's default index"
    pip_install "$wanted"
}

prepare_environment() {
    local extras=$1 python stamp
    VENV=${VENV:-$PWD/.venv}
    say "setting up $VENV"
    python=$(find_python) || exit 1
    stamp=$(cat pyproject.toml ci/environment.sh ci/requirements/torch.txt | "$python" -c "
import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read() + repr((sys.version, sys.argv[1:])).encode()).hexdigest())" "${TORCH:-}" "$PWD")
    if [ "$(cat "$VENV/.installed$extras" 2>/dev/null)" = "$stamp" ]; then
        say "nothing to install"
        return
    fi
    if ! "$VENV/bin/python" -c 'import pip' 2>/dev/null || ! supported "$VENV/bin/python"; then
        make_venv "$python"
    fi
    install_torch || fail "torch could not be installed; pip's message is above"
    say "installing torchspec$extras"
    pip_install -e ".$extras" || fail "torchspec could not be installed; pip's message is above"
    printf '%s' "$stamp" >"$VENV/.installed$extras"
    say "set-up done"
}

# torchao in a folder of its own, which its tests add: transformers imports it wherever it finds it, in every process.
install_low_bit() {
    local wanted folder=$VENV/lowbit
    wanted=$(sed -n 's/^lowbit = \["\(.*\)"\]$/\1/p' pyproject.toml)
    if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$wanted" ]; then return 0; fi
    say "installing $wanted into $folder"
    if pip_install --no-deps --upgrade --target "$folder" "$wanted"; then
        printf '%s' "$wanted" >"$folder/.installed"
    else
        say "it could not be installed: the tests of 8-bit moments are skipped"
    fi
}

# What checks the manifests, images and scripts of examples/launch.
install_checks() {
    local stamp
    stamp=$(cksum <ci/requirements/launch.txt)
    if [ "$(cat "$VENV/.installed-checks" 2>/dev/null)" = "$stamp" ]; then return 0; fi
    say "installing ci/requirements/launch.txt"
    if pip_install -r ci/requirements/launch.txt; then
        printf '%s' "$stamp" >"$VENV/.installed-checks"
    else
        say "it could not be installed: some tests of examples/launch are skipped"
    fi
}

# What Mooncake's client is linked to, where we may install it; elsewhere its tests say that they were skipped.
install_libraries() {
    local missing=()
    [ "$(uname -s)" = Linux ] || return 0
    ldconfig -p | grep -q 'libibverbs\.so\.1 ' || missing+=(libibverbs1)
    ldconfig -p | grep -q 'libnuma\.so\.1 ' || missing+=(libnuma1)
    ldconfig -p | grep -q 'libcurl\.so\.4 ' || missing+=(libcurl4)
    if [ ${#missing[@]} -eq 0 ]; then return 0; fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        say "Mooncake needs ${missing[*]}: its tests are skipped"
        return 0
    fi
    say "installing ${missing[*]}"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >&2 ||
        say "${missing[*]} could not be installed: the tests of Mooncake are skipped"
}
