/*
 * The gate: a plain load of the mapped generation, after the own call returned, never shows the old one.
 *
 * A load calls nothing of ours, so it cannot look at the in-flight word. Before the reader reads it takes the page out of its
 * file; a load then faults, and a second userfaultfd keeps it asleep. After applying the page is put back filled, in one
 * step, and who sleeps is woken. A fault is not one step: a load can find no page, and fall asleep when the page is back and
 * everybody was woken. The file has the page then, but the kernel looks only at the mapping's own table, which is empty.
 *
 * Steps and the code they stand for:
 *   caller    the system call, then a load; of the device KEPT
 *   closer    the system call that hits the device CLOSING, then usermm_shutdown -> um_settle, free_some_regions,
 *             um_monitor_leave -> um_gate_open_device; then a load
 *   mapper    um_page_map -> ensure_page (make_page, um_gate_show, um_settle) of KEPT, at any moment; then loads
 *   mover     mremap of a mapping of the page: its message waits in the gate's descriptor until somebody reads it, and
 *             UFFDIO_COPY answers EAGAIN as long
 *   reader    um_reader(): poll, serve() = um_gate_attend, begin() -> um_gate_shut, drain() = read + apply() -> um_gate_show,
 *             finish() -> um_gate_open -> fill, wake_all; after a failure, at any moment: release_watches(), release_gate()
 * Properties
 *   a load after the own call returned shows this call, also of a page that is made meanwhile, and after the close
 *   no load shows an empty page (0, which no generation here is), none goes back
 *   no load sleeps for ever, no mremap does (no invalid end state)
 *
 * -DNO_MOVE leaves the mover out. Without a protection (each must give an error):
 *   -DWITHOUT_GATE             no um_gate_shut
 *   -DSHUT_AFTER_READ          um_gate_shut after read(2)
 *   -DOPEN_BEFORE_APPLY        um_gate_open before apply()
 *   -DWITHOUT_SETTLE           ensure_page without um_settle: what was read already, the reader did not shut this page for
 *   -DUNGUARDED                something touches the page that is not guarded: a child that inherited it, a mapping that is
 *                              populated or locked before it is guarded. The kernel then makes an empty page
 *   -DCLOSES_WITHOUT_SETTLE    usermm_shutdown without um_settle
 *   -DWITHOUT_ATTEND -DNO_MOVE serve() does not look at the gate's descriptor: who fell asleep too late sleeps on
 *   -DWITHOUT_ATTEND_IN_FILL   nor does fill() when UFFDIO_COPY answers EAGAIN
 *   -DLEAVES_SHUT              um_monitor_leave without um_gate_open_device
 *   -DGATE_STAYS               a reader that ends after a failure gives up the first userfaultfd only
 */
#define KEPT 0
#define CLOSING 1
#define DEVICES 2
#define CALLS 2
/* Who loads and can be found asleep. */
#define CALLER 0
#define MAPPER 1
#define LOADERS 2

byte word;                     /* um_page.in_flight */
bool held;                     /* um_monitor.lock */
byte generation[DEVICES] = 1;
bool has_page[DEVICES], listed[DEVICES] = true, registered[DEVICES] = true;
bool present[DEVICES];         /* the file has its first page, */
byte shown[DEVICES];           /* which has this in it, */
byte copy[DEVICES];            /* and the second page this */
bool gate_shut[DEVICES];
bool queued[DEVICES];          /* a caller's message waits in the kernel */
byte taken[DEVICES];           /* read, not applied yet: a caller that was let go can send again before the read ends */
bool asleep[LOADERS], told[LOADERS]; /* in a fault; its message was not read yet */
bool moving, mapped, failed;
bool released, gate_released;  /* the userfaultfds are given up */

inline lock() { atomic { !held -> held = true } }
inline unlock() { held = false }

inline settle() {
    w = word;
    if
    :: w % 2 == 1 -> word != w
    :: else
    fi;
    w = 0
}

inline send(device) {
    queued[device] = !released;
    !queued[device]
}

inline load(me, device) {
    do
    :: atomic { present[device] -> now = shown[device]; break }
    :: !present[device] ->
        atomic { asleep[me] = !gate_released; told[me] = !gate_released };
        !asleep[me]
    od;
    assert(now != 0)
}

inline wake_all() {
    d_step {
        for (i : 0 .. LOADERS - 1) { asleep[i] = false; told[i] = false }
        i = 0
    }
}

inline attend() {
    d_step {
        moving = false;
        for (i : 0 .. LOADERS - 1) {
            asleep[i] = asleep[i] && !told[i];
            told[i] = false
        }
        i = 0
    }
}

