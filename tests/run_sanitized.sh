#!/usr/bin/env bash
# Build the kernels with AddressSanitizer and UBSan into a copy of the packages, and run the tests that use them there.
# Any finding, in this process or one that a test starts, is printed and ends with code 1.
#   tests/run_sanitized.sh PYTHON [TEST]...
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
place=$PWD/build/sanitized
rm -rf "$place"
mkdir -p "$place"
cp -a loader model prep tests ./*.py setup.cfg ./*.md LICENSE "$place"
cd "$place"
find . -name '*.so' -delete

export CC=gcc SRSHARDS_SANITIZE=1
"$python" setup.py -q build_ext --inplace

# Python itself is not built so: the sanitizer's library must be there before it, and C++'s, for exceptions of torch's.
preload="$("$CC" -print-file-name=libasan.so) $("$CC" -print-file-name=libstdc++.so.6)"
# One test wants SIGBUS as it is. Reports go to files, so that none is lost with the output of a test's process; UBSan
# knows standard error alone, which pytest is told to leave as it is.
export ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:log_path=$place/report
export UBSAN_OPTIONS=print_stacktrace=1
export PYTHONMALLOC=malloc PYTHONPATH=$place # every object is watched, and tests' processes find the copy, too

shopt -s nullglob
if (($# == 0)); then
    set -- tests/*/test_{sanitized,tiles,imresize,mixing_operations,dataset,batches}.py tests/*/test_*_kernel.py
fi
status=0
LD_PRELOAD=$preload "$python" -m pytest -m "not long" -p no:cacheprovider --capture=sys \
    --hypothesis-profile=ci -k "not spawn" "$@" || status=$?
for report in report.*; do
    status=1
    head -n 60 "$report" >&2
done
exit "$status"
