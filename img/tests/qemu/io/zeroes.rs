//! Zeros that need no data: where a part of a cluster is zeroed, and the rest of it is zero anyway.

use super::{same, same_disk};
use crate::run::{Both, Place};

/// Zeros at the edges of clusters and across them, each on a disk that was written before.
const CASES: &str = "
    disk :: write -z 1k 1k :: write -z 8k 512 :: write -zu 15k 2k :: write -z 20k 12k
    disk :: write -zn 33k 1k :: write -zn 40k 100 :: write -z -P 0 48k 4k :: map
    disk :: write -z 68k 7k :: write -z 77k 3k :: write -z 83k 10k :: write -zu 95k 20k
    disk :: write -P 3 130k 1k :: write -z 129k 1k :: write -z 132k 7k :: write -z 126k 3k
    disk :: write -z 1023k 1k :: write -z 1026k 1k :: write -z 1033k 200 :: alloc 0 1034k
    disk :: discard 0 16k :: write -z 2k 1k :: write -z 256k 64k :: discard 256k 32k
    disk :: write -c -P 0 512k 64k :: write -z 520k 1k :: write -P 0 600k 1k :: map
    disk :: read -P 0 0 64k :: read -P 0 95k 20k :: read -P 3 130k 1k :: read -P 0 512k 64k
    -C disk :: read 700k 80k :: map
";

/// What `qemu-img` says of how the disk is stored, but for where.
fn map(place: &Place) -> String {
    let map = place.qemu_img(&["map", "--output=json", "disk"]);
    assert_eq!(map.status, Some(0), "{}", map.stderr);
    let line = |line: &str| {
        line.split(", \"offset\"")
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let mut lines: Vec<String> = map.stdout.lines().map(line).collect();
    // Data in one piece or several, as the places go.
    lines.dedup_by(|next, last| next == last);
    lines.join("\n")
}

fn on(prepare: impl Fn(&Place) + Sync) {
    let both = Both::new(prepare);
    for case in CASES.lines().map(str::trim).filter(|case| !case.is_empty()) {
        same(&both, case);
        assert_eq!(map(&both.tandem), map(&both.qemu), "{case}");
    }
    same_disk(&both, "qcow2", "disk");
}

#[test]
fn without_a_backing_file() {
    on(|place| place.make("create -q -f qcow2 -o cluster_size=4k disk 1034k"));
    on(|place| place.make("create -q -f qcow2 -o data_file=data,cluster_size=4k disk 1034k"));
}

#[test]
fn over_zeros_and_data_of_another_image() {
    for (format, base) in [("qcow2", "1M"), ("qcow2", "1026k"), ("raw", "100k")] {
        on(|place| {
            place.make(&format!("create -q -f {format} base {base}"));
            let writes = ["write -P 5 6k 1k", "write -P 5 72k 1k", "write -z 20k 4k"];
            place.qemu_io_as(format, "base", &writes);
            let disk = format!("-o cluster_size=4k -b base -F {format} disk 1034k");
            place.make(&format!("create -q -f qcow2 {disk}"));
        });
    }
}

#[test]
fn subclusters() {
    let both = Both::new(|place| {
        place.make("create -q -f raw base 1M");
        place.qemu_io_as("raw", "base", &["write -P 5 6k 1k", "write -P 5 72k 1k"]);
        let options = "-o extended_l2=on,cluster_size=64k -b base -F raw";
        place.make(&format!("create -q -f qcow2 {options} disk 1M"));
    });
    for case in [
        "disk :: write -z 1k 4k :: write -z 9k 100 :: write -zn 12k 3k :: write -z 16k 50k",
        "disk :: write -P 1 130k 2k :: write -z 129k 1k :: write -z 140k 60k :: map",
        "disk :: write -z 70k 3k :: write -zu 71k 4k :: read -P 0 71k 4k :: read -P 0 140k 60k",
    ] {
        same(&both, case);
        assert_eq!(map(&both.tandem), map(&both.qemu), "{case}");
    }
    same_disk(&both, "qcow2", "disk");
}
