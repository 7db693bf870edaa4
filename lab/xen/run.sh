#!/bin/sh
# Boots the lab in the folder $1 under QEMU and prints what it says; status 0 when the list and the program passed.
set -u
lab=$1
arguments="console=hvc0 quiet panic=-1 ${2:+usermm_tests=$2}" # QEMU cuts -initrd at commas
timeout "${LAB_SECONDS:-900}" qemu-system-x86_64 -accel tcg -cpu Westmere -smp 1 -m 3584 \
    -nodefaults -no-user-config -display none -no-reboot -serial stdio \
    -kernel "$lab/xen.elf" -append "dom0_mem=1792M,max:1792M com1=115200,8n1 console=com1 loglvl=warning" \
    -initrd "$lab/vmlinuz $arguments,$lab/initramfs.cpio.gz" </dev/null | tee "$lab/log"
# QEMU's own status is 0 after a panic, too.
for part in "the program" "the list in one domain" "the list in three domains"; do
    grep -aq "usermm-lab: $part ended with status 0" "$lab/log" || exit 1
done
