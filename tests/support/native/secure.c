/* Says whether the kernel started it in secure-execution mode, and whether that took LD_PRELOAD from it. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/auxv.h>

int main(void) {
    printf("%lu %s\n", getauxval(AT_SECURE), getenv("LD_PRELOAD") ? "kept" : "gone");
    return 0;
}
