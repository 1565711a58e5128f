//! A VM that is operated through its control socket while Linux runs in it.

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Value, json};

use crate::control::Control;
use crate::disk::{Image, Kind, Maker};
use crate::error::{Context, Result};
use crate::guest::{Guest, seed};
use crate::suite::{Bench, Case};

const MIB: u64 = 1 << 20;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("operate::resize", resize),
        Case::new("operate::pause", pause),
        Case::new("operate::cache_type", cache_type),
    ]
}

fn operated(bench: &Bench) -> (Guest<'_>, Control) {
    let socket = bench.scratch("control");
    let control = Control::new(&socket);
    (Guest::new(bench).option("--control", socket), control)
}

/// Linux takes over a new size at once, and uses what it has gained.
fn resize(bench: &Bench) -> Result<()> {
    let kinds = [
        ("vda", Kind::ExternalRaw, Maker::QemuImg),
        ("vdb", Kind::Internal, Maker::QemuImg),
        ("vdc", Kind::Packed, Maker::TandemImg),
    ];
    let (guest, control) = operated(bench);
    let mut guest = guest.cpus(4);
    let mut images = Vec::new();
    for (disk, kind, maker) in kinds {
        let image = Image::create(bench, disk, kind, maker, "", "8M")?;
        guest = guest.disk(&image.path, "");
        images.push(image);
    }
    let grow = |step: &str, _: &mut _| {
        assert_eq!(step, "grow");
        for (disk, _, _) in kinds {
            let request = json!({"command": "resize", "disk": disk, "size": 12 * MIB});
            let answer = control.ask(&request)?;
            assert_eq!(answer, json!({"size": 12 * MIB}), "{disk}");
        }
        Ok(())
    };
    let boot = guest
        .steps(
            r#"
            for disk in vda vdb vdc; do
                echo "@ before-$disk $(cat /sys/block/$disk/size)"
                dd if=/seed of=/dev/$disk bs=1M seek=7 conv=fsync 2>/dev/null
                ! dd if=/seed of=/dev/$disk bs=1M seek=8 conv=fsync 2>/dev/null
            done
            step grow
            for disk in vda vdb vdc; do
                # The interrupt's work may still be queued.
                until [ $(cat /sys/block/$disk/size) = 24576 ]; do sleep 0.1; done
                dd if=/dev/$disk bs=1M skip=8 2>/dev/null | cmp -n $((4 << 20)) - /dev/zero
                dd if=/seed of=/dev/$disk bs=1M seek=11 conv=fsync 2>/dev/null
                echo "@ sha256-$disk $(sha256sum </dev/$disk | cut -d' ' -f1)"
            done
            "#,
            grow,
        )?
        .succeeded();
    let mut expected = vec![0; 12 * MIB as usize];
    for at in [7, 11] {
        expected[at << 20..][..1 << 20].copy_from_slice(&seed());
    }
    for ((disk, kind, _), image) in kinds.into_iter().zip(images) {
        assert_eq!(boot.value(&format!("before-{disk}")), "16384");
        image.check()?;
        image.assert_sha256(kind, boot.value(&format!("sha256-{disk}")))?;
        let found = fs::read(image.convert()?).context("reading the disk")?;
        assert!(found == expected, "{disk} holds something else outside");
    }
    Ok(())
}

