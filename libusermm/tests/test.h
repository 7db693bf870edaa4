/*
 * A small harness. Each test starts and ends with no device, no thread and no descriptor of ours; a test that an
 * injected fault makes impossible is abandoned at the call that reported it, which is success: no crash, no miss, no
 * leak.
 */
#ifndef TEST_H
#define TEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "usermm.h"

#define PAGE 4096ul

#define CHECK(condition) test_check((condition), #condition, __FILE__, __LINE__)
/* A call that returns a negative errno on failure; its result otherwise. */
#define CALL(expression) test_call((expression), #expression, __FILE__, __LINE__)
#define TEST(name) {#name, name}

/* Both sanitizers' run times may hold their own locks in a forked child and then hang when it starts a thread. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
__attribute__((unused)) static const bool test_children_can_start_threads = false;
#else
__attribute__((unused)) static const bool test_children_can_start_threads = true;
#endif

struct test {
    const char *name;
    void (*run)(void);
};

int test_main(const struct test *tests, size_t count);
void test_check(bool condition, const char *text, const char *file, int line);
long test_call(long result, const char *text, const char *file, int line);

/* Both are released after the test. */
usermm_device *test_open(int abi, int flags);
char *test_map(size_t pages);

/* Runs after the test, before what it opened and mapped is released. */
void test_at_end(void (*clean)(void));
/* Whether an injected fault has struck, so that something may be left undone. */
bool test_fault_fired(void);

void test_register(usermm_device *device, void *start, size_t bytes, uint64_t cookie);
uint64_t test_generation(usermm_device *device);
/* Reads up to `capacity` events; 0 when there is none. */
size_t test_read(usermm_device *device, struct usermm_event *events, size_t capacity);

#endif
