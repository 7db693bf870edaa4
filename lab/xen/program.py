"""What a program does with a real Xen, through the same classes as everywhere: a page that dom0 grants to itself."""

import usermm

with usermm.Domain(backend="xen") as domain:
    with domain.gntalloc.allocate(domain.domid, 1, writable=True) as page:
        with memoryview(page) as view:
            view[:5] = b"hello"
        with domain.gntdev.map(domain.domid, page.references, writable=True) as mapped, memoryview(mapped) as view:
            print("mapped:", bytes(view[:5]))
            view[:5] = b"olleh"
        with memoryview(page) as view:
            print("granted:", bytes(view[:5]))
    port = domain.evtchn.bind_unbound_port(domain.domid)
    other = domain.evtchn.bind_interdomain(domain.domid, port)
    domain.evtchn.unmask(*domain.evtchn.read(timeout=5))  # a binding starts pending
    domain.evtchn.notify(other)
    print("event:", domain.evtchn.read(timeout=5) == [port])