inline fill(device) {
    gate_shut[device] = false;
    do
    :: atomic { !moving -> present[device] = true; shown[device] = copy[device]; break }
#ifndef WITHOUT_ATTEND_IN_FILL
    :: atomic { moving -> attend() }
#endif
    od
}

/* um_gate_show */
inline put(device) {
    copy[device] = generation[device];
    if
    :: has_page[device] && !gate_shut[device] -> shown[device] = generation[device]
    :: else
    fi
}

proctype caller() {
    byte now, calls;
    do
    :: calls < CALLS ->
        send(KEPT);
        calls++;
        if
        :: mapped -> load(CALLER, KEPT); assert(now == 1 + calls || failed)
        :: calls < CALLS
        fi
    :: else -> break
    od
}

proctype closer() {
    byte w, i;
    send(CLOSING);
#ifndef CLOSES_WITHOUT_SETTLE
    settle();
#endif
    atomic { !held -> registered[CLOSING] = false };
    lock();
#ifndef LEAVES_SHUT
    if
    :: gate_shut[CLOSING] -> fill(CLOSING); wake_all()
    :: else
    fi;
#endif
    listed[CLOSING] = false;
    unlock();
    present[CLOSING]; /* a load that needs no more than this: nobody takes the page out again */
    assert(shown[CLOSING] == 2 || failed)
}

proctype mapper() {
    byte now, w, before;
    present[KEPT] = true;
    lock();
    has_page[KEPT] = true;
    put(KEPT);
    unlock();
#ifndef WITHOUT_SETTLE
    settle();
#endif
    mapped = true;
    if
    :: load(MAPPER, KEPT); before = now; load(MAPPER, KEPT); assert(now >= before)
    :: load(MAPPER, CLOSING)
    fi
}

#ifndef NO_MOVE
proctype mover() {
    mapped;
    moving = !gate_released;
    !moving
}
#endif

#ifdef UNGUARDED
proctype toucher() {
end:
    atomic { gate_shut[KEPT] && !present[KEPT] -> present[KEPT] = true; shown[KEPT] = 0 }
}
#endif

inline shut_one(device) {
    if
    :: atomic { has_page[device] && listed[device] -> present[device] = false; gate_shut[device] = true }
    :: !has_page[device] || !listed[device]
    fi
}

inline shut() {
#ifndef WITHOUT_GATE
    shut_one(KEPT);
    shut_one(CLOSING)
#else
    skip
#endif
}

inline open_one(device) {
    if
    :: gate_shut[device] && listed[device] -> fill(device); any = true
    :: else
    fi
}

inline open() {
    open_one(KEPT);
    open_one(CLOSING);
    if
    :: any -> wake_all(); any = false
    :: else
    fi
}

/* With the lock held, without which nobody looks at any of this but `shown`. */
inline apply_one(device) {
    do
    :: atomic {
            taken[device] > 0 -> taken[device]--;
            generation[device] = generation[device] + registered[device];
            put(device)
        }
    :: taken[device] == 0 -> break
    od
}

inline apply() {
    apply_one(KEPT);
    apply_one(CLOSING)
}

inline round() {
    lock();
    word++;
#ifndef SHUT_AFTER_READ
    shut();
#endif
    unlock();
    do /* any order, at least one */
    :: atomic { queued[KEPT] -> taken[KEPT]++; queued[KEPT] = false; any = true }
    :: atomic { queued[CLOSING] -> taken[CLOSING]++; queued[CLOSING] = false; any = true }
    :: atomic { any -> any = false; break }
    od;
    lock();
#ifdef SHUT_AFTER_READ
    shut();
#endif
#ifdef OPEN_BEFORE_APPLY
    open();
#endif
    apply();
    unlock();
    lock();
    open();
    unlock();
    word++
}

#define MESSAGES (queued[0] || queued[1])
#ifndef WITHOUT_ATTEND
#define GATE (moving || told[0] || told[1])
#else
#define GATE false
#endif

proctype um_reader() {
    byte i;
    bool message, gate, any;
end:
    do
    :: atomic { MESSAGES || GATE -> message = MESSAGES; gate = GATE };
        if
        :: gate -> gate = false; attend()
        :: else
        fi;
        if
        :: message -> message = false; round()
        :: else
        fi;
        if
        :: true
        :: failed = true; break
        fi
    od;
    atomic { released = true; queued[KEPT] = false; queued[CLOSING] = false };
#ifndef GATE_STAYS
    atomic { gate_released = true; moving = false; wake_all() }
#endif
}

init {
    atomic {
        has_page[CLOSING] = true;
        present[CLOSING] = true;
        shown[CLOSING] = 1;
        copy[CLOSING] = 1;
        run um_reader();
        run caller();
        run closer();
        run mapper();
#ifndef NO_MOVE
        run mover();
#endif
#ifdef UNGUARDED
        run toucher();
#endif
    }
}
