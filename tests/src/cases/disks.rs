//! Disks as the guest sees them: order, size, serial number, read-only, raw, root.

use std::fs;

use crate::disk::{Image, Kind, sha256};
use crate::error::{Context, Result};
use crate::guest::{Guest, seed};
use crate::suite::{Bench, Case};
use crate::tree::Tree;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("disks::root", root),
        Case::new("disks::two", two),
        Case::new("disks::readonly", readonly),
        Case::new("disks::raw", raw),
        Case::new("disks::cache_modes", cache_modes),
        Case::new("disks::data_file_elsewhere", data_file_elsewhere),
    ]
}

/// Two disks of different kinds, in the order of the command line, written at the same time.
fn two(bench: &Bench) -> Result<()> {
    let first = Image::new(bench, "first.qcow2", Kind::Internal, "24M")?;
    let second = Image::new(bench, "second.qcow2", Kind::ExternalRaw, "16M")?;
    let boot = Guest::new(bench)
        .cpus(2)
        .disk(&first.path, ",serial=first-disk")
        .disk(&second.path, ",serial=12345678901234567890")
        .boot(
            r#"
            for disk in vda vdb; do
                echo "@ $disk $(cat /sys/block/$disk/size) $(cat /sys/block/$disk/serial)"
                (
                    /bin/mke2fs -q -t ext4 /dev/$disk
                    mkdir /tmp/$disk
                    mount -t ext4 /dev/$disk /tmp/$disk
                    for i in 1 2 3 4; do cat /seed >/tmp/$disk/$i; done
                    umount /tmp/$disk
                ) &
                writers="$writers $!"
            done
            for writer in $writers; do wait $writer; done
            for disk in vda vdb; do
                echo "@ sha256-$disk $(sha256sum </dev/$disk | cut -d' ' -f1)"
            done
            "#,
        )?
        .succeeded();
    assert_eq!(
        boot.value("vda"),
        format!("{} first-disk", (24 << 20) / 512)
    );
    assert_eq!(
        boot.value("vdb"),
        format!("{} 12345678901234567890", (16 << 20) / 512)
    );
    for (image, kind, key) in [
        (first, Kind::Internal, "sha256-vda"),
        (second, Kind::ExternalRaw, "sha256-vdb"),
    ] {
        image.check()?;
        image.assert_sha256(kind, boot.value(key))?;
    }
    Ok(())
}

/// The guest reads a `readonly=on` disk and cannot change it; the files stay as they were.
fn readonly(bench: &Bench) -> Result<()> {
    let image = Image::new(bench, "disk.qcow2", Kind::External, "8M")?;
    let seed_file = bench.scratch("seed");
    fs::write(&seed_file, seed()).context("writing the seed")?;
    bench.run(
        bench
            .tool("qemu-io")
            .args(["-f", "qcow2", "-c"])
            .arg(format!("write -q -s {} 64k 1M", seed_file.display()))
            .arg(&image.path),
    )?;
    let files = || {
        let data_file = image.data_file.as_ref().expect("an external data file");
        Ok((sha256(&image.path)?, sha256(data_file)?))
    };
    let before = files()?;
    Guest::new(bench)
        .disk(&image.path, ",readonly=on")
        .boot(
            r#"
            [ $(cat /sys/block/vda/ro) = 1 ]
            dd if=/dev/vda bs=64k skip=1 count=16 2>/dev/null | cmp - /seed
            ! dd if=/seed of=/dev/vda bs=4096 count=1 conv=fsync
            "#,
        )?
        .succeeded();
    assert_eq!(files()?, before, "the files of a read-only disk changed");
    Ok(())
}

/// `format=raw`: the file is the disk.
fn raw(bench: &Bench) -> Result<()> {
    let path = bench.scratch("disk.raw");
    fs::File::create(&path)
        .and_then(|file| file.set_len(8 << 20))
        .context("making a raw disk")?;
    let boot = Guest::new(bench)
        .disk(&path, ",format=raw")
        .boot(
            r#"
            dd if=/seed of=/dev/vda bs=4096 seek=33 conv=fsync 2>/dev/null
            printf 'QFI\373' | dd of=/dev/vda conv=fsync 2>/dev/null
            echo "@ sha256 $(sha256sum </dev/vda | cut -d' ' -f1)"
            "#,
        )?
        .succeeded();
    assert_eq!(sha256(&path)?, boot.value("sha256"));
    assert_eq!(
        fs::metadata(&path).context("reading the size")?.len(),
        8 << 20
    );
    let bytes = fs::read(&path).context("reading the raw disk")?;
    let seed = seed();
    assert!(
        bytes[33 * 4096..].starts_with(&seed),
        "the data is not at its place"
    );
    // The guest has made its disk look like a qcow2 image, which must not change what it is.
    Guest::new(bench)
        .disk(&path, ",format=raw")
        .boot("dd if=/dev/vda bs=4096 skip=33 count=256 2>/dev/null | cmp - /seed")?
        .succeeded();
    Ok(())
}

