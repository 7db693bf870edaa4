/* The interval tree against a plain list. */
#include <stdlib.h>
#include <string.h>

#include "../src/tree.h"
#include "test.h"

#define NODES 400

static struct um_node nodes[NODES];
static bool present[NODES];

static unsigned random_below(unsigned limit) {
    return (unsigned)rand() % limit;
}

struct seen {
    unsigned count;
    const struct um_node *last;
};

static void visit(struct um_node *node, void *context) {
    struct seen *seen = context;
    CHECK(present[node - nodes]);
    if (seen->last)
        CHECK(seen->last->key < node->key || (seen->last->key == node->key && seen->last->serial > node->serial));
    seen->last = node;
    seen->count++;
}

static void compare(struct um_node *root) {
    uint64_t start = random_below(120), end = start + random_below(20);
    struct seen seen = {0};
    unsigned expected = 0;
    um_tree_visit(root, start, end, visit, &seen);
    for (unsigned i = 0; i < NODES; i++)
        expected += present[i] && nodes[i].key < end && start < nodes[i].end;
    CHECK(seen.count == expected);
}

/* Empty and reversed intervals included: their end is at or below their start. */
static void agrees_with_a_list(void) {
    struct um_node *root = NULL;
    uint64_t serial = 0;
    memset(present, 0, sizeof present);
    for (unsigned step = 0; step < 200000; step++) {
        unsigned i = random_below(NODES);
        if (present[i]) {
            um_tree_remove(&root, &nodes[i]);
        } else {
            uint64_t start = random_below(100);
            nodes[i] = (struct um_node){.key = start, .end = start + random_below(20) - 5, .serial = ++serial};
            if (start < 5)
                nodes[i].end = start + 1;
            um_tree_insert(&root, &nodes[i]);
        }
        present[i] = !present[i];
        compare(root);
    }
}

static unsigned depth(const struct um_node *node) {
    if (!node)
        return 0;
    unsigned left = depth(node->left), right = depth(node->right);
    return 1 + (left > right ? left : right);
}

/* Keys in order are the worst case of an unbalanced tree. */
static void stays_shallow(void) {
    enum { MANY = 1 << 17 };
    struct um_node *many = calloc(MANY, sizeof *many), *root = NULL;
    for (unsigned i = 0; i < MANY; i++) {
        many[i] = (struct um_node){.key = i, .end = i + 1, .serial = i + 1};
        um_tree_insert(&root, &many[i]);
    }
    CHECK(depth(root) < 64);
    CHECK(um_tree_find(root, 77777) == &many[77777]);
    CHECK(um_tree_find(root, MANY) == NULL);
    free(many);
}

int main(void) {
    static const struct test tests[] = {TEST(agrees_with_a_list), TEST(stays_shallow)};
    return test_main(tests, sizeof tests / sizeof *tests);
}
