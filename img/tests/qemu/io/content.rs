//! Reading, writing and all that changes a disk: equal output, and equal disks afterwards.

use super::{same, same_disk};
use crate::run::{Both, Place, len};

/// Cases for any image that can be written; `disk` has 4 MiB.
const CASES: &str = "
    disk :: write 0 512 :: read -v 0 33 :: read -P 0xcd 0 512 :: read -P 0 512 512
    disk :: write -P 7 10k 5k :: read -P 7 10k 5k :: map :: alloc 0 64k
    disk :: w -P 0x10 1M 3000 :: r -P 16 1M 3000 :: r -v 0xffff0 48
    disk :: write -P 010 65000 1000 :: read -P 8 65000 1000 :: read -P 9 65000 1000
    disk :: write -q -P 5 4095k 1k :: read -q -v 4095k 1k :: read -P 5 4095k 1k
    disk :: read -P 5 -s 10 -l 20 4095k 1k :: read -P 5 -s 10 4094k 2k :: read -P 5 -l 5 4094k 1k
    disk :: write -f -P 1 128k 64k :: flush :: f :: read -P 1 128k 64k
    disk :: write -p -P 1 192k 1 :: read -p -P 1 192k 1 :: read -r 0 1 :: write -r 0 1
    disk :: writev -P 3 300k 512 1k 3 :: readv -P 3 300k 1 514 1k :: readv -v 300k 16 16 7
    disk :: writev 400k 0 1k :: readv -P 205 400k 1k 0 :: writev -q -f 401k 1k
    disk :: aio_write -P 9 500k 1k 512 :: aio_flush :: aio_read -P 9 500k 1536 :: aio_flush
    disk :: aio_read -P 8 500k 512 :: aio_flush :: aio_read -v 500k 20 :: aio_flush
    disk :: aio_write -q 600k 4k :: aio_flush :: aio_read -q -P 205 600k 4k :: aio_flush
    disk :: aio_write -z 600k 1k :: aio_flush :: read -P 0 600k 1k :: read -P 205 601k 3k
    disk :: aio_write -z -u 576k 64k :: aio_flush :: map :: read -P 0 576k 64k
    disk :: aio_write -i 0 1 :: aio_read -i 0 1 :: aio_write -z -P 1 0 1 :: aio_flush
    disk :: write -z 0 1000 :: read -P 0 0 1000 :: write 10k 200k :: write -z 10k 200k
    disk :: read -P 0 10k 200k :: map :: alloc 0 64k :: write 0 512k :: write -z 1k 1k :: map
    disk :: write -z -u 128k 128k :: read -P 0 128k 128k :: map :: alloc 128k 128k
    disk :: write 0 4M :: write -zuq 0 4M :: map :: alloc 0 4M :: read -P 0 0 4M
    disk :: write -P 2 0 512k :: discard 64k 64k :: read -P 2 0 64k :: map
    disk :: d 100 1000 :: discard -q 0 1k :: read -P 2 1k 63k :: alloc 0 1M
    disk :: discard 100k 300k :: map :: discard 0 4M :: map
    disk :: write -P 6 1M 1M :: discard 1100k 10 :: read -P 6 1M 1M :: length :: l
    disk :: read 0 0 :: write 0 0 :: discard 0 0 :: write -z 0 0 :: readv 0 0 :: writev 0 0
    disk :: read 4M 0 :: read -v 0 0 :: aio_read 0 0 :: aio_flush :: alloc 0 0
    -t writeback disk :: write -P 11 2M 100k :: flush :: read -P 11 2M 100k
    -t none disk :: write -P 12 2M 4k :: read -P 12 2M 4k :: read -P 11 2052k 96k
    -n disk :: write -P 13 2050k 1000 :: read -P 13 2050k 1000
    -n -m disk :: write -P 14 2051k 1000 :: read -P 14 2051k 1000 :: writev 2M 512 512
    -t directsync disk :: write -P 15 3M 4k :: write -z 3073k 1k :: read -P 0 3073k 1k
    -t unsafe disk :: write -P 16 3M 4k :: flush :: read -P 16 3M 4k
    -t writethrough disk :: write -P 17 3100k 4k :: discard 3M 64k
    -m disk :: write -P 18 3M 3 :: read -v 3M 20
    -d ignore disk :: write -P 19 3M 64k :: discard 3M 64k :: read -P 19 3M 64k :: map
    -d off disk :: write -z -u 3M 64k :: map :: read -P 0 3M 64k
    -d unmap disk :: write -P 20 3M 64k :: discard 3M 64k :: map
    -d on disk :: write -P 20 3M 64k :: write -zu 3M 32k :: read -P 20 3104k 32k
    -s disk :: write -P 21 0 1M :: read -P 21 0 1M :: map :: discard 0 64k :: read -P 0 0 64k
    -s disk :: read -P 21 0 1M :: truncate 5M :: length
    -s -r disk :: read 0 64k :: write 0 1 :: map
    disk :: write -s source 1M 3000 :: read -v 1M 40 :: write -s source 1029k 5 :: read -v 1029k 8
    disk :: write -z -n 2M 64k :: read -P 0 2M 64k :: write -z -n -u 3M 64k :: map
    disk :: truncate 6M :: length :: read -P 0 4M 2M :: write -P 22 5M 70k :: map
    disk :: truncate 5M :: truncate 7M :: length :: read -P 0 5M 2M :: t 6M :: l
    disk :: truncate -m off 5M :: length :: truncate 5M :: truncate 4M
    disk :: truncate -m metadata 5M :: length :: map :: truncate 4M :: truncate -m falloc 4608k :: truncate 4M
    disk :: write -P 23 4M 1 :: write -P 23 4095k 1025 :: read 4M 1 :: discard 4M 512
    disk :: open disk :: close :: close :: length
    disk :: close :: open disk :: write -P 24 77k 1 :: c :: o disk :: read -P 24 77k 1
    disk :: write -P 25 3M 4k :: reopen -r :: write 3M 4k :: reopen -w :: write -P 26 3M 2k
    disk :: reopen -c writeback :: write -P 27 3080k 2k :: reopen :: reopen -c none :: read 3M 8k
    disk :: reopen -o cache.direct=on :: write -P 28 3M 1k :: reopen -o read-only=off
