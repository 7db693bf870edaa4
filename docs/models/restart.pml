/*
 * Stopping and starting again: stop() never waits for ever, and what is left of the old monitor leaves the new one alone.
 *
 * stop() ends the epoch, unmaps the doorbell, a watched page whose message wakes the reader, and joins the reader. Nobody
 * reads for an ended epoch: the thread that unmaps the doorbell, as any other, is let go when the userfaultfd is given up. The
 * reader may be asleep, in the middle of a round, or have ended after a failure; the number may be closed or a stranger's.
 *
 * Steps and the code they stand for:
 *   lifecycle   um_monitor_leave -> stop(): um_probe, epoch 0, ring_doorbell, pthread_join, close_descriptors;
 *               um_monitor_join -> start()
 *   reader(1), reader(2)   um_reader(): poll, serve() = begin(), drain() (um_probe, read, apply()), finish() ->
 *               um_monitor_fail_locked(), release_watches(), of the old and the new monitor
 *   old_user    munmap of memory that the old userfaultfd watches, at any moment
 *   new_user    munmap of memory that the new one watches, then usermm_check(USERMM_PROBE_NONE)
 *   late        usermm_check or usermm_register on the old device: has loaded the number, and gets to its ioctl, and to
 *               um_lost() -> um_monitor_fail, only now
 *   stranger    close(2) of our number, then perhaps another file on it, never ready
 * Properties
 *   new_user's check never answers "unchanged"
 *   the new monitor keeps its userfaultfd and does not fail, and its word begins even
 *   nobody waits for ever (no invalid end state)
 *
 * Switches of the runs: -DNO_STRANGER; -DENDLESS_POLL, poll without a time limit. -DENDLESS_POLL -DNO_STRANGER has to hold:
 * then every wake comes from a message and none from the limit. Without a protection (each must give an error):
 *   -DENDLESS_POLL        a stranger's silent file keeps stop() and the callers asleep
 *   -DENDLESS_POLL -DNO_STRANGER -DPOLLS_BLINDLY   the reader does not look at the epoch before it polls: a round that began
 *                         before the epoch ended takes the doorbell's message with its own, and nothing wakes the next poll
 *   -DENDLESS_POLL -DNO_STRANGER -DWITHOUT_DOORBELL   stop() wakes nobody
 *   -DENDLESS_POLL -DNO_STRANGER -DRINGS_FIRST   the doorbell before the epoch ends: a message like others
 *   -DWITHOUT_JOIN        stop() does not wait for the reader, which then gives up the new monitor's userfaultfd as its own
 *   -DWITHOUT_RELEASE     the reader ends without release_watches: nobody lets the doorbell's thread go
 *   -DRELEASES_BY_FLAG    release_watches goes by descriptors_lost, which a closed pipe sets, too, and not by a probe
 *   -DFAILS_ANY_EPOCH     um_monitor_fail does not compare the epoch: a late caller fails the new monitor
 * A limit of the kernel (gives an error, too):
 *   -DCOPY                another process holds a copy of the userfaultfd for ever
 */
#define NONE 0
#define OLD 1
#define NEW 2
#define SILENT 3      /* a stranger's file */
#define PLACEHOLDER 4 /* of release_watches */

mtype = { GOOD, LOST, UNKNOWN }; /* 0, -EBADF or -ENOTTY, -EPROTO */

byte number = OLD;      /* what our number is */
byte epoch = OLD;       /* um_page.epoch: 0 none */
bool failure, lost, held;
bool referenced[3];     /* by a sleeping poll */
bool copied[3];         /* by another process */
bool released[3], queued[3], ended[3];
bool ringing;           /* the doorbell's message waits in the old userfaultfd */
byte generation[3], word;

inline lock() { atomic { !held -> held = true } }
inline unlock() { held = false }

inline settle() {
    w = word;
    if
    :: w % 2 == 1 -> word != w
    :: else
    fi
}

/* In an atomic step: a reference to `file` is gone, perhaps the last one. */
inline drop(file) {
    if
    :: (file == OLD || file == NEW) && number != file && !referenced[file] && !copied[file] -> released[file] = true
    :: else
    fi
}

inline fail(reason_is_lost) {
    if
    :: failure
    :: else -> failure = true; lost = reason_is_lost || number != OLD && number != NEW; epoch = NONE
    fi
}

