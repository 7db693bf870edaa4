# Two more guests of the same kernel and files, whose consoles have the tests' agents; sourced by init in dom0.
# Says where they are in USERMM_XEN_GUESTS.
tools=/usr/lib/xen-4.17/bin
mkdir -p /dev/pts /etc/xen /run/xen /run/xenstored /var/lib/xen /var/lib/xenstored /var/lock /var/log/xen
ln -sfn /run /var/run
mount -t devpts devpts /dev/pts
echo 'autoballoon="off"' >/etc/xen/xl.conf
$tools/xenstored
$tools/xen-init-dom0
$tools/xenconsoled
(cd / && find bin boot init guests.sh lib lib64 modules site usermm usr | cpio -o -H newc >/guest.cpio) 2>/dev/null
for guest in 1 2; do
    printf '%s\n' "name='guest$guest'" "type='pv'" "kernel='/boot/vmlinuz'" "ramdisk='/guest.cpio'" "memory=640" \
        "extra='console=hvc0 quiet loglevel=0 panic=-1 usermm_agent'" "on_crash='destroy'" >/guest.cfg
    $tools/xl create /guest.cfg || return
done
rm /guest.cpio
for guest in 1 2; do
    domid=$($tools/xl domid guest$guest)
    USERMM_XEN_GUESTS=${USERMM_XEN_GUESTS:+$USERMM_XEN_GUESTS,}$domid:$(xenstore-read /local/domain/$domid/console/tty)
done
export USERMM_XEN_GUESTS