";

/// Files that a case may need.
fn source(place: &Place) {
    std::fs::write(place.path("source"), "0123456789 abcdefg").unwrap();
}

/// Runs all cases on the disk that `prepare` makes; `format` is told to the programs. Without `syncs`
/// nothing is synced, unless the case has another cache mode.
fn on(format: &str, syncs: bool, prepare: impl Fn(&Place) + Sync) -> Both {
    let both = Both::new(|place| {
        source(place);
        prepare(place);
    });
    for (i, case) in CASES.lines().enumerate() {
        let case = case.trim();
        if case.is_empty() {
            continue;
        }
        let case = case.replace("open disk", &format!("open -o driver={format} disk"));
        let case = case.replace("o disk", &format!("o -o driver={format} disk"));
        let cache = if syncs { "" } else { "-t unsafe" };
        same(&both, &format!("{cache} -f {format} {case}"));
        if i % 8 == 0 {
            same_disk(&both, format, "disk");
        }
    }
    same_disk(&both, format, "disk");
    both
}

#[test]
fn raw() {
    let both = on("raw", true, |place| place.make("create -q -f raw disk 4M"));
    both.same_bytes("disk");
}

#[test]
fn qcow2() {
    on("qcow2", true, |place| {
        place.make("create -q -f qcow2 disk 4M")
    });
}

#[test]
fn small_clusters_with_a_backing_file() {
    on("qcow2", false, |place| {
        place.make("create -q -f raw base 3M");
        std::fs::write(place.path("base"), vec![0x33; 3 << 20]).unwrap();
        place.make("create -q -f qcow2 -o cluster_size=4k -b base -F raw disk 4M");
    });
}

#[test]
fn subclusters() {
    on("qcow2", false, |place| {
        place.make("create -q -f qcow2 -o extended_l2=on,cluster_size=64k disk 4M");
    });
}

#[test]
fn a_data_file() {
    let both = on("qcow2", false, |place| {
        place.make("create -q -f qcow2 -o data_file=data disk 4M");
    });
    assert_eq!(len(&both.tandem, "data"), len(&both.qemu, "data"));
}

#[test]
fn version_2() {
    let both = Both::new(|place| {
        place.make("create -q -f qcow2 -o compat=0.10 disk 4M");
        place.make("create -q -f qcow2 -o compat=0.10 -b disk -F qcow2 top 4M");
    });
    same(
        &both,
        "
        disk :: write -P 1 0 200k :: map :: write -z 64k 64k :: read -P 0 64k 64k
        disk :: write -z -n 0 64k :: write -z -u 0 64k :: info
        top :: write -P 2 100k 100k :: discard 100k 100k :: read -P 2 100k 100k :: map
        top :: write -z -u 128k 64k :: read -P 0 128k 64k :: write -z -n -u 0 64k
        ",
    );
    same_disk(&both, "qcow2", "disk");
    same_disk(&both, "qcow2", "top");
}