/// While a VM is paused its disks stand still: what is flushed then can be copied. It goes on as if
/// nothing had been.
fn pause(bench: &Bench) -> Result<()> {
    let image = Image::new(bench, "disk", Kind::Internal, "16M")?;
    let copy = Image::new(bench, "copy", Kind::Internal, "16M")?;
    let (guest, control) = operated(bench);
    let act = |step: &str, _: &mut _| {
        assert_eq!(step, "writing");
        let state = |value: Value| value["state"].clone();
        assert_eq!(state(control.command("pause")?), "paused");
        let before = control.counters(0)?;
        control.command("flush")?;
        fs::copy(&image.path, &copy.path).context("copying the image")?;
        sleep(Duration::from_millis(300));
        assert_eq!(
            control.counters(0)?,
            before,
            "a paused guest's disk has worked"
        );
        assert_eq!(state(control.command("status")?), "paused");
        copy.check()?;
        assert_eq!(state(control.command("resume")?), "running");
        Ok(())
    };
    let boot = guest
        .cpus(4)
        .disk(&image.path, "")
        .steps(
            r#"
            # Four writers, each with a MiB of its own in every four.
            for part in 0 1 2 3; do
                (
                    i=$part
                    while [ $i -lt 16 ]; do
                        dd if=/seed of=/dev/vda bs=64k seek=$((i * 16)) oflag=direct 2>/dev/null
                        i=$((i + 4))
                    done
                ) &
                writers="$writers $!"
            done
            step writing
            for writer in $writers; do wait $writer; done
            sync
            echo "@ sha256 $(sha256sum </dev/vda | cut -d' ' -f1)"
            "#,
            act,
        )?
        .succeeded();
    image.check()?;
    image.assert_sha256(Kind::Internal, boot.value("sha256"))?;
    let expected = seed().repeat(16);
    let read = |image: &Image<'_>| -> Result<Vec<u8>> {
        fs::read(image.convert()?).context("reading a disk")
    };
    assert!(
        read(&image)? == expected,
        "the disk is not as it was written"
    );
    let copied = read(&copy)?;
    let sectors = copied.chunks(512).zip(expected.chunks(512));
    for (number, (found, written)) in sectors.enumerate() {
        assert!(
            found == written || found.iter().all(|byte| *byte == 0),
            "sector {number} of the copy is neither new nor old"
        );
    }
    Ok(())
}

/// Linux switches between write-back and write-through, and sends flushes where they are needed.
fn cache_type(bench: &Bench) -> Result<()> {
    let image = Image::create(bench, "disk", Kind::Packed, Maker::TandemImg, "", "8M")?;
    let fixed: PathBuf = bench.scratch("fixed");
    fs::File::create(&fixed)
        .and_then(|file| file.set_len(MIB))
        .context("making a raw disk")?;
    let (guest, control) = operated(bench);
    let mut flushes = Vec::new();
    let boot = guest
        .disk(&image.path, "")
        .disk(&fixed, ",format=raw,cache=directsync")
        .steps(
            r#"
            cd /sys/block/vda
            work() {
                echo "@ type $(cat cache_type), $(cat queue/write_cache)"
                step before
                for i in 1 2 3 4 5; do
                    dd if=/seed of=/dev/vda bs=4k seek=$((256 * i + $1)) count=9 conv=fsync 2>/dev/null
                done
                step after
            }
            work 0
            echo "write through" >cache_type
            work 16
            echo "write back" >cache_type
            work 32
            echo "@ fixed $(cat /sys/block/vdb/cache_type)"
            ! echo "write back" 2>/dev/null >/sys/block/vdb/cache_type
            echo "@ fixed $(cat /sys/block/vdb/cache_type)"
            echo "@ sha256 $(sha256sum </dev/vda | cut -d' ' -f1)"
            "#,
            |_, _| {
                flushes.push(control.counters(0)?["flushes"].as_u64());
                Ok(())
            },
        )?
        .succeeded();
    let types: Vec<_> = boot.values("type").collect();
    let write_back = "write back, write back";
    let write_through = "write through, write through";
    assert_eq!(types, [write_back, write_through, write_back]);
    let fixed: Vec<_> = boot.values("fixed").collect();
    assert_eq!(fixed, ["write through"; 2]);
    let flushes: Option<Vec<u64>> = flushes.into_iter().collect();
    let flushes = flushes.unwrap_or_default();
    let [a, b, c, d, e, f] = flushes[..] else {
        panic!("counts of flushes: {flushes:?}");
    };
    assert!(b - a >= 5 && d == c && f - e >= 5, "flushes: {flushes:?}");
    image.check()?;
    image.assert_sha256(Kind::Packed, boot.value("sha256"))
}
