#!/usr/bin/env bash
# Prepares the environment once, then hands over to Python. `./run_all.sh --help` lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "run_all.sh: $*" >&2; exit 1; }
suits() { "$1" -c "import sys, $2; sys.exit(not (3, 11) <= sys.version_info < (3, 15))" 2>/dev/null; }
recipe() { cat requirements.txt pyproject.toml; pwd; }  # a moved copy of the study is installed anew
installed() { [[ -x $home/bin/python ]] && recipe | cmp -s - "$home/installed-from"; }

find_python() {  # with the module $1
    local candidates=(python3 python3.14 python3.13 python3.12 python3.11)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for python in "${candidates[@]}"; do suits "$python" "$1" && return; done
    python=${candidates[0]}
    fail "Python 3.11 to 3.14 with venv is needed, and $python is $("$python" --version 2>/dev/null || echo missing):" \
        "install it (on Debian: python3-venv), name another with PYTHON=/path/to/python3, or take conda's with --conda."
}

make_venv() { find_python ensurepip; "$python" -m venv --clear "$home"; }

make_conda() {
    local conda
    for conda in conda mamba micromamba ""; do command -v "$conda" >/dev/null && break; done
    [[ $conda ]] || fail "--conda needs conda, mamba or micromamba on the PATH, and none is there."
    rm -rf "$home"
    CONDA_ALWAYS_YES=true MAMBA_ALWAYS_YES=true "$conda" env create --prefix "$PWD/$home" --file environment.yml
}

install() {
    echo "Installing into $home: a few minutes, once."
    suits "$home/bin/python" pip || "$make"
    "$home/bin/python" -m pip install --requirement requirements.txt
    "$home/bin/python" -m pip install --no-deps --no-build-isolation --editable .
    recipe >"$home/installed-from"  # last, so that an interrupted installation starts again
}

case " $* " in
    *" -h "* | *" --help "*) find_python argparse; exec "$python" kure_lib/__main__.py --help ;;
    *" --conda "*) home=.conda make=make_conda ;;
    *) home=.venv make=make_venv ;;
esac
if ! installed; then
    (
        ! command -v flock >/dev/null || flock 9  # a second copy waits for the first to install
        installed || install
    ) 9>"$home.lock"
fi
exec "$home/bin/python" -m kure_lib "$@"
