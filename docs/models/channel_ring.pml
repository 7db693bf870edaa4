/*
 * A channel's slots: no wake-up is lost, no slot is used again while its receiver holds it, and nobody sleeps for ever
 * when the other side dies.
 *
 * Steps and the code they stand for:
 *   sender    MessageSlot.take, MessageSlot.send; Sleeper.until: _want, look again, _sleep
 *   receiver  MessageReceiver.next, Message.release; the same Sleeper
 *   killer    the hypervisor's hang-up of the port of a side that died, at any moment
 * Stores are seen in order: the code has a fence between what it stores and what it asks (`um_end_wake`, `_want`).
 *
 * Without a protection (each must give an error):
 *   -DLOOKS_FIRST    says that it sleeps after it looked for the last time
 *   -DASKS_FIRST     asks whether the other side sleeps before it stores
 *   -DREUSES_TAKEN   a slot is free once it was taken, not once it was given back
 *   -DWITHOUT_HANG_UP  a death is no event
 */
#define MESSAGES 3

byte sent, taken, returned; /* one slot: free when returned == sent */
bool receiver_sleeps, sender_sleeps;
bool to_receiver, to_sender; /* events */
bool receiver_dead, holding;

inline wake_receiver() { if :: receiver_sleeps -> to_receiver = true :: else fi }
inline wake_sender() { if :: sender_sleeps -> to_sender = true :: else fi }

#ifdef WITHOUT_HANG_UP
#define HUNG_UP false
#else
#define HUNG_UP receiver_dead
#endif

inline await_event() { if :: to_sender -> to_sender = false :: HUNG_UP fi }

#ifdef REUSES_TAKEN
#define FREE (taken == sent)
#else
#define FREE (returned == sent)
#endif

active proctype sender() {
    bool asks;
    do
    :: sent == MESSAGES -> break
    :: else ->
        if
        :: FREE -> skip
        :: else ->
#ifdef LOOKS_FIRST
            if :: FREE -> skip :: else -> sender_sleeps = true; await_event() fi;
#else
            sender_sleeps = true;
            if :: FREE -> skip :: else -> await_event() fi;
#endif
            sender_sleeps = false
        fi;
        if
        :: receiver_dead -> break
        :: !receiver_dead && FREE ->
            assert(!holding || receiver_dead);
#ifdef ASKS_FIRST
            asks = receiver_sleeps;
            sent++;
            if :: asks -> to_receiver = true :: else fi
#else
            sent++;
            wake_receiver()
#endif
        :: else
        fi
    od
}

active proctype receiver() {
    do
    :: receiver_dead -> break
    :: !receiver_dead && taken == MESSAGES -> break
    :: else ->
        if
        :: taken != sent -> skip
        :: else ->
            receiver_sleeps = true;
            if
            :: taken != sent -> skip
            :: else -> if :: to_receiver -> to_receiver = false :: receiver_dead fi
            fi;
            receiver_sleeps = false
        fi;
        if
        :: !receiver_dead && taken != sent ->
            holding = true;
            taken++;
            holding = receiver_dead;
            if
            :: atomic { !receiver_dead -> returned++ };
                wake_sender()
            :: receiver_dead
            fi
        :: else
        fi
    od
}

active proctype killer() {
    if
    :: receiver_dead = true
    :: skip
    fi
}
