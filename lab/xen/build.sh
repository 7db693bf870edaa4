#!/bin/sh
# Makes what run.sh boots, in the folder $1: Xen, a kernel, and an initramfs with Python, pytest, usermm and its tests.
# Nothing is installed: packages are only unpacked. Needs Debian 12 on x86-64, busybox-static and cpio.
set -eu
lab=$1
usermm=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$lab/packages" "$lab/kernel" "$lab/xen" "$lab/root"
cd "$lab"

kernel=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
python="python3.11-minimal libpython3.11-minimal libpython3.11-stdlib"
libraries="libc6 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libuuid1 libstdc++6 libgcc-s1"
tools="xen-utils-4.17 libxenmisc4.17 libxencall1 libxenevtchn1 libxenforeignmemory1 libxengnttab1 libxenstore4 xenstore-utils
    libxentoollog1 libxentoolcore1 libxendevicemodel1 libxenhypfs1 libyajl2 libzstd1"
(cd packages && for package in $kernel xen-hypervisor-4.17-amd64 $python $libraries $tools; do
    ls "$package"_* >/dev/null 2>&1 || apt-get download -q "$package"
done)
dpkg -x packages/linux-image-*.deb kernel
dpkg -x packages/xen-hypervisor-*.deb xen
for package in $python $libraries $tools; do
    dpkg -x packages/"$package"_*.deb root
done
cp kernel/boot/vmlinuz-* vmlinuz
gunzip -c xen/boot/xen-4.17-amd64.gz > xen.elf # QEMU wants it unpacked

# The machine has no disk and no network: all that is needed is in memory.
mkdir -p root/bin root/boot root/dev root/proc root/sys root/tmp root/modules root/site root/usermm
rm -rf root/usr/share root/usr/include
cp "$(command -v busybox)" root/bin/busybox
cp vmlinuz root/boot/
for module in xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs; do
    find kernel/lib/modules -name "$module.ko" -exec cp {} root/modules/ \;
done
pip=${PIP:-$usermm/.venv/bin/pip}
"$pip" install -q --disable-pip-version-check --upgrade --target root/site --python-version 3.11 --only-binary=:all: \
    pytest pytest-timeout numpy
cp -r "$usermm/src" "$usermm/tests" "$usermm/pyproject.toml" root/usermm/
cp "$usermm/lab/xen/init" "$usermm/lab/xen/guests.sh" "$usermm/lab/xen/program.py" root/
chmod 755 root/init
(cd root && find . -name __pycache__ -prune -o -print | cpio --quiet -o -H newc | gzip -1) > initramfs.cpio.gz