/// The guest is told whether its writes need a flush, and finds what it has written, file system and
/// all.
fn cache_modes(bench: &Bench) -> Result<()> {
    let modes = [
        ("none", "write back", Kind::ExternalRaw),
        ("directsync", "write through", Kind::Internal),
        ("writethrough", "write through", Kind::External),
        ("unsafe", "write back", Kind::Internal),
    ];
    let mut images = Vec::new();
    let mut guest = Guest::new(bench);
    for (mode, _, kind) in modes {
        let name = format!("{mode}.qcow2");
        let image = Image::new(bench, &name, kind, "16M")?;
        guest = guest.disk(&image.path, &format!(",cache={mode}"));
        images.push(image);
    }
    let boot = guest
        .boot(
            r#"
            for disk in vda vdb vdc vdd; do
                echo "@ cache-$disk $(cat /sys/block/$disk/queue/write_cache)"
                /bin/mke2fs -q -t ext4 -b 1024 /dev/$disk
                mkdir /tmp/$disk
                mount -t ext4 /dev/$disk /tmp/$disk
                for i in 1 2 3; do cat /seed >/tmp/$disk/$i; sync; done
                rm /tmp/$disk/2
                umount /tmp/$disk
                dd if=/seed of=/dev/$disk bs=512 seek=20001 count=77 conv=fsync 2>/dev/null
                echo "@ sha256-$disk $(sha256sum </dev/$disk | cut -d' ' -f1)"
            done
            "#,
        )?
        .succeeded();
    for ((disk, image), (mode, cache, kind)) in
        ["vda", "vdb", "vdc", "vdd"].iter().zip(images).zip(modes)
    {
        assert_eq!(boot.value(&format!("cache-{disk}")), cache, "{mode}");
        image.check()?;
        image.assert_sha256(kind, boot.value(&format!("sha256-{disk}")))?;
    }
    Ok(())
}

/// A data file outside the image's directory is used only when `data-file=` says so.
fn data_file_elsewhere(bench: &Bench) -> Result<()> {
    let image = Image::new(bench, "disk.qcow2", Kind::External, "8M")?;
    fs::create_dir(bench.scratch("image")).context("making a directory")?;
    let moved = bench.scratch("image/disk.qcow2");
    fs::rename(&image.path, &moved).context("moving the image")?;
    let data_file = image.data_file.as_ref().expect("an external data file");

    let before = sha256(data_file)?;
    let refused = Guest::new(bench).disk(&moved, "").boot("")?;
    assert_eq!(refused.status().code(), Some(1));
    let message = refused.output();
    let name = data_file.file_name().unwrap_or_default().to_string_lossy();
    for word in [&*name, "data-file="] {
        assert!(message.contains(word), "{message:?} lacks {word}");
    }
    assert_eq!(sha256(data_file)?, before, "the data file changed");

    let boot = Guest::new(bench)
        .disk(&moved, &format!(",data-file={}", data_file.display()))
        .boot(
            r#"
            dd if=/seed of=/dev/vda bs=4k seek=5 conv=fsync 2>/dev/null
            echo "@ sha256 $(sha256sum </dev/vda | cut -d' ' -f1)"
            "#,
        )?
        .succeeded();
    fs::rename(&moved, &image.path).context("moving the image back")?;
    image.check()?;
    image.assert_sha256(Kind::External, boot.value("sha256"))
}

/// An image with a root file system, which counts how often it has been booted.
pub fn root_image(bench: &Bench) -> Result<Image<'_>> {
    let mut tree = Tree::default();
    tree.busybox(bench.lab())?.script(
        "/sbin/init",
        "#!/bin/sh\nmount -t proc proc /proc\n\
         echo \"@ root $(grep ' / ' /proc/mounts | grep -v rootfs | cut -d' ' -f1,3)\"\n\
         echo boot >>/boots\necho \"@ boots $(grep -c boot /boots)\"\n\
         sync\nmount -o remount,ro /\npoweroff -f\n",
    );
    let raw = bench.scratch("root.img");
    tree.ext4(&raw, 24 << 20)?;
    let image = Image::new(bench, "root.qcow2", Kind::ExternalRaw, "24M")?;
    bench.run(
        bench
            .tool("qemu-img")
            .args(["convert", "-n", "-f", "raw", "-O", "qcow2"])
            .args([&raw, &image.path]),
    )?;
    Ok(image)
}

/// The guest's root file system is on the disk.
fn root(bench: &Bench) -> Result<()> {
    let image = root_image(bench)?;
    for expected in ["1", "2"] {
        let boot = Guest::new(bench)
            .cmdline("root=/dev/vda")
            .disk(&image.path, "")
            .boot(
                r#"
            root=$(sed 's/.*root=\([^ ]*\).*/\1/' /proc/cmdline)
            mount -t ext4 $root /mnt
            mount --move /dev /mnt/dev
            touch /switch_root
            "#,
            )?;
        assert!(boot.status().success(), "{}", boot.status());
        assert_eq!(boot.value("root"), "/dev/vda ext4");
        assert_eq!(boot.value("boots"), expected);
        image.check()?;
    }
    Ok(())
}
