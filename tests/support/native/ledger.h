/*
 * What devices were given, and how to tell whether that still is what is mapped there. For each page of a registration
 * one word is kept: for blocks a stamp, which the device writes into each page that has none; for arrays the number of
 * the page's frame, which cannot change or come back while the page is pinned. Everything runs with the interpreter's
 * lock held.
 */
#ifndef LEDGER_H
#define LEDGER_H

#include <Python.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <unistd.h>

#define PAGE 4096ul
#define RECORDS 65536u
#define COMPARED 16 /* pages of a look-up, at most; beyond that a random part of it */
#define FRAME_MASK (UINT64_C(1) << 63 | ((UINT64_C(1) << 55) - 1)) /* of /proc/self/pagemap: present, and where */

/* As the Python half sees it (soak_library.Account). */
struct account {
    uint64_t max_bytes, max_count;
    uint64_t live, live_bytes, most_bytes;
    uint64_t looks, stale;
};

struct record {
    uint64_t handle; /* 0: free */
    uint64_t address, length;
    struct account *account;
    pid_t process;
    uint64_t *words;
};

static struct record records[RECORDS];
static uint64_t last_handle, last_stamp, violations;
static char first_violation[256];
static struct account blocks_account, arrays_account;
static pid_t process;
static int pagemap = -1;

static void require(bool condition, const char *what, uint64_t handle) {
    if (condition)
        return;
    if (violations++ == 0)
        snprintf(first_violation, sizeof first_violation, "%s (handle %llu)", what, (unsigned long long)handle);
}

static uint32_t below(uint32_t limit) {
    static uint32_t random = 0x9e3779b9u;
    random ^= random << 13;
    random ^= random >> 17;
    random ^= random << 5;
    return random % limit;
}

static uint64_t pages_of(uint64_t address, uint64_t length) {
    return (address + length + PAGE - 1) / PAGE - address / PAGE;
}

static void read_words(const struct account *account, uint64_t first_page, uint64_t count, uint64_t *ret_words) {
    if (account == &blocks_account) {
        for (uint64_t i = 0; i < count; i++)
            ret_words[i] = *(volatile uint64_t *)(uintptr_t)((first_page + i) * PAGE);
        return;
    }
    ssize_t size = pread(pagemap, ret_words, count * sizeof *ret_words, (off_t)(first_page * sizeof *ret_words));
    for (uint64_t i = 0; i < count; i++)
        ret_words[i] = size == (ssize_t)(count * sizeof *ret_words) ? ret_words[i] & FRAME_MASK : 0;
}

static void stamp(uint64_t first_page, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) {
        volatile uint64_t *word = (volatile uint64_t *)(uintptr_t)((first_page + i) * PAGE);
        if (*word == 0)
            *word = ++last_stamp;
    }
}

/* For arrays: after they were pinned. */
static uint64_t note(struct account *account, uint64_t address, uint64_t length) {
    uint64_t count = pages_of(address, length);
    struct record *record;
    do
        record = &records[++last_handle % RECORDS];
    while (record->handle);
    *record = (struct record){last_handle, address, length, account, process, calloc(count, sizeof(uint64_t))};
    if (account == &blocks_account)
        stamp(address / PAGE, count);
    read_words(account, address / PAGE, count, record->words);
    account->live++;
    account->live_bytes += length;
    if (account->live_bytes > account->most_bytes)
        account->most_bytes = account->live_bytes;
    require(account->live <= account->max_count, "more registrations than max_count", record->handle);
    require(account->live_bytes <= account->max_bytes, "more bytes than max_bytes", record->handle);
    return record->handle;
}

static struct record *find(uint64_t handle) {
    struct record *record = &records[handle % RECORDS];
    return record->handle == handle ? record : NULL;
}

static void forget(uint64_t handle) {
    struct record *record = find(handle);
    require(record != NULL, "deregistered twice", handle);
    if (!record)
        return;
    require(record->process == process, "a child deregistered what is its parent's", handle);
    record->account->live--;
    record->account->live_bytes -= record->length;
    free(record->words);
    *record = (struct record){0};
}

static bool is_stale(const struct record *record, uint64_t address, uint64_t length) {
    uint64_t words[COMPARED], first = address / PAGE, count = pages_of(address, length);
    if (count > COMPARED) {
        first += below((uint32_t)(count - COMPARED + 1));
        count = COMPARED;
    }
    read_words(record->account, first, count, words);
    for (uint64_t i = 0; i < count; i++)
        if (words[i] != record->words[first - record->address / PAGE + i])
            return true;
    return false;
}

/* One answer for [address, address + length); whether it was stale. */
static bool judge(struct account *account, uint64_t handle, uint64_t address, uint64_t length) {
    const struct record *record = find(handle);
    account->looks++;
    require(record != NULL, "an answer that is not registered", handle);
    if (!record)
        return false;
    require(record->process == process, "a child was given what is its parent's", handle);
    bool covers = record->address <= address && address + length <= record->address + record->length;
    require(covers, "an answer that does not cover what was asked for", handle);
    bool stale = covers && is_stale(record, address, length);
    account->stale += stale;
    return stale;
}

#endif
