//! What Linux makes of the features that the device offers.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::Value;

use crate::control::last_metrics;
use crate::disk::{Image, Kind, Maker};
use crate::error::{Context, Result};
use crate::guest::{Boot, Guest, seed};
use crate::suite::{Bench, Case};

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("features::discard_and_zeroes", discard_and_zeroes),
        Case::new("features::fstrim", fstrim),
        Case::new("features::limits", limits),
    ]
}

/// An image of each kind that a guest can tell apart by what becomes of its requests.
fn one_of_each<'a>(bench: &'a Bench, size: &str) -> Result<Vec<(&'static str, Image<'a>)>> {
    let kinds = [
        ("vda", Kind::ExternalRaw, Maker::QemuImg),
        ("vdb", Kind::Internal, Maker::QemuImg),
        ("vdc", Kind::Packed, Maker::TandemImg),
    ];
    let create = |(disk, kind, maker)| {
        let image = Image::create(bench, disk, kind, maker, "", size)?;
        Ok((disk, image))
    };
    kinds.into_iter().map(create).collect()
}

/// Feature bits that the driver has accepted, and what it has learnt by them.
fn limits(bench: &Bench) -> Result<()> {
    let sizes = ["", "cluster_size=4k,", "cluster_size=2M,"];
    let images = [Kind::ExternalRaw, Kind::Internal, Kind::External]
        .into_iter()
        .zip(sizes)
        .zip(["vda", "vdb", "vdc"])
        .map(|((kind, options), disk)| {
            Image::create(bench, disk, kind, Maker::QemuImg, options, "8M")
        })
        .collect::<Result<Vec<_>>>()?;
    let boot = Guest::new(bench)
        .cpus(4)
        .disk(&images[0].path, ",serial=first")
        .disk(&images[1].path, ",queues=2,cache=writethrough")
        .disk(&images[2].path, ",readonly=on,queues=1")
        .boot(
            r#"
            for disk in vda vdb vdc; do
                cd /sys/block/$disk
                echo "@ $disk-mq $(ls mq | wc -l)"
                for file in size ro serial device/features queue/*; do
                    [ ! -f $file ] || echo "@ $disk-$(basename $file) $(cat $file)"
                done
            done
            "#,
        )?
        .succeeded();
    let told = |disk: &str, name: &str| boot.value(&format!("{disk}-{name}")).to_owned();
    let expect = |disk: &str, expected: &[(&str, u64)]| {
        for (name, value) in expected {
            assert_eq!(told(disk, name), value.to_string(), "{disk}: {name}");
        }
    };
    for (disk, queues, cluster) in [("vda", 4, CLUSTER), ("vdb", 2, 4096), ("vdc", 1, 2 * MIB)] {
        expect(
            disk,
            &[
                ("mq", queues),
                ("size", 8 * MIB / 512),
                ("logical_block_size", 512),
                ("physical_block_size", 4096),
                ("minimum_io_size", 4096),
                ("optimal_io_size", cluster),
                ("max_segments", 254),
            ],
        );
    }
    for (disk, cluster) in [("vda", CLUSTER), ("vdb", 4096)] {
        expect(
            disk,
            &[
                ("ro", 0),
                ("discard_granularity", cluster),
                ("discard_max_bytes", 2 << 30),
                ("max_discard_segments", 32),
                ("write_zeroes_max_bytes", 256 * MIB),
            ],
        );
    }
    let no_writes = [
        ("ro", 1),
        ("discard_max_bytes", 0),
        ("write_zeroes_max_bytes", 0),
    ];
    expect("vdc", &no_writes);
    assert_eq!(told("vda", "serial"), "first");
    assert_eq!(told("vda", "write_cache"), "write back");
    assert_eq!(told("vdb", "write_cache"), "write through");

    // SEG_MAX, GEOMETRY, BLK_SIZE, TOPOLOGY, MQ, and of the ring INDIRECT_DESC, EVENT_IDX, VERSION_1.
    let common = [2, 4, 6, 10, 12, 28, 29, 32];
    let (ro, flush, config_wce, discard, write_zeroes) = (5, 9, 11, 13, 14);
    for (disk, more) in [
        ("vda", &[flush, config_wce, discard, write_zeroes][..]),
        ("vdb", &[discard, write_zeroes]),
        ("vdc", &[ro, flush, config_wce]),
    ] {
        let mut expected: Vec<usize> = [&common[..], more].concat();
        expected.sort_unstable();
        let bits = told(disk, "features");
        let accepted: Vec<_> = bits.match_indices('1').map(|(bit, _)| bit).collect();
        assert_eq!(accepted, expected, "{disk}: {bits}");
    }
    images.iter().try_for_each(Image::check)
}

/// Fills three disks, and then discards and zeroes parts of them in every way that there is.
const DISCARD_AND_ZERO: &str = r#"
for disk in vda vdb vdc; do
    (
        i=0
        while [ $i -lt 12 ]; do
            cat /seed
            i=$((i + 1))
        done >/dev/$disk
        sync /dev/$disk
        /bin/blkdiscard -o 4M -l 2M /dev/$disk
        # The smallest part that the disk says it can release.
        unit=$(cat /sys/block/$disk/queue/discard_granularity)
        /bin/blkdiscard -o $((7 * 1048576 + unit)) -l $unit /dev/$disk
        # BLKZEROOUT and FALLOC_FL_ZERO_RANGE keep the space, FALLOC_FL_PUNCH_HOLE releases it.
        /bin/blkdiscard -z -o 8M -l 1M /dev/$disk
        /bin/fallocate -z -o $((9 * 1048576 + 512)) -l 70K /dev/$disk
        /bin/fallocate -p -o 10M -l 1M /dev/$disk
    ) &
    workers="$workers $!"
done
for worker in $workers; do wait $worker; done
echo 3 >/proc/sys/vm/drop_caches
for disk in vda vdb vdc; do
    echo "@ unit-$disk $(cat /sys/block/$disk/queue/discard_granularity)"
    echo "@ sha256-$disk $(sha256sum </dev/$disk | cut -d' ' -f1)"
done
"#;

/// What is discarded or zeroed reads as zero, and its space is released outside where the guest has
/// asked for that, and nowhere else.
fn discard_and_zeroes(bench: &Bench) -> Result<()> {
    let disks = one_of_each(bench, "12M")?;
    let metrics = bench.scratch("metrics");
    let mut guest = Guest::new(bench).cpus(4).option("--metrics", &metrics);
    for (_, image) in &disks {
        guest = guest.disk(&image.path, "");
    }
    let boot = guest.boot(DISCARD_AND_ZERO)?.succeeded();
    for (index, (disk, image)) in disks.iter().enumerate() {
        image.check()?;
        let unit: u64 = number(&boot, &format!("unit-{disk}"));
        let released = [
            4 * MIB..6 * MIB,
            7 * MIB + unit..7 * MIB + 2 * unit,
            10 * MIB..11 * MIB,
        ];
        let zeroed = [8 * MIB..9 * MIB, 9 * MIB + 512..9 * MIB + 512 + (70 << 10)];
        let mut expected = seed().repeat(12);
        for range in released.iter().chain(&zeroed) {
            expected[range.start as usize..range.end as usize].fill(0);
        }
        let found = fs::read(image.convert()?).context("reading the disk")?;
        assert!(found == expected, "{disk} holds something else outside");
        image.assert_sha256(image.kind(), boot.value(&format!("sha256-{disk}")))?;

        let kept = 12 * MIB - released.iter().map(|r| r.end - r.start).sum::<u64>();
        let file = image.data_file.as_ref().unwrap_or(&image.path);
        let allocated = fs::metadata(file).context("looking at a file")?.blocks() * 512;
        // Beside the data there are at most the tables of a small image and of the file system.
        let tables = if image.kind() == Kind::Internal {
            6 * CLUSTER
        } else {
            unit - 1
        };
        assert!(
            (kept..=kept + tables).contains(&allocated),
            "{disk}: {allocated} bytes are allocated for {kept} bytes of data"
        );
        if image.kind() != Kind::ExternalRaw {
            assert_mapped(image, &released, false)?;
            assert_mapped(image, &zeroed[..1], true)?;
        }

        let total = &last_metrics(&metrics)?["disks"][index]["total"];
        for (counter, at_least) in [("discards", 2), ("zeroes", 3), ("writes", 12)] {
            let count = total[counter].as_u64();
            assert!(count >= Some(at_least), "{disk}: {counter}: {total}");
        }
        assert_eq!(total["failed"], 0, "{disk}");
        assert_eq!(total["written_bytes"].as_u64(), Some(12 * MIB), "{disk}");
    }
    Ok(())
}

/// All of `ranges` reads as zero by its mapping, and has a place in the file or has none.
fn assert_mapped(
    image: &Image<'_>,
    ranges: &[std::ops::Range<u64>],
    has_place: bool,
) -> Result<()> {
    let map = image.map()?;
    let entries = map.as_array().map(Vec::as_slice).unwrap_or_default();
    let number = |entry: &Value, key: &str| entry[key].as_u64().unwrap_or_default();
    for range in ranges {
        let within: Vec<_> = entries
            .iter()
            .filter(|entry| {
                let start = number(entry, "start");
                start < range.end && start + number(entry, "length") > range.start
            })
            .collect();
        assert!(!within.is_empty(), "{range:?} is not in {map}");
        for entry in within {
            assert!(
                entry["zero"] == true
                    && entry["data"] == false
                    && entry.get("offset").is_some() == has_place,
                "{range:?} is mapped as {entry}"
            );
        }
    }
    Ok(())
}

fn number(boot: &Boot, key: &str) -> u64 {
    let value = boot.value(key);
    value.parse().unwrap_or_else(|_| panic!("{key}: {value}"))
}

/// `fstrim` releases what files had that are gone.
fn fstrim(bench: &Bench) -> Result<()> {
    let disks = one_of_each(bench, "24M")?;
    let mut guest = Guest::new(bench).cpus(4);
    for (_, image) in &disks {
        guest = guest.disk(&image.path, "");
    }
    let boot = guest
        .boot(
            r#"
            for disk in vda vdb vdc; do
                (
                    /bin/mke2fs -q -t ext4 -b 4096 -E nodiscard /dev/$disk
                    mkdir /tmp/$disk
                    mount -t ext4 /dev/$disk /tmp/$disk
                    for i in 1 2 3 4 5 6 7 8 9 10 11 12; do cat /seed >/tmp/$disk/$i; done
                    sync
                    rm /tmp/$disk/[2-9] /tmp/$disk/10
                    sync
                    fstrim /tmp/$disk
                    cmp /tmp/$disk/1 /seed
                    umount /tmp/$disk
                    echo "@ sha256-$disk $(sha256sum </dev/$disk | cut -d' ' -f1)"
                ) &
                workers="$workers $!"
            done
            for worker in $workers; do wait $worker; done
            "#,
        )?
        .succeeded();
    for (disk, image) in &disks {
        image.check()?;
        image.assert_sha256(image.kind(), boot.value(&format!("sha256-{disk}")))?;
        let file = image.data_file.as_ref().unwrap_or(&image.path);
        let allocated = fs::metadata(file).context("looking at a file")?.blocks() * 512;
        // Three files are left, and the journal of 4 MiB.
        assert!(
            (3 * MIB..9 * MIB).contains(&allocated),
            "{disk}: {allocated} bytes are allocated"
        );
    }
    Ok(())
}
