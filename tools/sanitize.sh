#!/usr/bin/env bash
# compute-sanitizer over the CUDA kernels: memcheck over the plan and the fused dispatch, racecheck over the plan.
#
#   tools/sanitize.sh [PYTHON]
#
# Racecheck's errors count here, its warnings do not. Races between blocks and ranks, which it cannot see, are
# tests/test_races_emulated.py's.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
command -v compute-sanitizer >/dev/null || { echo "sanitize: no compute-sanitizer. It comes with the CUDA toolkit."; exit 1; }
kernels=(benchmarks/gpu/check_kernels.py --check-only --small 16)
mkdir -p build
for program in "${kernels[*]}" "benchmarks/gpu/check_fused.py --sanitize --small 8"; do
    echo "memcheck: $program"
    # shellcheck disable=SC2086
    compute-sanitizer --tool memcheck --error-exitcode 1 "$python" $program
done
echo "racecheck: ${kernels[*]}"
compute-sanitizer --tool racecheck "$python" "${kernels[@]}" | tee build/racecheck.log
grep -qE 'RACECHECK SUMMARY: .*\(0 errors|RACECHECK SUMMARY: 0 hazards' build/racecheck.log \
    || { echo "sanitize: racecheck found errors, see build/racecheck.log"; exit 1; }
echo "sanitize: no invalid access, no race"
