/* The kernel's interface as far as it is used here, for building with headers older than the running kernel. */
#ifndef UM_KERNEL_H
#define UM_KERNEL_H

#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1 /* 5.11: faults in user mode only, allowed to everybody */
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00) /* 6.1: on /dev/userfaultfd */
#endif
#define UM_FEATURE_WP_HUGETLBFS_SHMEM (1ull << 12) /* 5.19 */
#define UM_FEATURE_WP_ASYNC (1ull << 15)           /* 6.7: file mappings can be watched too */

/* 6.11: one mapping of a process, asked on /proc/PID/maps. */
struct um_procmap_query {
    uint64_t size, query_flags, query_addr;
    uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
    uint64_t vma_name_addr, build_id_addr;
};
#define UM_PROCMAP_QUERY _IOWR('f', 17, struct um_procmap_query)
#define UM_PROCMAP_COVERING_OR_NEXT 0x10u

#endif
