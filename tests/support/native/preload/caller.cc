// A caller in C++: from a static object's constructor, a thread, and while an exception is on its way.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <fstream>
#include <stdexcept>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

struct region {
    std::uint64_t start, end, cookie;
    std::uint32_t flags, reserved;
};

struct event {
    std::uint32_t type, flags;
    std::uint64_t start, end, value;
};

static void check(bool condition, const char *what) {
    if (!condition)
        throw std::runtime_error(what);
}

class Device {
  public:
    Device() : descriptor(open("/dev/ummunotify", O_RDONLY | O_NONBLOCK)) {
        check(descriptor >= 0, "open");
        void *page = mmap(nullptr, 8, PROT_READ, MAP_SHARED, descriptor, 0);
        check(page != MAP_FAILED, "mmap");
        generation = static_cast<const volatile std::uint64_t *>(page);
    }
    ~Device() {
        close(descriptor);
    }
    void use() {
        const std::uint64_t before = *generation;
        void *page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        const auto start = reinterpret_cast<std::uint64_t>(page);
        region wanted = {start, start + 4096, 7, 0, 0};
        std::vector<event> events(2);
        std::uint64_t cookie = 7;
        check(ioctl(descriptor, 0x40205502ul, &wanted) == 0, "register");
        check(munmap(page, 4096) == 0 && *generation > before, "the generation"); // other threads get the address, too
        check(read(descriptor, events.data(), 64) == 64 && events[0].value == 7, "the event");
        check(ioctl(descriptor, 0x40085503ul, &cookie) == 0, "unregister");
    }

  private:
    int descriptor;
    const volatile std::uint64_t *generation;
};

static Device global;

struct UsesItWhenItEnds {
    ~UsesItWhenItEnds() {
        global.use();
    }
};

int main() {
    global.use();
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++)
        threads.emplace_back([] {
            for (int j = 0; j < 100; j++)
                Device().use();
        });
    for (auto &thread : threads)
        thread.join();
    try {
        UsesItWhenItEnds one;
        throw std::runtime_error("on its way");
    } catch (const std::runtime_error &) {
    }
    std::ifstream stream("/dev/null");
    check(stream.good(), "another file");
    std::puts("ok");
    return 0;
}
