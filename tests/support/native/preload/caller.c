/* For sanitizers and other preloads: the device's use among allocations, in threads. */
#include <pthread.h>

#include "once.h"

static void *work(void *unused) {
    for (int i = 0; i < 50; i++) {
        char *blocks[20];
        for (int j = 0; j < 20; j++)
            must((blocks[j] = malloc(1000 << (j % 12))) != NULL, "malloc");
        use_it_once();
        for (int j = 0; j < 20; j++)
            free(blocks[j]);
    }
    return unused;
}

int main(void) {
    pthread_t threads[3];
    for (int i = 0; i < 3; i++)
        must(pthread_create(&threads[i], NULL, work, NULL) == 0, "pthread_create");
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    puts("ok");
    return 0;
}
