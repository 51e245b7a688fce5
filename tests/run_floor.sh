#!/usr/bin/env bash
# Test prep, and the part of loader that needs only numpy, without torch on several Pythons; print a result for each.
#   tests/run_floor.sh [PYTHON]...
# Without arguments: python3.11 to python3.15 as far as PATH, pyenv or uv provide them. Python 3.11 gets the lowest
# declared versions, others those of constraints.txt, since the lowest are not built for them.
set -uo pipefail
cd "$(dirname "$0")/.."
tests=(tests/*/test_{bad_images,build,cli,images,imresize,index,plan,readahead,resources,resume,stage,tiles,verify}.py)
packages=(numpy h5py opencv-python-headless pillow tqdm click pytest hypothesis scikit-image setuptools)

if (($# == 0)); then
    for minor in 11 12 13 14 15; do
        found=$(command -v "python3.$minor") && "$found" -c "" 2>/dev/null ||
            found=$(compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor.*/bin/python" | tail -n 1) ||
            found=$(uv python find --no-python-downloads "3.$minor" 2>/dev/null) ||
            { echo "python3.$minor: not found, skipped"; continue; }
        set -- "$@" "$found"
    done
fi

status=0 results=()
for python in "$@"; do
    version=$("$python" -c 'import platform; print(platform.python_version())') || exit 1
    place=.venv-floor/$version
    versions=(-c constraints.txt)
    [[ $version != 3.11.* ]] || versions=(-c <("$python" tests/lowest.py))
    rm -rf "$place"
    if "$python" -m venv "$place" &&
        "$place/bin/python" -m pip install --quiet --disable-pip-version-check "${versions[@]}" "${packages[@]}" &&
        "$place/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . &&
        "$place/bin/python" -m pytest -m "not long" -p no:cacheprovider "${tests[@]}"; then
        results+=("Python $version: passed")
    else
        results+=("Python $version: FAILED")
        status=1
    fi
done
printf '%s\n' "${results[@]}"
exit "$status"
