/*
 * The gate. Clients load the generation from a mapped page, with no call of ours in between, so a load that comes while
 * the monitor has read a message and not applied it yet has to wait inside the load itself.
 *
 * Before the monitor reads, it takes the page out of the file (MADV_REMOVE): it leaves every mapping with it, wherever
 * clients moved or unmapped theirs. A load then faults, and the second userfaultfd (MISSING mode) keeps it waiting.
 * Once the messages are applied, UFFDIO_COPY puts a filled page back in one step. No client's address is used anywhere:
 * at an address that was unmapped behind us there may be other memory.
 *
 * The file's second page has the same content, is what UFFDIO_COPY copies from, and is never taken out: forked children
 * map it, since nothing would keep their loads from filling the hole with zeros (um_page_inherit).
 */
#define _GNU_SOURCE
#include "gate.h"

#include <errno.h>
#include <sys/mman.h>

#include "copy.h"
#include "kernel.h"
#include "monitor.h"
#include "sys.h"

#define MESSAGES_PER_READ 16
/* All that mmap(2) gives out unasked on x86-64: the kernel refuses ranges that begin below vm.mmap_min_addr or end
 * above the last page. Where mappings can be elsewhere um_gate_attend finds who waits. */
#define LOWEST_ADDRESS (UINT64_C(1) << 16)
#define HIGHEST_ADDRESS ((UINT64_C(1) << 47) - 4096)

static _Atomic uint64_t *copy_of(const usermm_device *device) {
    return (_Atomic uint64_t *)((char *)device->page + um_page_size());
}

int um_gate_guard(void *address) {
    struct uffdio_register request = {
        .range = {(uintptr_t)address, um_page_size()},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    return um_sys_ioctl(um_monitor.gate_fd, UFFDIO_REGISTER, &request) ? -errno : 0;
}

/* Memory that is locked (mlockall) has to be unlocked first; that it is read again after each change is no loss. */
static int take_out(void *page) {
    if (um_fault("madvise"))
        return -ENOMEM;
    if (madvise(page, um_page_size(), MADV_REMOVE) == 0)
        return 0;
    return errno != EINVAL || munlock(page, um_page_size()) || madvise(page, um_page_size(), MADV_REMOVE) ? -errno : 0;
}

int um_gate_shut(void) {
#ifndef USERMM_WITHOUT_GATE
    for (usermm_device *device = um_monitor.devices; device; device = device->next) {
        if (!device->page)
            continue;
        int result = take_out((void *)device->page);
        if (result)
            return result;
        device->gate_shut = true;
    }
#else
    (void)take_out;
#endif
    return 0;
}

static void wake(uint64_t start, uint64_t length) {
    struct uffdio_range range = {start, length};
    ioctl(um_monitor.gate_fd, UFFDIO_WAKE, &range);
}

/*
 * Waits until somebody frees memory if there is none: loads must neither go on nor see an empty page. When the gate
 * cannot be had any more the page is filled all the same, but not by a store, which would wait if a copy of its
 * descriptor lives on somewhere: the kernel's own access fails then. 0 or -errno: loads are not exact any more.
 */
static int fill(usermm_device *device) {
    struct uffdio_copy copy = {
        .dst = (uintptr_t)device->page,
        .src = (uintptr_t)copy_of(device),
        .len = um_page_size(),
        .mode = UFFDIO_COPY_MODE_DONTWAKE,
    };
    int number = 0;
    device->gate_shut = false;
    for (unsigned attempt = 0; um_sys_ioctl(um_monitor.gate_fd, UFFDIO_COPY, &copy); attempt++) {
        number = errno;
        if (number != EAGAIN && number != ENOMEM)
            break;
        um_gate_attend(); /* EAGAIN: a mapping of the page is being moved, and its thread waits to be heard */
        um_backoff(attempt);
        number = 0;
    }
    if (number)
        um_copy_word_out((uint64_t *)device->page, atomic_load(copy_of(device)));
    return number == EEXIST ? 0 : -number; /* EEXIST: somebody touched it who is not guarded */
}

/* Every waiting load, wherever it is: their addresses are not known, and one call for all is cheaper than to ask. */
static void wake_all(void) {
    wake(LOWEST_ADDRESS, HIGHEST_ADDRESS - LOWEST_ADDRESS);
}

int um_gate_open(void) {
    int result = 0;
    bool any = false;
    for (usermm_device *device = um_monitor.devices; device; device = device->next) {
        if (!device->gate_shut)
            continue;
        int failed = fill(device);
        if (result == 0)
            result = failed;
        any = true;
    }
    if (any)
        wake_all();
    return result;
}

void um_gate_open_device(usermm_device *device) {
    if (!device->gate_shut)
        return;
    fill(device);
    wake_all();
}

void um_gate_show(usermm_device *device, uint64_t generation) {
    if (!device->page)
        return;
    atomic_store(copy_of(device), generation);
    if (!device->gate_shut)
        atomic_store(device->page, generation);
}

/* Reading a stranger's file would take its data. */
static bool is_ours(void) {
    struct uffdio_range nothing = {0, 0};
    return ioctl(um_monitor.gate_fd, UFFDIO_WAKE, &nothing) && errno == EINVAL;
}

int um_gate_attend(void) {
    struct uffd_msg messages[MESSAGES_PER_READ];
    if (!is_ours())
        return -EBADF;
    ssize_t size = um_sys_read(um_monitor.gate_fd, messages, sizeof messages);
    for (ssize_t i = 0; i < size / (ssize_t)sizeof *messages; i++)
        if (messages[i].event == UFFD_EVENT_PAGEFAULT)
            wake(messages[i].arg.pagefault.address & ~(uint64_t)(um_page_size() - 1), um_page_size());
    return 0;
}
