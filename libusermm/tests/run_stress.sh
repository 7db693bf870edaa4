#!/bin/sh
# Runs the races of BUILD, then the builds that lack a protection: those must fail, or the trials prove nothing.
# USERMM_TRIALS sets the trials of each case (default 1000000), USERMM_UNPROTECTED_TRIALS those of the latter.
set -eu
build=$1
trials=${USERMM_TRIALS:-1000000}
unprotected=${USERMM_UNPROTECTED_TRIALS:-50000}
for threads in 1 4 16; do
    "$build/stress_own_thread" "$trials" "$threads"
done
for noise in 0 4; do
    "$build/stress_address_reuse" "$trials" "$noise"
done
for threads in 4 16; do
    "$build/stress_cache" "$((trials / 5))" "$threads"
done
"$build/stress_cache_union" "$((trials / 20))"
"$build/stress_notifications" "$((trials / 5))"
must_fail() {
    echo "# without its protection, $1 has to fail:"
    if "$@"; then
        echo "$1 passed without its protection: the trials do not reach the race" >&2
        exit 1
    fi
}
must_fail "$build/without_in_flight/stress_own_thread" "$unprotected" 4
must_fail "$build/without_probe/stress_address_reuse" "$unprotected" 0
for protection in probe in_flight recheck; do
    must_fail "$build/without_$protection/stress_cache" "$unprotected" 4
done
must_fail "$build/without_recheck/stress_cache_union" "$unprotected"
for protection in gate in_flight; do
    must_fail "$build/without_$protection/stress_notifications" "$unprotected"
done