/// A raw data file is the disk: Tandem maps all of it from the start.
#[test]
fn a_raw_data_file() {
    let both = Both::new(|place| {
        place.make("create -q -f qcow2 -o data_file=data,data_file_raw=on disk 4M");
    });
    same(
        &both,
        "
        disk :: write -P 1 10k 100k :: read -P 1 10k 100k :: writev -P 2 1M 1k 2k
        disk :: write -z 20k 1k :: write -z -u 64k 16k :: read -P 0 64k 16k :: flush
        disk :: discard 1M 64k :: read -P 0 1M 64k :: aio_write -P 3 2M 1k :: aio_flush
        -n disk :: write -P 4 3M 4k :: read -P 4 3M 4k :: info
        disk :: write -c 0 64k :: truncate 5M :: length :: write -P 5 4M 1M
        disk :: truncate 3M :: read 3M 1 :: length
        ",
    );
    same_disk(&both, "qcow2", "disk");
    both.same_bytes("data");
}

/// Clusters that were given up are used again, though nothing was flushed.
#[test]
fn discarded_space() {
    let both = Both::new(|place| place.make("create -q -f qcow2 disk 8M"));
    let cases = "-t writeback disk :: write 0 4M :: discard 1M 2M :: write -P 7 5M 2M";
    same(&both, cases);
    assert_eq!(len(&both.tandem, "disk"), len(&both.qemu, "disk"));
    same_disk(&both, "qcow2", "disk");
}

#[test]
fn compressed() {
    let both = Both::new(|place| {
        source(place);
        place.make("create -q -f qcow2 disk 1000k");
        place.make("create -q -f qcow2 -o compression_type=zstd,cluster_size=4k zstd 1M");
        place.make("create -q -f qcow2 -o data_file=data external 1M");
        place.make("create -q -f raw raw 1M");
    });
    same(
        &both,
        "
        disk :: write -c -P 1 0 64k :: read -P 1 0 64k :: map :: alloc 0 128k
        disk :: write -c -s source 128k 192k :: read -v 128k 32 :: write -P 3 130k 1k
        disk :: write -c 960k 40k :: read -P 205 960k 40k :: write -c 0 0
        disk :: write -c 1k 64k :: write -c 64k 1k :: write -c 1 64k :: write -c 0 63
        disk :: write -c -q 64k 64k :: write -c -f 0 64k :: read -P 205 64k 64k
        disk :: write -c 960k 64k :: discard 0 64k :: read -P 0 0 64k
        zstd :: write -c -P 1 0 64k :: write -c -s source 64k 64k :: read -v 68k 16 :: map
        external :: write -c 0 64k :: write -P 1 0 64k
        raw :: write -c 0 64k
        ",
    );
    for (format, name) in [("qcow2", "disk"), ("qcow2", "zstd"), ("raw", "raw")] {
        same_disk(&both, format, name);
    }
}

/// QEMU refuses to compress a cluster that has data; in Tandem the data gives its space back.
#[test]
fn compressed_over_data() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 disk 1M");
    let lines = super::args("disk :: write -P 1 0 128k :: write -c -P 2 0 64k :: read -P 2 0 64k");
    let found = super::run(&place, super::TANDEM, &lines, "");
    assert_eq!(found.status, Some(0), "{found:?}");
    place.make("check -q disk");
}

#[test]
fn copy_on_read() {
    let both = Both::new(|place| {
        std::fs::write(place.path("base"), vec![0x44; 200_000]).unwrap();
        place.make("create -q -f qcow2 -b base -F raw disk 1M");
        place.make("create -q -f raw raw 1M");
    });
    same(
        &both,
        "
        -C disk :: read -P 0x44 70k 1k :: map :: read 190k 300 :: map
        -C disk :: read -P 0 500k 100k :: write 600k 1 :: read 590k 200k
        -C -f raw raw :: read 0 1k
        -C -r disk :: read 0 1k
        disk :: open -C disk :: close :: open -C disk :: read 0 1M
        ",
    );
    same_disk(&both, "qcow2", "disk");
}

