// A caller in Go with cgo: threads of Go's own scheduler, its own memory management by raw system calls, and C's calls.
package main

/*
#include <fcntl.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

struct event {
    uint32_t type, flags;
    uint64_t start, end, value;
};

static int open_it(void) {
    return open("/dev/ummunotify", O_RDONLY | O_NONBLOCK);
}

// 0, or the number of the step that was wrong.
static int use_it(int device) {
    struct {
        uint64_t start, end, cookie;
        uint32_t flags, reserved;
    } region;
    struct event events[2];
    uint64_t cookie = 3;
    volatile uint64_t *generation = mmap(0, 8, PROT_READ, MAP_SHARED, device, 0);
    char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (generation == MAP_FAILED || page == MAP_FAILED)
        return 1;
    uint64_t before = *generation;
    region.start = (uintptr_t)page;
    region.end = region.start + 4096;
    region.cookie = cookie;
    if (ioctl(device, 0x40205502ul, &region) != 0)
        return 2;
    if (munmap(page, 4096) != 0 || *generation <= before) // by more where other threads were given the address
        return 3;
    if (read(device, events, sizeof events) != 64 || events[0].value != 3)
        return 4;
    if (ioctl(device, 0x40085503ul, &cookie) != 0)
        return 5;
    munmap((void *)generation, 8);
    return 0;
}
*/
import "C"

import (
	"fmt"
	"os"
	"runtime"
	"sync"
)

func use(times int) {
	device := C.open_it()
	if device < 0 {
		fmt.Println("open failed")
		os.Exit(1)
	}
	for i := 0; i < times; i++ {
		if step := C.use_it(device); step != 0 {
			fmt.Println("wrong at step", step)
			os.Exit(1)
		}
		_ = make([]byte, 1<<20)
		if i%20 == 0 {
			runtime.GC()
		}
	}
	C.close(device)
}

func main() {
	var group sync.WaitGroup
	for i := 0; i < 8; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			use(100)
		}()
	}
	group.Wait()
	fmt.Println("ok")
}
