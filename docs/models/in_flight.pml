/*
 * The in-flight word: a check after the caller's own call returned never answers "unchanged".
 *
 * read(2) lets the unmapping thread go on before the reader has applied what it read. So the reader makes a shared word odd
 * before it reads and even after it applied, and whoever sees it odd waits until it changes.
 *
 * Steps and the code they stand for:
 *   caller    the system call, then usermm_check(USERMM_PROBE_NONE) -> usermm_generation -> um_settle
 *   other     a thread that asks after the caller told it (a happens-before edge)
 *   reader    um_reader(): poll, serve() = begin(), drain() (um_probe, read, apply()), finish()
 *   queue     the kernel's event queue; one read brings any number of messages, and each lets its own thread go at once
 * Each caller has a device of its own, so that a notification for the other cannot hide its own lateness.
 *
 * Without a protection (each must give an error):
 *   -DWITHOUT_IN_FLIGHT   um_settle does nothing
 *   -DODD_AFTER_READ      begin() after read(2)
 *   -DEVEN_BEFORE_APPLY   finish() before apply()
 */
#define CALLERS 2
#define CALLS 2

byte word;                 /* um_page.in_flight */
byte generation[CALLERS];  /* usermm_device.generation */
bool queued[CALLERS];      /* the caller's message waits in the kernel */
bool taken[CALLERS];       /* read, not applied yet: the reader's buffer */
chan told = [0] of { byte };

inline settle(w) {
#ifndef WITHOUT_IN_FLIGHT
    w = word;
    if
    :: w % 2 == 1 -> word != w /* not "until even": the next round may have begun */
    :: else
    fi
#else
    skip
#endif
}

inline check(me, seen, w) {
    settle(w);
    assert(generation[me] != seen)
}

proctype caller(byte me) {
    byte seen, w, calls;
    do
    :: calls < CALLS ->
        seen = generation[me];
        queued[me] = true;      /* munmap: the memory is gone, the message is queued */
        !queued[me];            /* asleep until it was read */
        check(me, seen, w);
        if
        :: me == 0 && calls == CALLS - 1 -> told!seen
        :: else
        fi;
        calls++
    :: else -> break
    od
}

/* Asks at a later moment than the caller, so it has to see the change as well. */
proctype other() {
    byte seen, w;
    told?seen;
    check(0, seen, w)
}

#define PENDING (queued[0] || queued[1])

active proctype um_reader() {
    byte i;
end:
    do
    :: PENDING ->
#ifndef ODD_AFTER_READ
        word++;
#endif
        i = 0;
        do /* newest waiter first or not: any order, at least one */
        :: queued[0] -> atomic { taken[0] = true; queued[0] = false }; i = 1
        :: queued[1] -> atomic { taken[1] = true; queued[1] = false }; i = 1
        :: i > 0 -> break
        od;
#ifdef ODD_AFTER_READ
        word++;
#endif
#ifdef EVEN_BEFORE_APPLY
        word++;
#endif
        for (i : 0 .. CALLERS - 1) {
            if
            :: taken[i] -> generation[i]++; taken[i] = false
            :: else
            fi
        }
        i = 0;
#ifndef EVEN_BEFORE_APPLY
        word++
#endif
    od
}

init {
    atomic { run caller(0); run caller(1); run other() }
}
