#ifndef UM_MEMORY_H
#define UM_MEMORY_H

/* After fork: another thread may have been inside um_memory_alloc (sys.h). */
void um_memory_in_child(void);

#endif
