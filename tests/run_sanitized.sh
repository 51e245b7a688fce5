#!/usr/bin/env bash
# Build the C extensions with AddressSanitizer and UBSan in a copy of the packages, and run their tests there.
# Findings, also in processes started by tests, are printed; the exit code is then 1.
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

# Python itself is not instrumented, so the sanitizer's library must be preloaded; libstdc++ too, for torch's exceptions.
preload="$("$CC" -print-file-name=libasan.so) $("$CC" -print-file-name=libstdc++.so.6)"
# One test needs SIGBUS unhandled. Reports go to files, so that none is lost with a test process's output. UBSan writes to
# standard error only, so pytest must not redirect it.
export ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:log_path=$place/report
export UBSAN_OPTIONS=print_stacktrace=1
export PYTHONMALLOC=malloc PYTHONPATH=$place # malloc: to watch every object; PYTHONPATH: for processes started by tests

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
