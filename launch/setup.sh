# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh, under `set -euo pipefail`. Makes the virtual environment, installs the pinned set
# when it is not the one installed, repairs torchvision there, and puts the environment first on the PATH.
# Interrupted at any moment, it goes on when started again.
#
# SHAPELOOM_VENV    where the environment goes (default: .venv in the repository)
# SHAPELOOM_PYTHON  which Python makes it (default: the first of python3, python3.13 ... python3.10 that will do)
# SHAPELOOM_CPU=1   install the CPU set though there is an NVIDIA GPU

shapeloom_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
shapeloom_venv="${SHAPELOOM_VENV:-$shapeloom_root/.venv}"

shapeloom_die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The first Python that is new enough and can make virtual environments.
shapeloom_find_python() {
    local candidate found="" version
    for candidate in ${SHAPELOOM_PYTHON:+"$SHAPELOOM_PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || continue
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        found="${found:-$candidate}"
    done
    if [[ -n $found ]]; then
        version="$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        shapeloom_die "$found cannot make virtual environments; on Debian or Ubuntu: sudo apt-get install python$version-venv"
    fi
    shapeloom_die "Python 3.10 or newer was not found; on Debian or Ubuntu: sudo apt-get install python3 python3-venv"
}

# A new environment, unless a whole one is there. Only ever deletes a folder that is an environment.
shapeloom_make_venv() {
    local python
    if "$shapeloom_venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
        return
    fi
    if [[ -e $shapeloom_venv && ! -f $shapeloom_venv/pyvenv.cfg && -n "$(ls -A "$shapeloom_venv")" ]]; then
        shapeloom_die "$shapeloom_venv is not a virtual environment; move it away, or name another in SHAPELOOM_VENV"
    fi
    python="$(shapeloom_find_python)"
    echo "Making a virtual environment in $shapeloom_venv ($("$python" --version))"
    rm -rf "$shapeloom_venv"
    "$python" -m venv "$shapeloom_venv" || shapeloom_die "the virtual environment $shapeloom_venv could not be made (see above)"
}

shapeloom_has_gpu() {
    [[ -z ${SHAPELOOM_CPU:-} ]] && [[ -n "$(nvidia-smi -L 2>/dev/null || true)" ]]
}

# constraints.txt, with the CUDA pair of torch and torchvision on a machine that has a GPU.
shapeloom_constraints() {
    if shapeloom_has_gpu; then
        sed -E '/^(torch|torchvision)==/d' "$shapeloom_root/constraints.txt"
        cat "$shapeloom_root/constraints-cuda.txt"
    else
        cat "$shapeloom_root/constraints.txt"
    fi
}

# What the environment was made of; the root is part of it because the package is installed in place.
shapeloom_stamp() {
    "$shapeloom_venv/bin/python" - "$shapeloom_root" "$@" <<'PYTHON'
import hashlib, sys
digest = hashlib.sha256(f"{sys.version} {sys.argv[1]}".encode())
for path in sys.argv[2:]:
    digest.update(open(path, "rb").read())
print(digest.hexdigest())
PYTHON
}

shapeloom_install() {
    local stamp_file="$shapeloom_venv/.shapeloom-installed" constraints="$shapeloom_venv/.shapeloom-constraints.txt" stamp info
    shapeloom_constraints >"$constraints"
    stamp="$(shapeloom_stamp "$constraints" "$shapeloom_root/pyproject.toml" "$shapeloom_root/launch/torchvision_repair.py")"
    if [[ -f $stamp_file && "$(cat "$stamp_file")" == "$stamp" ]]; then
        return
    fi
    rm -f "$stamp_file"
    # An install that was killed may have left a package that calls itself installed and is not.
    for info in "$shapeloom_venv"/lib/python3*/site-packages/*.dist-info; do
        if [[ -d $info && ! -f $info/RECORD ]]; then rm -rf "$info"; fi
    done
    if shapeloom_has_gpu; then
        echo "Installing the pinned set for CUDA (several GB, some minutes; once)"
    else
        echo "Installing the pinned set (about 2 GB on disk, a few minutes; once)"
    fi
    "$shapeloom_venv/bin/python" -m pip install --disable-pip-version-check --retries 5 \
        -c "$constraints" -e "$shapeloom_root[dev]" |
        sed -u -E '/^(Looking in|Requirement already|  *Preparing metadata|  *Getting requirements|  *Installing build)/d; s/^(Installing collected packages:).*/\1 (the longest step, without a word)/' ||
        shapeloom_die "the install did not finish (see above); start the same command again and it goes on"
    (cd / && "$shapeloom_venv/bin/python" -m shapeloom doctor --repair) ||
        shapeloom_die "the environment does not work yet (see above)"
    printf '%s\n' "$stamp" >"$stamp_file"
}

# One set-up of an environment at a time: quickstart.sh and test.sh may be started side by side.
mkdir -p "$(dirname "$shapeloom_venv")"
if command -v flock >/dev/null 2>&1; then
    exec {shapeloom_lock}>"$shapeloom_venv.lock"
    flock -n "$shapeloom_lock" || { echo "Waiting for another set-up of $shapeloom_venv"; flock "$shapeloom_lock"; }
fi
shapeloom_make_venv
shapeloom_install
if [[ -n ${shapeloom_lock:-} ]]; then exec {shapeloom_lock}>&-; fi

export VIRTUAL_ENV="$shapeloom_venv"
export PATH="$shapeloom_venv/bin:$PATH"
unset PYTHONHOME
