#!/usr/bin/env bash
# Makes the virtual environment VENV for SGLang on a CPU, with the tools for building and testing this project. The
# release is PINNED in sglang_macs/releases.py; SGLANG=RELEASE takes another.
#
#   scripts/setup_env.sh VENV          PYTHON=/path/to/python3.11 chooses the interpreter
#
# Runs again at no cost: it does nothing while VENV fits the requirements files. The project itself is not installed.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: scripts/setup_env.sh VENV" >&2; exit 2; }
venv=$1
here=$(cd "$(dirname "$0")/.." && pwd)
steps=5
step=0

fail() { printf 'setup_env: %s\n' "$*" >&2; exit 1; }

# The first interpreter that is Python 3.11 or 3.12 and can make virtual environments.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or 3.12 with the venv module; found $(python3 --version 2>&1 || echo 'no python3')." \
        "Install one of them (on Debian and Ubuntu also its -venv package), or set PYTHON=/path/to/python3.11."
}

# run WHAT COMMAND...: one numbered line with the seconds it took; the command's output only if it fails.
run() {
    local what=$1 started=$SECONDS pid status=0
    shift
    step=$((step + 1))
    [ -t 1 ] || printf '[%d/%d] %s\n' "$step" "$steps" "$what"
    "$@" >"$log" 2>&1 &
    pid=$!
    while [ -t 1 ] && kill -0 "$pid" 2>/dev/null; do
        printf '\r[%d/%d] %s  %d s ' "$step" "$steps" "$what" $((SECONDS - started))
        sleep 1
    done
    wait "$pid" || status=$?
    if [ "$status" -ne 0 ]; then
        printf '\n' >&2
        tail -n 30 "$log" >&2
        fail "step $step of $steps ($what) failed with status $status. Above: the last lines of its output." \
            "Repair the cause (network, disk space, package index), then run the same command again."
    fi
    [ -t 1 ] && printf '\r\033[K'
    printf '[%d/%d] %s: %d s\n' "$step" "$steps" "$what" $((SECONDS - started))
}

# pip without its summary of conflicts: sglang is installed without dependencies on purpose, and the summary would list
# every CUDA package that is missing, as errors.
pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-warn-conflicts "$@"
}

# What the installed SGLang asks for by version or range, a line each: a limit on what the rest may bring.
pins() {
    "$venv/bin/python" -c "
import importlib.metadata, re
for wanted in importlib.metadata.requires('sglang'):
    if found := re.fullmatch(r'([\w.-]+)(?:\[\w+\])?([<>=!~][\w.<>=!~,* -]+)', wanted):
        print(''.join(found.groups()))"
}

check() {
    "$venv/bin/python" -c "
import importlib.metadata as m
got = {name: m.version(name).split('+')[0] for name in ('torch', 'sglang', 'transformers')}
assert got['sglang'] == '${sglang#*==}' and 'torch==' + got['torch'] == '$torch', got
import torch, numpy; torch.zeros(2).sum()" || return
    ! "$venv/bin/python" -m pip check | grep '^sglang .* has requirement'  # what is missing is missing on purpose
}

python=$(find_python)
pinned=$("$python" -c "import runpy, sys; print(runpy.run_path(sys.argv[1])['PINNED'])" "$here/sglang_macs/releases.py")
sglang="sglang==${SGLANG:-$pinned}"
wanted=$(cat "$here"/requirements/*.txt "$0" <("$python" --version) <(echo "$sglang") | "$python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
stamp=$venv/.requirements-sha256
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "$venv is up to date"
    exit 0
fi

log=$(mktemp)
constraint=$(mktemp)
trap 'rm -f "$log" "$constraint"' EXIT
echo "making $venv with $("$python" --version); 2.5 GB on disk, or 7 GB if the index has no CPU build of torch"
run "virtual environment" "$python" -m venv "$venv"
run "$sglang, without its CUDA dependencies" pip_install --no-deps "$sglang"
pins >"$constraint"
torch=$(grep '^torch==' "$constraint")
# torch before the rest and by its plain name: what follows must find it there and not fetch another build.
run "$torch" pip_install "$torch"
run "the rest" pip_install -c "$constraint" -r "$here/requirements/cpu.txt" -r "$here/requirements/dev.txt"
run "check" check
echo "$wanted" >"$stamp"
