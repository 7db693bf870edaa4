/*
 * Who still has an extent: the hypervisor asks for the lock of each open file that it handed out. A hold is finished once
 * its last descriptor and mapping are gone, never before while its domain lives, and its notification comes once; an
 * extent that was released is given up after its last hold.
 *
 * The kernel tells of a closing before it drops the lock. Closings of one inode that are not read yet are one; a full
 * queue says only that something was lost.
 *
 * Steps and the code they stand for:
 *   holder      a mapping of the grantee's: it may be taken away behind the library's back, and nothing is said; it
 *               may be said to be gone while it is there; it may outlive its domain
 *   domain      its end: Holding.finish_all
 *   hypervisor  Mapping.map, unmapped; Server._look; Holding.look_at, look_on, finish, free_if_unused. A look is broken
 *               off and gone on with anywhere
 *
 * Without a protection (each must give an error):
 *   -DLOOKS_ONCE         no second look after a pause, for a lock that was still there when its closing was told of
 *   -DCOUNTS_CLOSINGS    each closing that is told of ends a hold
 *   -DIGNORES_OVERFLOW   a full queue is taken for nothing
 *   -DTRUSTS_THE_WORD    a domain that says that it let go is believed
 *   -DFORGETS_CLOSINGS   a closing during a look starts no other
 *   -DTRUSTS_THE_LIST    a look that goes on does not ask whether the hold is there still
 */
#define HOLDS 2

bool lock[HOLDS];            /* the kernel's: some descriptor or mapping of this open file is left */
byte closers;                /* between telling of it and dropping the lock */
bool queued, overflow;       /* inotify's queue, as far as it is about this extent */

bool wants[HOLDS], asked[HOLDS], said[HOLDS];
bool ended, released;        /* what the grantee's domain and the grantor did */

bool held[HOLDS], todo[HOLDS];
byte notified[HOLDS];
bool over, live = true, given_up;

inline close_file(i) {
    atomic { closers++; if :: queued = true :: overflow = true fi };
    atomic { lock[i] = false; closers-- }
}

active [HOLDS] proctype holder() {
    byte i = _pid;
    wants[i] = true;
    asked[i];
    if
    :: !lock[i]              /* refused */
    :: lock[i] ->
        if
        :: said[i] = true    /* a lie */
        :: ended             /* it outlives its domain, in a child or since the program kept it */
        :: skip
        fi;
        close_file(i);
        if
        :: said[i] = true
        :: skip
        fi
    fi
}

active proctype domain() {
    if
    :: ended = true
    :: skip
    fi
}

active proctype grantor() {
    released = true
}

inline finish(i) {
    held[i] = false;
    notified[i]++;
    assert(notified[i] == 1);
    give_up()
}

inline give_up() {
    if
    :: !live && !held[0] && !held[1] -> given_up = true
    :: else
    fi
}

/* Holding._look_through, one hold of it. */
inline look(i) {
    todo[i] = false;
    if
#ifdef TRUSTS_THE_LIST
    :: !lock[i] -> finish(i)
#else
    :: held[i] && !lock[i] -> finish(i)
#endif
    :: else
    fi;
    if
    :: !todo[0] && !todo[1] && closed_since -> closed_since = false; todo[0] = held[0]; todo[1] = held[1]
    :: else
    fi
}

inline look_at() {
    if
    :: todo[0] || todo[1] ->
#ifndef FORGETS_CLOSINGS
        closed_since = true
#else
        skip
#endif
    :: else -> todo[0] = held[0]; todo[1] = held[1]
    fi
}

/* Its own loop: each option is a turn, and steps of others come between turns, and between closing and lock. */
active proctype hypervisor() {
    bool closed_since, again;
    byte i;
    do
    :: atomic { wants[0] || wants[1] -> i = (wants[0] -> 0 : 1);
        wants[i] = false;
        if
        :: live && !over -> lock[i] = true; held[i] = true
        :: else
        fi;
        asked[i] = true }
    :: atomic { said[0] || said[1] -> i = (said[0] -> 0 : 1);
        said[i] = false;
        if
#ifdef TRUSTS_THE_WORD
        :: held[i] -> finish(i)
#else
        :: held[i] && !lock[i] -> finish(i)
#endif
        :: else
        fi }
    :: atomic { queued || overflow ->
#ifdef IGNORES_OVERFLOW
        if
        :: queued -> look_at(); again = true
        :: else
        fi;
#elif defined(COUNTS_CLOSINGS)
        if
        :: held[0] -> finish(0)
        :: !held[0] && held[1] -> finish(1)
        :: else
        fi;
#else
        look_at();
        again = true;
#endif
        queued = false; overflow = false }
#ifndef LOOKS_ONCE
    :: atomic { again && closers == 0 -> again = queued || overflow; look_at() }      /* after a pause */
#endif
    :: atomic { todo[0] -> look(0) }
    :: atomic { todo[1] -> look(1) }
    :: atomic { ended && !over -> over = true;
        if
        :: held[0] -> finish(0)
        :: else
        fi;
        if
        :: held[1] -> finish(1)
        :: else
        fi }
    :: atomic { released && live -> live = false; give_up() }
    :: timeout -> break
    od;
    /* All are done: nobody has it. */
    assert(!held[0] && !held[1]);
    assert(given_up)
}

/* While its domain lives a hold is not finished before its open file is gone. */
active proctype witness() {
end_witness:
    atomic { notified[0] > 0 && lock[0] || notified[1] > 0 && lock[1] -> assert(over) }
}
