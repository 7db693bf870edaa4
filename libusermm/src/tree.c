#include "tree.h"

#include <stdbool.h>
#include <stddef.h>

/* The priority is derived, not stored: a bijective mix of the serial (the finaliser of splitmix64), so no two are
 * equal. */
static uint64_t priority(const struct um_node *node) {
    uint64_t x = node->serial + 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static bool before(const struct um_node *a, const struct um_node *b) {
    return a->key != b->key ? a->key < b->key : a->serial > b->serial;
}

static void update(struct um_node *node) {
    uint64_t largest = node->end;
    if (node->left && node->left->max_end > largest)
        largest = node->left->max_end;
    if (node->right && node->right->max_end > largest)
        largest = node->right->max_end;
    node->max_end = largest;
}

/* Everything before `pivot` goes to *ret_left, the rest to *ret_right. Depth is logarithmic: treaps are shallow. */
static void split(struct um_node *tree, const struct um_node *pivot, struct um_node **ret_left,
                  struct um_node **ret_right) {
    if (!tree) {
        *ret_left = *ret_right = NULL;
    } else if (before(tree, pivot)) {
        split(tree->right, pivot, &tree->right, ret_right);
        *ret_left = tree;
        update(tree);
    } else {
        split(tree->left, pivot, ret_left, &tree->left);
        *ret_right = tree;
        update(tree);
    }
}

static struct um_node *merge(struct um_node *left, struct um_node *right) {
    if (!left || !right)
        return left ? left : right;
    if (priority(left) > priority(right)) {
        left->right = merge(left->right, right);
        update(left);
        return left;
    }
    right->left = merge(left, right->left);
    update(right);
    return right;
}

void um_tree_insert(struct um_node **root, struct um_node *node) {
    uint64_t mine = priority(node);
    struct um_node **link = root;
    while (*link && priority(*link) > mine) {
        if ((*link)->max_end < node->end)
            (*link)->max_end = node->end;
        link = before(node, *link) ? &(*link)->left : &(*link)->right;
    }
    split(*link, node, &node->left, &node->right);
    update(node);
    *link = node;
}

void um_tree_remove(struct um_node **root, struct um_node *node) {
    struct um_node *here = *root;
    if (here == node) {
        *root = merge(node->left, node->right);
        return;
    }
    um_tree_remove(before(node, here) ? &here->left : &here->right, node);
    update(here);
}

struct um_node *um_tree_find(struct um_node *root, uint64_t key) {
    while (root && root->key != key)
        root = key < root->key ? root->left : root->right;
    return root;
}

void um_tree_visit(struct um_node *root, uint64_t start, uint64_t end,
                   void (*visit)(struct um_node *node, void *context), void *context) {
    if (!root || root->max_end <= start)
        return;
    um_tree_visit(root->left, start, end, visit, context);
    if (root->key >= end)
        return;
    if (root->end > start)
        visit(root, context);
    um_tree_visit(root->right, start, end, visit, context);
}

bool um_tree_overlaps(const struct um_node *root, uint64_t start, uint64_t end) {
    if (!root || root->max_end <= start)
        return false;
    if (root->key < end && root->end > start)
        return true;
    return um_tree_overlaps(root->left, start, end) || (root->key < end && um_tree_overlaps(root->right, start, end));
}
