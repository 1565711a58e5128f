//! A small Linux on a disk: what the demo boots, and the tour of the README.

use crate::error::Result;
use crate::lab::Lab;
use crate::tree::Tree;

/// The `/sbin/init` of its root file system.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
echo "booted" >>/boots
boots=$(grep -c booted /boots)
echo "Linux $(uname -r) wrote this in boot number $boots." >/hello

echo
echo "  This is Linux $(uname -r) on $(grep -c ^processor /proc/cpuinfo) CPU(s), boot number $boots from this disk."
echo
echo "  disk      size    mounted on"
for disk in /sys/block/vd*; do
    name=${disk##*/}
    mount=$(grep "^/dev/$name " /proc/mounts | head -n 1 | cut -d' ' -f2,3)
    echo "  /dev/$name  $(($(cat $disk/size) / 2048)) MiB  $mount"
done
echo
echo "  \$ cat /hello"
sed 's/^/  /' /hello
echo
if grep -qw demo.shell /proc/cmdline; then
    echo "  A shell in the guest; Ctrl-D or exit powers it off."
    setsid cttyhack sh
fi
sync
mount -o remount,ro /
poweroff -f
"#;

/// Bytes of the disk.
pub const SIZE: u64 = 64 << 20;

/// Its root file system, for a guest with the initrd of [`root_initrd`](crate::guest::root_initrd).
pub fn root(lab: &Lab) -> Result<Tree> {
    let mut root = Tree::default();
    root.busybox(lab)?.script("/sbin/init", INIT);
    Ok(root)
}
