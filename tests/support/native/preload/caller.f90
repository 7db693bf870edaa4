! A caller in Fortran: the C library's calls by iso_c_binding, request numbers as signed integers.
program caller
    use, intrinsic :: iso_c_binding
    implicit none

    type, bind(c) :: region
        integer(c_int64_t) :: first, last, cookie
        integer(c_int32_t) :: flags, reserved
    end type

    type, bind(c) :: event
        integer(c_int32_t) :: kind, flags
        integer(c_int64_t) :: first, last, value
    end type

    interface
        integer(c_int) function c_open(path, flags) bind(c, name='open')
            import
            character(kind=c_char), intent(in) :: path(*)
            integer(c_int), value :: flags
        end function
        integer(c_int) function c_ioctl(descriptor, request, argument) bind(c, name='ioctl')
            import
            integer(c_int), value :: descriptor
            integer(c_long), value :: request
            type(c_ptr), value :: argument
        end function
        integer(c_size_t) function c_read(descriptor, buffer, length) bind(c, name='read')
            import
            integer(c_int), value :: descriptor
            type(c_ptr), value :: buffer
            integer(c_size_t), value :: length
        end function
        type(c_ptr) function c_mmap(address, length, protection, flags, descriptor, offset) bind(c, name='mmap')
            import
            type(c_ptr), value :: address
            integer(c_size_t), value :: length
            integer(c_int), value :: protection, flags, descriptor
            integer(c_long), value :: offset
        end function
        integer(c_int) function c_munmap(address, length) bind(c, name='munmap')
            import
            type(c_ptr), value :: address
            integer(c_size_t), value :: length
        end function
        integer(c_int) function c_close(descriptor) bind(c, name='close')
            import
            integer(c_int), value :: descriptor
        end function
    end interface

    integer(c_int) :: device
    integer(c_size_t), parameter :: page_bytes = 4096
    integer(c_int64_t), pointer, volatile :: generation
    type(c_ptr) :: page, shown
    type(region), target :: wanted
    type(event), target :: events(2)
    integer(c_int64_t), target :: cookie = 11

    device = c_open('/dev/ummunotify' // c_null_char, 0_c_int)
    if (device < 0) error stop 'open'
    shown = c_mmap(c_null_ptr, 8_c_size_t, 1_c_int, 1_c_int, device, 0_c_long)
    call c_f_pointer(shown, generation)
    page = c_mmap(c_null_ptr, page_bytes, 3_c_int, 34_c_int, -1_c_int, 0_c_long)
    wanted%first = transfer(page, wanted%first)
    wanted%last = wanted%first + page_bytes
    wanted%cookie = cookie
    if (c_ioctl(device, 1075860738_c_long, c_loc(wanted)) /= 0) error stop 'register'
    if (c_munmap(page, page_bytes) /= 0) error stop 'munmap'
    if (generation /= 1) error stop 'the generation'
    if (c_read(device, c_loc(events), 64_c_size_t) /= 64) error stop 'read'
    if (events(1)%value /= 11 .or. events(2)%kind /= 1 .or. events(2)%value /= 1) error stop 'the events'
    if (c_ioctl(device, 1074287875_c_long, c_loc(cookie)) /= 0) error stop 'unregister'
    if (c_close(device) /= 0) error stop 'close'
    print '(a)', 'ok'
end program
