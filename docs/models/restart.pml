/*
 * Stopping and starting again while the old reader cannot be joined.
 *
 * A stranger may have closed our userfaultfd, so that stop() can neither wake the old reader nor close anything: it clears
 * the epoch, waits until the word is settled and leaves the reader to itself. The next start() may be given the same number
 * for its own userfaultfd while the old reader still sleeps on the old one, and whatever that reader does when it wakes must
 * not touch the new monitor.
 *
 * Steps and the code they stand for:
 *   lifecycle   um_monitor_leave -> stop(): epoch 0, um_probe, join or settle and detach; um_monitor_join -> start()
 *   reader(1), reader(2)   reader(): poll, begin(), drain(), finish(), release_watches(), of the old and the new monitor
 *   old_user    munmap of memory that the old userfaultfd still watches
 *   new_user    munmap of memory that the new one watches, then usermm_check(USERMM_PROBE_NONE)
 *   late        usermm_register on the old device: um_watch met EBADF and gets to um_monitor_fail only now
 *   stranger    close(2) of our number, at most once and before the start
 * Properties
 *   new_user's check never answers "unchanged"
 *   the new monitor keeps its descriptor and does not fail
 *   nobody waits for ever (no invalid end state)
 *
 * Without a protection (each must give an error):
 *   -DBEGIN_UNLOCKED      begin() looks at the epoch and makes the word odd without the lock
 *   -DWITHOUT_SETTLE      stop() does not wait for the word
 *   -DRELEASES_ANY_EPOCH  release_watches goes by a flag that start() resets, not by its own epoch
 *   -DFAILS_ANY_EPOCH     um_monitor_fail does not ask which epoch the caller belongs to
 *   -DENDLESS_POLL        poll without a time limit: it wakes for the old userfaultfd, looks at the new one under the same
 *                         number, and sleeps again with the old reference
 */
#define NONE 0
#define OLD 1
#define NEW 2

byte number = OLD;    /* whose userfaultfd our number is */
byte epoch = OLD;     /* um_page.epoch: 0 none */
bool lost;            /* um_monitor.descriptors_lost */
bool failure, held, woken; /* woken: stop_fd was written */
bool referenced[3], released[3], queued[3], done[3];
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

/* Only the number's reference goes here; a sleeping poll may keep the userfaultfd alive. */
inline drop_number() {
    if
    :: number != NONE && !referenced[number] -> released[number] = true
    :: else
    fi;
    number = NONE
}

proctype reader(byte me) {
    bool mine, ready;
end:
    do
    :: true ->
        /* poll */
        if
        :: atomic { number == me -> referenced[me] = true };
end_asleep:
            if
            :: number != NONE && queued[number] -> ready = true
            :: number == NONE || woken && me == OLD -> ready = false
#ifndef ENDLESS_POLL
            :: number != me || epoch != me -> ready = false
#endif
            fi;
            atomic {
                referenced[me] = false;
                if
                :: number != me -> released[me] = true
                :: else
                fi
            }
        :: number != me -> ready = false /* poll says POLLNVAL, or what the other monitor has; begin() decides */
        fi;
        /* begin */
#ifdef BEGIN_UNLOCKED
        mine = epoch == me;
        if
        :: mine -> word++
        :: else -> break
        fi;
#else
        lock();
        mine = epoch == me;
        if
        :: mine -> word++; unlock()
        :: else -> unlock(); break
        fi;
#endif
        /* drain, finish */
        if
        :: number != me ->
            lock();
            if
            :: !failure -> failure = true; lost = true; epoch = 0
            :: else
            fi;
            unlock();
            word++;
            break
        :: number == me && ready && queued[me] ->
            queued[me] = false;
            lock(); generation[me]++; unlock();
            word++
        fi;
        ready = false
    od;
    /* release_watches */
    lock();
#ifdef RELEASES_ANY_EPOCH
    mine = !lost;
#else
    mine = !lost && number == me; /* its own epoch's descriptor, not whatever has the number */
#endif
    unlock();
    if
    :: mine -> assert(number != NEW); released[me] = true
    :: else
    fi;
    done[me] = true
}

active proctype stranger() {
    if
    :: atomic { number == OLD -> drop_number() }
    :: true
    fi
}

active proctype late() {
end:
    atomic { number != OLD };
    lock();
#ifdef FAILS_ANY_EPOCH
    if
    :: !failure
#else
    if
    :: !failure && epoch == OLD
#endif
        -> assert(epoch != NEW); failure = true; lost = true; epoch = 0
    :: else
    fi;
    unlock()
}

active proctype lifecycle() {
    byte w;
    /* stop */
    lock();
    epoch = 0;
    if
    :: !failure -> lost = number != OLD
    :: else
    fi;
    unlock();
    if
    :: !lost -> woken = true; done[OLD]
    :: else ->
#ifndef WITHOUT_SETTLE
        settle()
#else
        skip
#endif
    fi;
    atomic { drop_number() };
    /* start */
    number = NEW;
    failure = false;
    lost = false;
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
    assert(generation[NEW] != seen)
}

init { run reader(OLD) }
