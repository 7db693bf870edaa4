/*
 * Holding a registration without the cache's lock: nobody holds what was deregistered, each registration is deregistered
 * once, and nobody who asks after the memory went is given it.
 *
 * A look-up reads a slot of the hash table, then the entry that it points to; in between the entry can die, be deregistered
 * and become the registration of other memory. Entries are never freed, so the pointer can be followed; the entry's word
 * (holders and the dead bit) and a second look at its range decide.
 *
 * Steps and the code they stand for:
 *   getter     usermm_cache_get: is_current, um_index_find_start, um_entry_hold, the look at the range; usermm_cache_release
 *   unmapper   a thread whose munmap of the memory returns: the reader has moved the generation by then
 *   refresher  um_cache_refresh under the lock: um_cache_kill, then `seen`; then um_cache_bury
 *   maker      um_cache_make: the free entry becomes a registration of other memory, is published, let go and evicted
 * Range 0 is the memory that goes, range 1 the other.
 *
 * Without a protection (each must give an error):
 *   -DADDS_BLINDLY       a hold is an addition: a dead word gains holders, and reaches "dead, nobody" twice
 *   -DTRUSTS_THE_SLOT    the range is not looked at again once the entry is held
 *   -DSEEN_FIRST         `seen` moves before the entries die
 *   -DDIES_UNLOCKED      the dead bit is read and then written, so a hold in between is lost
 */
#define GETTERS 2

bool locked;
byte generation, seen;
bool gone;              /* munmap has returned */
bool slot = true;       /* the hash table's slot for range 0 points to the entry */
byte range;             /* what the entry is a registration of */
byte holders;
bool dead;
bool registered = true; /* with the device */
bool free_again;        /* on the list of free entries */

inline lock() { atomic { !locked -> locked = true } }
inline unlock() { locked = false }

inline bury() {
    assert(registered && dead && holders == 0);
    registered = false;
    free_again = true
}

inline let_go() {
    d_step { holders--; last = dead && holders == 0 };
    if
    :: last -> bury()
    :: else
    fi
}

inline condemn() {
#ifdef DIES_UNLOCKED
    last = holders == 0;
    dead = true;
#else
    d_step { last = holders == 0; dead = true };
#endif
}

active [GETTERS] proctype getter() {
    bool late, last, found;
    late = gone;
    if
    :: generation == seen -> found = slot
    :: else
    fi;
    if
    :: found ->
#ifdef ADDS_BLINDLY
        holders++;
        if
        :: dead -> let_go(); found = false
        :: else
        fi
#else
        atomic {
            if
            :: dead -> found = false
            :: else -> holders++
            fi
        }
#endif
    :: else
    fi;
    if
    :: found ->
#ifndef TRUSTS_THE_SLOT
        if
        :: range != 0 -> let_go(); found = false
        :: else
        fi
#endif
    :: else
    fi;
    if
    :: found ->
        assert(!late);
        assert(registered && range == 0); /* in use */
        assert(registered && range == 0);
        let_go()
    :: else
    fi
}

active proctype unmapper() {
    generation++;
    gone = true
}

active proctype refresher() {
    byte now;
    bool last;
    generation != seen;
    lock();
    now = generation;
#ifdef SEEN_FIRST
    seen = now;
#endif
    slot = false;
    condemn();
#ifndef SEEN_FIRST
    seen = now;
#endif
    unlock();
    if
    :: last -> bury()
    :: else
    fi
}

active proctype maker() {
    bool last;
    free_again;
    lock();
    d_step { free_again = false; range = 1; holders = 1 }; /* dead still, and held by its maker */
    unlock();
    registered = true;
    lock();
    dead = false;
    unlock();
    holders--; /* it is not dead: there is nothing to bury */
    lock();
    condemn();
    unlock();
    if
    :: last -> bury()
    :: else
    fi
}
