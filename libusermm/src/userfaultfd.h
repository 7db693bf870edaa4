#ifndef UM_USERFAULTFD_H
#define UM_USERFAULTFD_H

/* A userfaultfd with all features that this kernel has and the monitor wants. -EPERM, -ENOSYS, -EMFILE, ... */
int um_userfaultfd_open(int *ret_fd);

#endif
