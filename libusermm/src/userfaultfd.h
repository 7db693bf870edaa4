#ifndef UM_USERFAULTFD_H
#define UM_USERFAULTFD_H

/* A userfaultfd with all features that this kernel has and the monitor wants. -EPERM, -ENOSYS, -EMFILE, ... */
int um_userfaultfd_open(int *ret_fd);

/* The one for gate.c: a page of shared memory that is not there makes its reader wait, wherever it was moved to. */
int um_userfaultfd_open_gate(int *ret_fd);

#endif
