/*
 * Registering while other threads unmap: quiet, insert, watch, in this order.
 *
 * Properties
 *   nothing missed     a change of the memory after it was watched is reported, whether usermm_register returned or not
 *   nothing from before   the unmapping that made the address free is not reported for the region, unless the wait for
 *                      quiet was cut short: after REGISTER_WAIT_NS it goes on, which must not cost more than that
 *   nothing left       after a failed watch the region is gone, and a region of the same cookie that another thread put in
 *                      its place meanwhile is not
 *
 * Steps and the code they stand for:
 *   registrar   mmap gets the address that `before` freed; usermm_register: um_quiesce -> wait_until_quiet, um_settle,
 *               insert, um_watch, withdraw
 *   before      munmap of the old memory there, which an earlier region left watched
 *   later       munmap of the new memory at any moment, then usermm_check of its own (um_settle)
 *   bystander   munmap of another region: counts for quiet as well, and moves the generation of the same device
 *   successor   unregisters the cookie and registers it again
 *   reader      um_reader(): poll, serve() = begin(), drain(), finish(); um_queue_notify finds the region, or not
 *
 * Without a protection (each must give an error):
 *   -DWITHOUT_QUIET        no um_quiesce
 *   -DWITHOUT_SETTLE       no um_settle: quiet only says that the message was read
 *   -DLEAVES_EARLY         um_quiesce as usermm_check calls it: a moved generation ends it, which says nothing here
 *   -DWATCH_FIRST          um_watch before insert
 *   -DNO_WITHDRAW          a failed watch just returns
 *   -DWITHDRAW_BY_COOKIE   withdraw without the serial
 * What cutting the wait short costs (gives an error too; the wait has to end, as beside steady discards there is no quiet):
 *   -DEXPECTS_QUIET        nothing from before is ever reported
 * A limit of userfaultfd itself (gives an error too, and nothing in user space cures it):
 *   -DDISCARD              `later` calls madvise(MADV_DONTNEED): its message comes before the pages go, and mmap_changing is
 *                          lowered before, too. Who registers in between sees quiet, and then loses pages unreported.
 */
mtype = { NOBODY, OURS, THEIRS };
#define BEFORE 0
#define LATER 1
#define BYSTANDER 2
#define SENDERS 3

byte word, generation, changing;
bool queued[SENDERS], taken[SENDERS];
bool mapped = true, watched = true; /* the old memory, watched by an earlier region */
mtype region = NOBODY;              /* whose region has the cookie */
bool is_new;                        /* the registrar's mmap is done */
bool promised;                      /* its um_watch, too */
bool reported;
bool cut_short;                     /* the registrar did not wait for quiet */
bool succeeded_by_other;

inline settle() {
    w = word;
    if
    :: w % 2 == 1 -> word != w
    :: else
    fi
}

inline tell(me) {
    queued[me] = true;
    !queued[me];
    changing--
}

active proctype before() {
    atomic { mapped = false; watched = false; changing++ };
    tell(BEFORE)
}

active proctype bystander() {
    changing++;
    tell(BYSTANDER)
}

active proctype later() {
    byte w;
    bool was_watched, was_promised;
#ifdef DISCARD
end:
    atomic { is_new && watched -> changing++ };
    tell(LATER);
    was_promised = promised; /* the pages go now */
#else
    atomic {
        is_new -> mapped = false;
        was_watched = watched;
        was_promised = promised;
        watched = false;
        if
        :: was_watched -> changing++
        :: else
        fi
    };
    if
    :: was_watched -> tell(LATER)
    :: else
    fi;
#endif
    settle();
    assert(!was_promised || reported || succeeded_by_other)
}

active proctype successor() {
end:
    atomic { region == OURS -> region = THEIRS; succeeded_by_other = true }
}

inline quiet() {
#ifdef WITHOUT_QUIET
    skip;
#else
    seen = generation;
    if
    :: changing == 0
    :: changing != 0 -> cut_short = true /* the limit */
#ifdef LEAVES_EARLY
    :: generation != seen
#endif
    fi;
#endif
#ifndef WITHOUT_SETTLE
    settle()
#else
    skip
#endif
}

inline watch() {
    atomic {
        if
        :: mapped -> watched = true; promised = true
        :: mapped -> failed = true  /* -EBUSY, -ENOMEM, -EOPNOTSUPP */
        :: !mapped -> failed = true /* -EFAULT: a hole */
        fi
    }
}

inline withdraw() {
#ifdef WITHDRAW_BY_COOKIE
    region = NOBODY
#elif defined(NO_WITHDRAW)
    skip
#else
    atomic {
        if
        :: region == OURS -> region = NOBODY
        :: else
        fi
    }
#endif
}

active proctype registrar() {
    byte seen, w;
    bool failed;
    atomic {
        !mapped -> mapped = true;
        is_new = true;
        if
        :: watched = true /* another device registered it already */
        :: skip
        fi
    };
    quiet();
#ifdef WATCH_FIRST
    watch();
    region = OURS;
#else
    region = OURS;
    watch();
#endif
    if
    :: failed -> withdraw(); assert(region != OURS)
    :: else
    fi;
    assert(!succeeded_by_other || region == THEIRS)
}

inline notify(from) {
    if
    :: from == BYSTANDER || region == NOBODY -> skip
#ifdef EXPECTS_QUIET
    :: else -> assert(from != BEFORE); reported = true
#else
    :: else -> assert(from != BEFORE || cut_short); reported = true
#endif
    fi;
    generation++
}

active proctype um_reader() {
    byte i;
end:
    do
    :: queued[0] || queued[1] || queued[2] ->
        word++;
        i = 0;
        do
        :: queued[0] -> atomic { taken[0] = true; queued[0] = false }; i = 1
        :: queued[1] -> atomic { taken[1] = true; queued[1] = false }; i = 1
        :: queued[2] -> atomic { taken[2] = true; queued[2] = false }; i = 1
        :: i > 0 -> break
        od;
        for (i : 0 .. SENDERS - 1) {
            if
            :: taken[i] -> atomic { notify(i); taken[i] = false } /* with the lock held */
            :: else
            fi
        }
        i = 0;
        word++
    od
}
