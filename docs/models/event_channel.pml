/*
 * An event channel between a survivor and a peer that ends and comes again: no event is lost, and each end is learned.
 *
 * A pair of sockets is one element of the arrays: whether bytes wait at the survivor's end, and whether it was shut down.
 * The peer says what there is to do, then sends; at any moment it dies, or shuts its own end down without a word. The last
 * one may live on, so that no death makes up for an event that was lost.
 *
 * Steps and the code they stand for:
 *   survivor   epoll_wait with EPOLLONESHOT; EventPorts.take: recv, then rearm when the peer is gone; whoever called
 *              Evtchn.read looks at what there is to do; Evtchn.unmask
 *   peer       PORT_INTERDOMAIN, a store to shared memory, Evtchn.notify; SIGKILL, or shutdown(2) on its own end
 *   (atomic)   Ports.bind_interdomain, domain_gone, rearm: the hypervisor has one thread
 *
 * Without a protection (each must give an error):
 *   -DWITHOUT_ONESHOT      a report does not mask the port
 *   -DARMED_AT_REARM       the end of the new pair is reported before the port was unmasked
 *   -DTRUSTS_THE_TABLE     rearm gives the pair that the hypervisor believes in, without a look whether it was shut down
 *   -DLOOKS_FIRST          the caller's look comes before the bytes are taken
 *   -DLOOKS_BEFORE_REARM   the caller's look comes before the new pair is there
 *   -DFORGETS_PENDING      unmasking reports only what comes from then on
 *   -DWITHOUT_SHUTDOWN     the hypervisor closes its copies at a death, and a child of the dead has others
 *   -DWITHOUT_REARM        nothing is asked for at a hang-up: the port keeps its dead pair, masked
 */
#define LIVES 2
#define PAIRS 6

bool bytes[PAIRS], shut[PAIRS];
byte current;  /* the hypervisor's pair for the survivor's port */
bool bound;    /* the hypervisor's table */
byte work;     /* in shared memory */
byte ends;     /* hang-ups, by whomever */
bool finished; /* no peer comes any more */
byte mine, seen, learned; /* the survivor's, which has two threads */
bool armed = true, masked;

inline part() { bound = false; current++; assert(current < PAIRS) }

active [2] proctype survivor() {
    bool hung_up;
    do
    :: atomic {
            armed && (bytes[mine] || shut[mine]) ->
            assert(!masked); /* what was read is not read again */
            hung_up = shut[mine];
#ifndef WITHOUT_ONESHOT
            armed = false;
#endif
            masked = true
        };
#ifdef LOOKS_FIRST
        atomic { seen = work; learned = ends };
#endif
        d_step { hung_up = hung_up || (shut[mine] && !bytes[mine]); bytes[mine] = false };
#ifdef LOOKS_BEFORE_REARM
        atomic { seen = work; learned = ends };
#endif
        if
        :: hung_up ->
#ifndef WITHOUT_REARM
            atomic {
#ifndef TRUSTS_THE_TABLE
                if
                :: shut[current] -> part()
                :: else
                fi;
#endif
                mine = current;
                assert(!shut[mine])
            }
#ifdef ARMED_AT_REARM
            armed = true
#endif
#else
            mine = PAIRS - 1 /* nobody sends there */
#endif
        :: else
        fi;
#if !defined(LOOKS_FIRST) && !defined(LOOKS_BEFORE_REARM)
        atomic { seen = work; learned = ends };
#endif
        masked = false;
#ifdef FORGETS_PENDING
        bytes[mine] = false;
#endif
        armed = true
    :: finished && seen == work && learned == ends -> break
    od
}

active proctype peer() {
    byte life = 0, far, sent;
    bool tells;
    do
    :: life < LIVES ->
        atomic { !bound -> bound = true; far = current };
        sent = 0;
        tells = true;
        do
        :: sent < 2 -> work++; bytes[far] = true; sent++
        :: work++; tells = false; break /* it dies before it notifies: its death tells */
        :: break
        od;
        if
        :: life == LIVES - 1 && tells -> break
        :: atomic { shut[far] = true; ends++ } /* its own doing; the survivor may rearm before it dies */
        :: skip
        fi;
        atomic { /* the hypervisor sees its end */
            if
            :: bound && far == current ->
                if
                :: !shut[far] -> ends++
                :: else
                fi;
#ifndef WITHOUT_SHUTDOWN
                shut[far] = true;
#endif
                part()
            :: else /* the ports have parted already */
            fi
        };
        life++
    :: else -> break
    od;
    finished = true
}