/// What can be zeroed without writing zeros.
#[test]
fn no_fallback() {
    let both = Both::new(|place| {
        std::fs::write(place.path("base"), vec![0x44; 200_000]).unwrap();
        place.make("create -q -f qcow2 -b base -F raw disk 1000k");
        place.make("create -q -f qcow2 -o extended_l2=on,cluster_size=64k sub 1M");
        place.make("create -q -f raw raw 1M");
    });
    same(
        &both,
        "
        disk :: write -zn 1k 1k :: write -zn 0 64k :: write -zn 130k 1k :: write -zn 300k 1k
        disk :: write 500k 1k :: write -zn 510k 1k :: write -zn 400k 200k :: write -zn 448k 128k
        disk :: write -zn 999k 1k :: write -zn 999k 2k :: write -zn 0 4G :: write -zn 2M 64k
        disk :: write -zn 192k 64k :: write -zn 100k 200k :: write -zn 0 0 :: write -zn 10 0
        sub :: write 0 64k :: write -zn 2k 4k :: write -zn 1k 1k :: write -zn 70k 1k
        -f raw raw :: write 0 64k :: write -zn 1k 1 :: read -P 0 1k 1 :: write -zn 0 3G
        ",
    );
    same_disk(&both, "qcow2", "disk");
    same_disk(&both, "qcow2", "sub");
    both.same_bytes("raw");
}

/// Disks whose last sector is not whole, and raw disks of any length.
#[test]
fn odd_lengths() {
    let both = Both::new(|place| {
        std::fs::write(place.path("raw"), vec![1; 70_001]).unwrap();
        place.make("create -q -f qcow2 disk 70001");
    });
    same(
        &both,
        "
        -f raw raw :: length :: map :: read -v 70000 12 :: write 70140 4 :: write 70141 4
        -f raw raw :: truncate 1000 :: length :: read -P 1 0 1000 :: alloc 0 2k :: map
        -f raw raw :: truncate 3001 :: length :: read -P 0 1000 2072 :: write 3000 60
        -f raw raw :: truncate 0 :: length :: map :: read 0 0 :: read 0 1 :: alloc 0
        -f raw raw :: truncate 2k :: map
        -f raw raw :: truncate -m full 3k :: length :: map :: truncate -m falloc 8k :: length :: map
        disk :: length :: map :: write 70000 100 :: write 70000 300 :: discard 64k 5k :: map
        disk :: truncate 1000 :: truncate 1024 :: length :: map
        ",
    );
    both.same_bytes("raw");
    same_disk(&both, "qcow2", "disk");
}

#[test]
fn truncate_gives_space() {
    for (format, options) in [("raw", ""), ("qcow2", ""), ("qcow2", "-o data_file=data")] {
        let both = Both::new(|place| {
            place.make(&format!("create -q -f {format} {options} disk 1M"));
        });
        same(
            &both,
            &format!(
                "-f {format} disk :: write -P 5 0 64k :: truncate -m falloc 2M :: length :: \
                 truncate -m full 3M :: read -P 0 1M 2M :: map"
            ),
        );
        if format == "qcow2" {
            same(&both, "disk :: truncate -m metadata 4M :: map");
        }
        same_disk(&both, format, "disk");
    }
}

/// The state of a virtual machine, which snapshots have too, and which a larger disk does not show.
#[test]
fn vm_state() {
    let both = Both::new(|place| {
        place.make("create -q -f qcow2 -o cluster_size=1k disk 1M");
        place.qemu_io("disk", &["write -P 1 0 1M"]);
    });
    same(
        &both,
        "disk :: info :: write -b -P 7 0 3k :: read -b -P 7 0 3k :: read -b -P 0 3k 512 :: map
        disk :: write -b -P 8 1G 4k :: write -b -P 9 10M 64k :: read -b -P 8 1G 4k :: length
        -r disk :: read -b -P 7 0 3k :: read -b -v 10M 512 :: write -b 0 512
        -t writeback disk :: write -b -P 3 1k 512 :: read -b -P 7 0 1k :: read -b -P 3 1k 512
        -s disk :: read -b 0 512
        disk :: read -P 1 0 1M",
    );
    same_disk(&both, "qcow2", "disk");
    both.same("snapshot -c s disk");
    same(&both, "disk :: write -b -P 4 0 3k :: read -b -P 4 0 3k");
    both.same("snapshot -a s disk");
    same(&both, "disk :: read -b -P 7 0 1k :: read -b -P 8 1G 4k");
    both.same("snapshot -d s disk");
    same_disk(&both, "qcow2", "disk");
    // Where QEMU finds the old state.
    both.tandem.qemu_io("disk", &["read -b -P 9 10M 64k"]);
    let grown = both.tandem.run(&["resize", "-q", "disk", "12M"]);
    assert_eq!(grown.status, Some(0), "{}", grown.stderr);
    both.tandem
        .qemu_io("disk", &["read -P 0 1M 11M", "read -P 1 0 1M"]);
    both.tandem.make("check -q disk");
}
