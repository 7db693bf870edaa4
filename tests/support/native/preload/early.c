/* Before main: a constructor that runs before all others, and one of usual priority. After it: a destructor, atexit. */
#include "once.h"

static int done;

__attribute__((constructor(101))) static void very_early(void) {
    use_it_once();
    done++;
}

__attribute__((constructor)) static void early(void) {
    use_it_once();
    done++;
}

__attribute__((destructor)) static void late(void) {
    use_it_once();
    (void)!write(1, "ok\n", 3);
}

int main(void) {
    expect(done == 2);
    use_it_once();
    atexit(use_it_once);
    return 0;
}
