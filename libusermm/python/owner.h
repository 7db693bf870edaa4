/* What is done when an object dies whose memory goes with it. */
#ifndef UM_OWNER_H
#define UM_OWNER_H

#include "cache.h"

/*
 * For a weak reference to `object`: a callback that gives its registration up before the memory is unmapped, so that
 * nobody has to wait for the monitor. NULL: it is not worth it, or not known to own its memory; with an exception only
 * for Ctrl-C in code of the object's own.
 */
PyObject *um_owner_new(struct um_python_cache *cache, PyObject *object, struct usermm_registration *registered);

extern PyType_Spec um_owner_spec;

#endif
