/* A preloaded library whose constructor can run before ours did. */
#include "once.h"

__attribute__((constructor)) static void early(void) {
    use_it_once();
    (void)!write(1, "ok\n", 3);
}
