/*
 * Failing closed: once a change may go unreported, no check answers "unchanged", and no thread waits for ever.
 *
 * Three things go wrong here, at any moment: the reader meets a message it does not know; it finds a device's pipe closed;
 * and a stranger closes our userfaultfd, after which its number may be another file. A sleeping poll(2) keeps the closed
 * userfaultfd alive, but when it wakes it looks at the number again; only its return lets the userfaultfd, and the threads
 * that wait for it, go.
 *
 * Steps and the code they stand for:
 *   caller    the system call, then usermm_check: um_quiesce = um_device_state, wait_until_quiet, lost -> um_monitor_fail; then
 *             usermm_generation
 *   other     a thread that takes a new generation: usermm_generation
 *   reader    um_reader(): poll, serve() = begin(), drain() (um_probe, read, apply()), finish() ->
 *             um_monitor_fail_locked(), release_watches()
 *   stranger  close(2) of a number that is not its own, then perhaps another file on it, never ready
 * Properties
 *   a check after the own call returned never answers "unchanged"
 *   a generation that the failure made is never handed out: nothing would ever move it again, and a program that compares
 *   the mapped generation calls nothing that could tell it so
 *   the monitor fails once, and the state says so to whoever met the lost descriptor
 *   nobody waits for ever (no invalid end state)
 * -DWITHOUT_PROBE -DNO_STRANGER, the check by three loads and a reader that fails, has to hold, too.
 *
 * Without a protection (each must give an error):
 *   -DWITHOUT_PROBE      usermm_check(USERMM_PROBE_NONE) beside a stranger: exact only once the reader noticed
 *   -DGENERATION_FIRST   um_monitor_fail_locked() moves the generations, then clears the epoch
 *   -DSTATE_FIRST        usermm_generation looks at the state, then loads
 *   -DENDLESS_POLL       poll without a time limit: a stranger's silent file on the number keeps the callers asleep
 *   -DEVEN_BEFORE_FAIL -DWITHOUT_PROBE -DNO_STRANGER   finish() makes the word even, then fails
 */
mtype = { OURS, CLOSED, SILENT };      /* what our number is */
mtype = { READY, INVALID, NOTHING };   /* what poll says */

mtype number = OURS;
bool referenced, released; /* by the sleeping poll; the last reference is gone */
bool queued;
byte changing, word, generation;
bool alive = true;         /* um_page.epoch is that of the devices */
bool held;                 /* um_monitor.lock */
bool failure, lost;        /* um_monitor.failure, descriptors_lost */
byte made_by_failure;

inline lock() { atomic { !held -> held = true } }
inline unlock() { held = false }

inline advance() { atomic { generation++; made_by_failure = generation } }

inline fail(reason_is_lost) {
    if
    :: failure
    :: else ->
        failure = true;
        lost = reason_is_lost || number != OURS;
#ifdef GENERATION_FIRST
        advance();
        alive = false
#else
        alive = false;
        advance()
#endif
    fi
}

/* um_monitor_fail with the epoch of the caller's device */
inline fail_if_alive() {
    if
    :: alive -> fail(true)
    :: else
    fi
}

/* usermm_generation: `ok` and `now` */
inline ask() {
    w = word;
    if
    :: w % 2 == 1 -> word != w
    :: else
    fi;
#ifdef STATE_FIRST
    ok = alive;
    now = generation;
#else
    now = generation;
    ok = alive;
#endif
    assert(!ok || made_by_failure == 0 || now != made_by_failure)
}

inline um_quiesce() {
#ifdef WITHOUT_PROBE
    skip
#else
    if
    :: !alive
    :: else ->
        if
        :: number == OURS && (changing == 0 || generation != seen)
        :: number != OURS -> lock(); fail_if_alive(); unlock(); assert(!alive)
        fi
    fi
#endif
}

active proctype caller() {
    byte seen, now, w, calls;
    bool ok, sent;
    do
    :: calls < 2 ->
        ask();
        if
        :: !ok -> break
        :: else -> seen = now
        fi;
        atomic {
            sent = !released; /* a released userfaultfd watches nothing */
            if
            :: sent -> changing++; queued = true
            :: else
            fi
        };
        if
        :: sent -> atomic { !queued || released -> queued = false; changing-- }
        :: else
        fi;
        um_quiesce();
        ask();
        assert(!ok || now != seen);
        calls++
    :: else -> break
    od
}

active proctype other() {
    byte now, w;
    bool ok;
    ask()
}

#ifndef NO_STRANGER
active proctype stranger() { /* or not: who waits for it waits for ever */
    if
    :: atomic {
            number == OURS -> number = CLOSED;
            if
            :: !referenced -> released = true
            :: else
            fi
        };
        if
        :: number == CLOSED -> number = SILENT
        :: true
        fi
    :: true
    fi
}
#endif

inline poll() {
    if
    :: atomic { number == OURS -> referenced = true };
end_asleep:
        if
        :: queued && number == OURS -> ready = READY
        :: queued && number == CLOSED -> ready = INVALID
#ifndef ENDLESS_POLL
        :: number != OURS -> ready = NOTHING /* while the number is ours, a limit only begins another poll */
#endif
        fi;
        atomic {
            referenced = false;
            if
            :: number != OURS -> released = true
            :: else
            fi
        }
    :: number == CLOSED -> ready = INVALID
#ifndef ENDLESS_POLL
    :: number == SILENT -> ready = NOTHING
#endif
    fi
}

/* One message at a time, or a message that means nothing to us. */
inline drain() {
    if
    :: number != OURS -> result = INVALID
    :: number == OURS ->
        atomic {
            if
            :: number != OURS -> result = INVALID
            :: number == OURS && queued -> queued = false; took = true
            :: number == OURS && !queued
            fi
        };
        if
        :: took -> lock(); generation++; unlock()
        :: took -> lock(); generation++; unlock(); result = INVALID /* -EBADF: the device's pipe */
        :: took -> result = NOTHING /* -EPROTO */
        :: !took
        fi;
        took = false
    fi
}

inline finish() {
#ifdef EVEN_BEFORE_FAIL
    word++;
#endif
    if
    :: result == READY
    :: else -> lock(); fail(result == INVALID); unlock()
    fi;
#ifndef EVEN_BEFORE_FAIL
    word++
#else
    skip
#endif
}

active proctype um_reader() {
    mtype ready, result = READY;
    bool took;
end:
    do
    :: result == READY ->
end_blocked:
        poll();
        lock();
        if
        :: !alive -> unlock(); break
        :: else -> word++; unlock()
        fi;
        if
        :: ready == INVALID -> result = INVALID
        :: else -> drain()
        fi;
        finish()
    :: else -> break
    od;
    if
    :: number == OURS -> atomic { number = SILENT; released = true } /* um_probe, dup3 */
    :: else
    fi
}
