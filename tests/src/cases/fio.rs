//! `fio` in the guest: random requests of many sizes, on several queues at once, which it verifies.

use crate::control::last_metrics;
use crate::disk::{Image, Kind, Maker};
use crate::error::Result;
use crate::guest::Guest;
use crate::suite::{Bench, Case};

/// What `fio` does to each disk, each job in a part of its own and all at the same time. Written
/// blocks are read back and their checksums verified.
const JOBS: &str = r#"
[global]
thread
direct=1
ioengine=libaio
verify=crc32c
verify_fatal=1
verify_state_save=0
"#;

/// The jobs of one disk, by the queues of all CPUs. Other jobs than `trim` write again what they have discarded.
const JOBS_OF_DISK: &str = r#"
[sizes-DISK]
filename=/dev/DISK
cpus_allowed=0
rw=randwrite
bsrange=512-64k
iodepth=16
verify_backlog=64
size=5M

[trim-and-write-DISK]
filename=/dev/DISK
cpus_allowed=1
rw=trimwrite
bs=64k
iodepth=4
offset=5M
size=3M
io_size=6M

[small-trim-and-write-DISK]
filename=/dev/DISK
cpus_allowed=2
rw=trimwrite
bs=16k
iodepth=2
offset=8M
size=1M
io_size=2M

[trim-DISK]
filename=/dev/DISK
cpus_allowed=3
rw=randtrim
verify=0
bs=64k
iodepth=4
offset=9M
size=2M

[flushes-DISK]
filename=/dev/DISK
cpus_allowed=0
rw=randwrite
bs=4k
iodepth=32
fsync=16
offset=11M
size=1M
"#;

const SCRIPT: &str = r#"
tools /dev/TOOLS
for disk in DISKS; do
    # What the job "trim" discards.
    dd if=/seed of=/dev/$disk bs=1M seek=9 conv=fsync 2>/dev/null
    dd if=/seed of=/dev/$disk bs=1M seek=10 conv=fsync 2>/dev/null
done
chroot /tools /bin/fio --minimal /tmp/jobs >/tmp/said 2>&1 || { cat /tmp/said; exit 1; }
echo 3 >/proc/sys/vm/drop_caches
for disk in DISKS; do
    dd if=/dev/$disk bs=1M skip=9 count=2 2>/dev/null | cmp -n $((2 << 20)) - /dev/zero
    echo "@ sha256-$disk $(sha256sum </dev/$disk | cut -d' ' -f1)" &
    sums="$sums $!"
done
for sum in $sums; do wait $sum; done
"#;

pub fn cases() -> Vec<Case> {
    vec![Case::new("fio::four_queues", four_queues)]
}

/// A script that has `fio` work on `disks`, of 16 MiB each, and tells their checksums. The disk `tools`
/// is [`Guest::tools`].
pub fn script(disks: &[&str], tools: &str) -> String {
    let script = SCRIPT.replace("DISKS", &disks.join(" "));
    let script = script.replace("TOOLS", tools);
    format!("{}{script}", jobs(disks))
}

/// The part of a script that makes the file `/tmp/jobs`, of what `fio` is to do to the first 12 MiB of
/// each of `disks`.
pub fn jobs(disks: &[&str]) -> String {
    let of_disk = |disk| JOBS_OF_DISK.replace("DISK", disk);
    let jobs: String = disks.iter().copied().map(of_disk).collect();
    format!("cat >/tmp/jobs <<'END'\n{JOBS}{jobs}END\n")
}

/// Nothing fails, and the content and the images are right afterwards.
fn four_queues(bench: &Bench) -> Result<()> {
    let disks = [
        ("vda", Kind::ExternalRaw, Maker::QemuImg),
        ("vdb", Kind::Internal, Maker::QemuImg),
        ("vdc", Kind::Packed, Maker::TandemImg),
    ];
    let metrics = bench.scratch("metrics");
    let mut guest = Guest::new(bench).cpus(4).option("--metrics", &metrics);
    let mut images = Vec::new();
    for (disk, kind, maker) in disks {
        let image = Image::create(bench, disk, kind, maker, "", "16M")?;
        guest = guest.disk(&image.path, "");
        images.push(image);
    }
    let script = script(&disks.map(|(disk, _, _)| disk), "vdd");
    let boot = guest.tools().boot(&script)?.succeeded();
    let metrics = last_metrics(&metrics)?;
    for (index, ((disk, kind, _), image)) in disks.into_iter().zip(images).enumerate() {
        let disk_metrics = &metrics["disks"][index];
        let total = &disk_metrics["total"];
        assert_eq!(total["failed"], 0, "{disk}");
        // fio's own, by the sizes of its jobs.
        assert!(total["discards"].as_u64() >= Some(144), "{disk}: {total}");
        assert!(total["flushes"].as_u64() >= Some(15), "{disk}: {total}");
        let queues = disk_metrics["queues"].as_array();
        let queues = queues.map(Vec::as_slice).unwrap_or_default();
        assert_eq!(queues.len(), 4, "{disk}");
        for (cpu, queue) in queues.iter().enumerate() {
            let requests = queue["writes"].as_u64().max(queue["discards"].as_u64());
            assert!(requests >= Some(32), "{disk}, queue {cpu}: {queue}");
        }
        image.check()?;
        image.assert_sha256(kind, boot.value(&format!("sha256-{disk}")))?;
    }
    Ok(())
}
