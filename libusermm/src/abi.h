/* The requests of both versions, told apart from the numbers and layouts that carry them. */
#ifndef UM_ABI_H
#define UM_ABI_H

#include <stdbool.h>
#include <stdint.h>

enum um_request_kind {
    UM_REQUEST_UNKNOWN,
    UM_REQUEST_FAULTS, /* known, with an argument that cannot be read */
    UM_REQUEST_EXCHANGE,
    UM_REQUEST_REGISTER,
    UM_REQUEST_UNREGISTER,
};

struct um_request {
    uint64_t start, end, cookie; /* UNREGISTER has the cookie only, EXCHANGE nothing */
    bool is_known_version;
};

enum um_request_kind um_abi_parse(int abi, unsigned long request, void *argument, struct um_request *ret_request);

#endif
