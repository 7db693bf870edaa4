/* An interval tree: a treap ordered by (key, newest first), each node knowing the largest end below it. */
#ifndef UM_TREE_H
#define UM_TREE_H

#include <stdbool.h>
#include <stdint.h>

/* Intrusive; `serial` is unique in its tree, never 0, and grows with age: a larger serial is newer. */
struct um_node {
    uint64_t key;     /* start of the interval */
    uint64_t end;     /* exclusive; may be at or below key (empty and reversed regions exist) */
    uint64_t max_end; /* largest end in this subtree */
    uint64_t serial;
    struct um_node *left, *right;
};

void um_tree_insert(struct um_node **root, struct um_node *node);
void um_tree_remove(struct um_node **root, struct um_node *node);
struct um_node *um_tree_find(struct um_node *root, uint64_t key);

/* Calls visit for each node with node.key < end and start < node.end, in order. Allocates nothing. */
void um_tree_visit(struct um_node *root, uint64_t start, uint64_t end,
                   void (*visit)(struct um_node *node, void *context), void *context);

/* Whether there is one that um_tree_visit would call for. */
bool um_tree_overlaps(const struct um_node *root, uint64_t start, uint64_t end);

#endif
