/*
 * The quiescence probe: an address that another thread unmapped and that was handed out again is never taken for the old
 * memory.
 *
 * munmap drops the kernel's lock before its message is queued. In that gap another thread can be given the address and ask
 * whether it changed; no word in user space can know yet. The kernel's own count can: it goes up before the lock is
 * dropped and down after the unmapping thread woke, and a write-protect call answers EAGAIN while it is not 0.
 *
 * Steps and the code they stand for:
 *   unmapper  munmap: the address is free, mmap_changing up, lock dropped, message, asleep until read, mmap_changing down
 *   taker     mmap gets the address, then usermm_check(USERMM_PROBE_WAIT): um_quiesce -> wait_until_quiet -> um_probe, then
 *             usermm_generation -> um_settle
 *   reader    um_reader(): poll, begin(), drain(), finish()
 * Each address has a device of its own, so that a notification for the other cannot hide its own lateness.
 *
 * Without a protection (each must give an error):
 *   -DWITHOUT_PROBE   usermm_check(USERMM_PROBE_NONE)
 *   -DWRONG_ORDER     the word and the generation first, then the probe
 *   -DWITHOUT_IN_FLIGHT   the probe alone: quiet only says that the message was read
 */
#define PLACES 2
#define SEEN 0 /* the generation when a cache made its entries for the old memory */

byte word;
byte generation[PLACES];
byte changing;         /* mmap_changing of the userfaultfd */
bool is_free[PLACES];  /* the address can be handed out */
bool queued[PLACES], taken[PLACES];

proctype unmapper(byte at) {
    atomic { changing++; is_free[at] = true }; /* under the kernel's lock */
    queued[at] = true;
    !queued[at];
    changing--
}

inline probe() {
#ifndef WITHOUT_PROBE
    changing == 0 || generation[at] != SEEN
#else
    skip
#endif
}

inline settle_and_load() {
#ifndef WITHOUT_IN_FLIGHT
    w = word;
    if
    :: w % 2 == 1 -> word != w
    :: else
    fi;
#endif
    now = generation[at]
}

proctype taker(byte at) {
    byte w, now;
    atomic { is_free[at] -> is_free[at] = false }; /* mmap */
#ifdef WRONG_ORDER
    settle_and_load();
    probe();
#else
    probe();
    settle_and_load();
#endif
    assert(now != SEEN)
}

active proctype um_reader() {
    byte i;
end:
    do
    :: queued[0] || queued[1] ->
        word++;
        i = 0;
        do
        :: queued[0] -> atomic { taken[0] = true; queued[0] = false }; i = 1
        :: queued[1] -> atomic { taken[1] = true; queued[1] = false }; i = 1
        :: i > 0 -> break
        od;
        for (i : 0 .. PLACES - 1) {
            if
            :: taken[i] -> generation[i]++; taken[i] = false
            :: else
            fi
        }
        i = 0;
        word++
    od
}

init {
    atomic { run unmapper(0); run unmapper(1); run taker(0); run taker(1) }
}