/* A limit that ends while the number is ours and the epoch goes on only begins another poll. */
inline poll() {
    if
    :: atomic { number == me -> referenced[me] = true };
end_asleep:
        if
        :: number == NONE
        :: number == me && (queued[me] || me == OLD && ringing)
#ifndef ENDLESS_POLL
        :: number != me || epoch != me
#endif
        fi;
        atomic { referenced[me] = false; drop(me) }
    :: number == NONE
    :: number == SILENT ->
end_strange:
#ifdef ENDLESS_POLL
        number != SILENT
#else
        skip
#endif
    fi
}

/* One read takes all that is there. */
inline drain() {
    if
    :: number != me -> result = LOST
    :: else ->
        atomic {
            if
            :: number != me -> result = LOST
            :: else -> took = queued[me]; queued[me] = false
            fi;
            if
            :: number == me && me == OLD -> ringing = false
            :: else
            fi
        };
        if
        :: took -> lock(); generation[me]++; unlock()
        :: took && me == OLD -> lock(); generation[me]++; unlock(); result = LOST /* the device's pipe */
        :: took && me == OLD -> result = UNKNOWN                                  /* the message */
        :: !took
        fi;
        took = false
    fi
}

inline finish() {
    if
    :: result == GOOD
    :: else -> lock(); fail(result == LOST); unlock()
    fi;
    word++
}

inline release_watches() {
#ifndef WITHOUT_RELEASE
    if
#ifdef RELEASES_BY_FLAG
    :: !lost ->
#else
    :: number == OLD || number == NEW ->
#endif
        atomic {
            assert(number != NEW);
            number = PLACEHOLDER;
            drop(me)
        }
    :: else
    fi
#else
    skip
#endif
}

proctype reader(byte me) {
    mtype result = GOOD;
    bool mine, took;
end:
    do
#ifndef POLLS_BLINDLY
    :: result == GOOD && epoch != me -> break
    :: result == GOOD && epoch == me ->
#else
    :: result == GOOD ->
#endif
end_blocked:
        poll();
        lock();
        mine = epoch == me;
        if
        :: mine -> word++; unlock()
        :: else -> unlock(); break
        fi;
        drain();
        finish()
    :: result != GOOD -> break
    od;
    release_watches();
    ended[me] = true
}

#ifndef NO_STRANGER
active proctype stranger() { /* or not: who waits for it waits for ever */
    if
    :: atomic { number == OLD -> number = NONE; drop(OLD) };
        if
        :: atomic { number == NONE -> number = SILENT }
        :: true
        fi
    :: true
    fi
}
#endif

active proctype late() {
end:
    number != OLD && number != NEW; /* its ioctl fails */
    lock();
    if
#ifndef FAILS_ANY_EPOCH
    :: epoch != OLD
#endif
    :: else -> fail(true)
    fi;
    unlock();
    assert(epoch != OLD)
}

inline ring_doorbell() {
    atomic { sent = !released[OLD]; ringing = sent };
    if
    :: sent -> atomic { !ringing || released[OLD] -> ringing = false }
    :: else
    fi
}

active proctype lifecycle() {
    bool sent;
#ifdef RINGS_FIRST
    ring_doorbell();
#endif
    lock();
    if
    :: !failure -> lost = number != OLD
    :: else
    fi;
    epoch = NONE;
    unlock();
#if !defined(WITHOUT_DOORBELL) && !defined(RINGS_FIRST)
    ring_doorbell();
#endif
#ifndef WITHOUT_JOIN
    ended[OLD];
    assert(word % 2 == 0);
    assert(released[OLD]);
#endif
    atomic {
        if
        :: !lost -> number = NONE; drop(OLD)
        :: else
        fi
    };
    failure = false;
    lost = false;
    number = NEW; /* the same number or another: what a late caller, or the old reader, takes for its own */
    epoch = NEW;
    run reader(NEW);
    run new_user()
}

active proctype old_user() {
    bool sent;
    atomic { sent = !released[OLD]; queued[OLD] = sent };
    if
    :: sent -> atomic { !queued[OLD] || released[OLD] -> queued[OLD] = false }
    :: else
    fi
}

proctype new_user() {
    byte seen, w;
    seen = generation[NEW];
    queued[NEW] = true;
    !queued[NEW];
    settle();
    assert(generation[NEW] != seen);
    assert(epoch == NEW && number == NEW && !failure)
}

init {
    atomic {
#ifdef COPY
        copied[OLD] = true;
#endif
        run reader(OLD)
    }
}
