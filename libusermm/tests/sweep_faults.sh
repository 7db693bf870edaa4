#!/bin/sh
# Runs each test with its 1st, 2nd, 3rd ... call failing, for each kind of call, until there is none left to fail (status 3).
set -u
calls="malloc ioctl read write poll mmap pipe2 userfaultfd open pthread_create memfd_create madvise"
limit=${USERMM_FAULT_LIMIT:-400}
log=$(mktemp)
failures=0
runs=0
for test in "$@"; do
    for call in $calls; do
        n=0
        status=0
        while [ $n -lt "$limit" ] && [ $status -eq 0 ]; do
            n=$((n + 1))
            USERMM_FAULT_AT=$n USERMM_FAULT_CALL=$call "$test" >/dev/null 2>"$log"
            status=$?
            runs=$((runs + 1))
        done
        if [ $status -ne 0 ] && [ $status -ne 3 ]; then
            echo "$test fails with status $status when $call number $n fails:"
            cat "$log"
            failures=$((failures + 1))
        fi
    done
    for every in 2 3 5 7 11 17 29; do # of all kinds together
        USERMM_FAULT_EVERY=$every "$test" >/dev/null 2>"$log"
        status=$?
        runs=$((runs + 1))
        if [ $status -ne 0 ]; then
            echo "$test fails with status $status when every ${every}th call fails:"
            cat "$log"
            failures=$((failures + 1))
        fi
    done
    echo "# $test: each call failed once, up to $limit of a kind, and every n-th of all"
done
rm -f "$log"
echo "# $runs runs, $failures failures"
[ $failures -eq 0 ]
