/*
 * The lock that the reader takes, and signals: its holder must not be interrupted by a handler that unmaps watched memory.
 *
 * The unmapping handler sleeps until the reader has read its message; the reader takes the lock before it reads and again
 * to apply; the lock belongs to the thread that the handler interrupted. So um_lock blocks all signals first.
 *
 * Steps and the code they stand for:
 *   holder    any thread in usermm_register, usermm_read, ...: um_lock, its work, um_unlock
 *   handler   runs in the holder's thread, which stands still meanwhile: two calls that unmap watched memory
 *   unmapper  another thread that unmaps
 *   reader    um_reader(): poll, begin(), drain() = um_probe + read + apply() with the lock held, finish(); its signals are
 *             always blocked
 * Property: nobody waits for ever (no invalid end state).
 *
 * Without a protection (each must give an error):
 *   -DOPEN_SIGNALS      um_lock only locks
 *   -DLOCK_FIRST        um_lock locks, then blocks signals
 *   -DRESTORE_FIRST     um_unlock restores the signals, then unlocks
 *   -DFREE_UNDER_LOCK   the holder frees watched memory itself, or stop() unmaps its doorbell before um_unlock
 */
#define HOLDER 0 /* its handler, too: one thread */
#define UNMAPPER 1

bool held, blocked;
bool in_handler; /* the holder stands still */
bool queued[2];
byte word;

inline lock() { atomic { !held -> held = true } }
inline unmap(me) { queued[me] = true; !queued[me] }

active proctype holder() provided (!in_handler) {
    byte rounds;
    do
    :: rounds < 2 ->
#if !defined(OPEN_SIGNALS) && !defined(LOCK_FIRST)
        blocked = true;
#endif
        lock();
#ifdef LOCK_FIRST
        blocked = true;
#endif
#ifdef FREE_UNDER_LOCK
        unmap(HOLDER);
#endif
        skip; /* trees and queues */
#ifdef RESTORE_FIRST
        blocked = false;
#endif
        held = false;
        blocked = false;
        rounds++
    :: else -> break
    od
}

active proctype handler() {
end:
    atomic { !blocked && !queued[HOLDER] -> in_handler = true };
    unmap(HOLDER);
    unmap(HOLDER);
    in_handler = false
}

active proctype unmapper() {
    unmap(UNMAPPER)
}

active proctype um_reader() {
end:
    do
    :: queued[HOLDER] || queued[UNMAPPER] ->
        lock();
        word++;
        held = false;
        if
        :: queued[HOLDER] -> queued[HOLDER] = false
        :: queued[UNMAPPER] -> queued[UNMAPPER] = false
        fi;
        lock();
        skip; /* apply */
        held = false;
        word++
    od
}
