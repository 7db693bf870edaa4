/*
 * A page of a pool, granted and mapped without the hypervisor: it is never granted again while its grantee has it mapped,
 * however stale the reference is that the grantee maps, and never lost for good; and once the grantee's domain has ended,
 * nothing more is granted from the pool, and nobody is attached to it.
 *
 * The grantor writes the table, the grantee and the hypervisor count mappings in the marks, each in a word of its own. Each
 * exchange and each addition is one step here, as they are in one order for all.
 *
 * Steps and the code they stand for:
 *   grantor     GrantorPool.grant, end, _reclaim
 *   grantee     GranteePool.hold, release; any reference that it was ever told, each as often as it likes. Its domain ends
 *               while it has the page mapped or not, with the process (its marks stay as they are) or without (its
 *               mapping stays, too)
 *   hypervisor  Mapping._hand_out: a mapping of the same page that it hands out itself; Holding.look_at, which finds that
 *               the attached hold is gone; Holding.close_pools_for and Pool.close_for_good
 *
 * Without a protection (each must give an error):
 *   -DLOOKS_FIRST        the grantor looks at the marks before it takes the reference from the table
 *   -DCHECKS_FIRST       the grantee looks at the table before it marks the page
 *   -DTRUSTS_THE_CHECK   the hypervisor counts its mapping after its only look at the table
 *   -DFORGETS_WAITING    a page that was mapped when its reference ended is not looked at again
 *   -DZEROES_FIRST       the hypervisor clears the marks before it closes the pool
 *   -DCLOSES_BY_HOLDS    it closes the pools that the domain still holds, at its end, and not those that it held
 */
#define USES 3

byte table;          /* the reference that the page is granted under; 0: none */
byte use;            /* the last reference: the page holds what was written for it */
byte marks, held;
byte told;           /* the highest reference that others know */
bool closed;         /* the table's last word */
bool ended;

bool lock = true;    /* the kernel's, of the descriptor that the grantee was attached by */
bool closing, gone;  /* what the hypervisor hears: it was closed, the domain has ended */
bool over;           /* the number is free for another domain */

inline end_reference() {
#ifdef LOOKS_FIRST
    mapped = marks > 0 || held > 0;
    table = 0;
#else
    table = 0;
    mapped = marks > 0 || held > 0;
#endif
}

active proctype grantor() {
    bool mapped;
    do
    :: use < USES ->
        if               /* grant looks at the marks, which _reclaim did, and then whether the pool is closed */
        :: closed -> goto out
        :: else
        fi;
        use++;           /* zeros, and a reference of its own */
        table = use;
        told = use;
        end_reference();
#ifdef FORGETS_WAITING
        if
        :: mapped -> goto out
        :: else
        fi
#else
        do               /* _reclaim, as often as somebody wants a page */
        :: mapped ->
            atomic { closed || marks == 0 && held == 0 };
            if
            :: closed -> goto out
            :: else
            fi;
            mapped = marks > 0 || held > 0
        :: !mapped -> break
        od
#endif
    :: use == USES -> break
    od;
out:
    assert(use == USES || closed);
    ended = true
}

active proctype grantee() {
    byte reference;
    do
    :: told > 0 ->
        if
        :: reference = 1
        :: told > 1 -> reference = 2
        :: told > 2 -> reference = 3
        fi;
#ifdef CHECKS_FIRST
        if
        :: table == reference -> marks++
        :: table != reference -> goto again
        fi;
#else
        marks++;
        if
        :: table == reference
        :: table != reference -> marks--; goto again
        fi;
#endif
        /* Mapped: what it sees is what was granted under this reference. */
        assert(use == reference);
        if
        :: goto dies
        :: gone = true; assert(use == reference); assert(use == reference); goto dies
        :: skip
        fi;
        assert(use == reference);
        marks--;
again:
        skip
    :: ended -> break
    :: break
    od;
dies:
    lock = false;
    closing = true;      /* in either order, and either is heard first */
    gone = true
}

active proctype hypervisor() {
    byte reference;
    bool attached = true;
    do
    :: told > 0 && !over ->
        reference = told;
        if
        :: table == reference
        :: table != reference -> goto again
        fi;
        held++;
#ifndef TRUSTS_THE_CHECK
        if
        :: table == reference
        :: table != reference -> held--; goto again
        fi;
#endif
        assert(use == reference);
        assert(use == reference);
        held--;
again:
        skip
    :: closing -> closing = false; attached = attached && lock
    :: gone && !over ->
#ifdef CLOSES_BY_HOLDS
        if
        :: !attached -> skip
        :: else -> closed = true; marks = 0
        fi;
#elif defined(ZEROES_FIRST)
        marks = 0;
        closed = true;
#else
        closed = true;
        marks = 0;
#endif
        over = true
    :: over -> break
    od;
    /* Mapping.map of the next domain with this number: attached, it reads all pages. */
    assert(closed)
}
