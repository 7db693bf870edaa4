/*
 * A device that keeps accounts of what it was given, for races of the cache: it writes a stamp, never used before, into
 * each page that has none, so that a registration is stale exactly if its page has another stamp now than then.
 */
#ifndef STRESS_LEDGER_H
#define STRESS_LEDGER_H

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "stress_memory.h"
#include "usermm_cache.h"

#define MOST_PAGES 16 /* of a registration */
#define RECORDS 65536u
#define COMPLAINTS 10

struct record {
    _Atomic uint64_t handle; /* 0: the record is free */
    uint64_t address, length;
    uint64_t stamps[MOST_PAGES];
};

static struct ledger {
    struct record records[RECORDS];
    _Atomic uint64_t last_handle, last_stamp;
    atomic_long live, live_bytes, violations;
    long max_count, max_bytes;
    void (*during)(uint64_t address, uint64_t length); /* while a registration is being made; or NULL */
} ledger;

static void ledger_require(bool condition, const char *what) {
    if (!condition && atomic_fetch_add(&ledger.violations, 1) < COMPLAINTS)
        fprintf(stderr, "violation: %s\n", what);
}

static struct record *ledger_record(uint64_t handle) {
    return &ledger.records[handle % RECORDS];
}

static struct record *ledger_new(uint64_t *ret_handle) {
    for (;;) {
        uint64_t none = 0, handle = atomic_fetch_add(&ledger.last_handle, 1) + 1;
        *ret_handle = handle;
        if (atomic_compare_exchange_strong(&ledger_record(handle)->handle, &none, handle))
            return ledger_record(handle);
    }
}

/* As a device does: memory that is not there is an error, not a crash. */
static bool ledger_stamp(uint64_t page, uint64_t *ret_stamp) {
    struct iovec here = {ret_stamp, sizeof *ret_stamp}, there = {(void *)(uintptr_t)page, sizeof *ret_stamp};
    if (process_vm_readv(getpid(), &here, 1, &there, 1, 0) != sizeof *ret_stamp)
        return false;
    if (*ret_stamp)
        return true;
    *ret_stamp = atomic_fetch_add(&ledger.last_stamp, 1) + 1;
    return process_vm_writev(getpid(), &here, 1, &there, 1, 0) == sizeof *ret_stamp;
}

static bool ledger_stamp_all(struct record *record) {
    uint64_t first = record->address & ~(PAGE - 1), end = record->address + record->length;
    for (uint64_t page = first; page < end; page += PAGE)
        if (!ledger_stamp(page, &record->stamps[(page - first) / PAGE]))
            return false;
    return true;
}

static int ledger_register(void *context, uint64_t address, uint64_t length, uint64_t *ret_handle) {
    uint64_t handle;
    struct record *record = ledger_new(&handle);
    (void)context;
    record->address = address;
    record->length = length;
    if (!ledger_stamp_all(record)) {
        atomic_store(&record->handle, 0);
        return -EFAULT;
    }
    long count = atomic_fetch_add(&ledger.live, 1) + 1;
    long bytes = atomic_fetch_add(&ledger.live_bytes, (long)length) + (long)length;
    ledger_require(count <= ledger.max_count && bytes <= ledger.max_bytes, "the limits are passed");
    if (ledger.during)
        ledger.during(address, length);
    *ret_handle = handle;
    return 0;
}

static void ledger_deregister(void *context, uint64_t handle) {
    struct record *record = ledger_record(handle);
    uint64_t expected = handle, length = record->length;
    (void)context;
    atomic_fetch_sub(&ledger.live, 1);
    atomic_fetch_sub(&ledger.live_bytes, (long)length);
    ledger_require(atomic_compare_exchange_strong(&record->handle, &expected, 0), "deregistered twice");
}

static void ledger_require_registered(uint64_t handle) {
    ledger_require(atomic_load(&ledger_record(handle)->handle) == handle, "deregistered while it was held");
}

/* Whether the device has other pages than those that are mapped at [address, address + length) now. */
static bool ledger_is_stale(const struct usermm_registration *registration, uint64_t address, uint64_t length) {
    const struct record *record = ledger_record(registration->handle);
    uint64_t end = address + length, base = record->address & ~(PAGE - 1);
    ledger_require_registered(registration->handle);
    ledger_require(record->address == registration->address && record->length == registration->length, "another range");
    ledger_require(record->address <= address && end <= record->address + record->length, "not covered");
    for (uint64_t page = address & ~(PAGE - 1); page < end; page += PAGE)
        if (__atomic_load_n((uint64_t *)(uintptr_t)page, __ATOMIC_RELAXED) != record->stamps[(page - base) / PAGE])
            return true;
    return false;
}

#endif
