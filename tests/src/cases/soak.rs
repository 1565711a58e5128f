//! A guest that works for a long time, with its machine operated from outside all the while: `tandem`
//! must not take more and more of memory, file descriptors or threads.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cases::{fio, live};
use crate::control::{Control, last_metrics};
use crate::disk::{Image, Kind, Maker};
use crate::error::{Context, Error, Result};
use crate::guest::Guest;
use crate::process;
use crate::suite::{Bench, Case};

const MIB: u64 = 1 << 20;
/// Size of the disks. `fio` works on the first 12 MiB.
const SIZE: u64 = 16 * MIB;
/// To what they are made larger, and smaller again.
const GROWN: u64 = 24 * MIB;
/// The guest's memory in KiB, which is no matter of the monitor's.
const GUEST_MEMORY: u64 = 320 << 10;
/// What all samples after the first third may differ by.
const MEMORY_LIMIT: u64 = 4 << 10;

/// Two disks that `fio` verifies, and one with a file system whose files come and go.
const ROUNDS: &str = r#"
tools /dev/vdd
/bin/mke2fs -q -t ext4 /dev/vdc 14m
mkdir /tmp/files
mount -t ext4 /dev/vdc /tmp/files
work() {
    chroot /tools /bin/fio --minimal --randrepeat=0 /tmp/jobs >/tmp/said 2>&1 ||
        { cat /tmp/said; exit 1; }
}
files() {
    for i in 1 2 3 4; do cat /seed >/tmp/files/$i; done
    sync
    echo 3 >/proc/sys/vm/drop_caches
    for i in 1 2 3 4; do cmp /seed /tmp/files/$i; done
    rm /tmp/files/[1-4]
    fstrim /tmp/files
}
(
    # Whoever operates the machine finds that it has ended.
    trap '[ -e /tmp/worked ] || poweroff -f' EXIT
    until [ -e /tmp/stop ]; do
        work & working=$!
        files
        # Without a look at what is on it: the end of the disk may just have gone.
    /bin/blkdiscard -f -o 12582912 -l 2097152 /dev/vda
        # It is there, or not.
        dd if=/seed of=/dev/vdb bs=1M seek=20 oflag=direct 2>/dev/null || true
        wait $working
        round=$((round + 1))
        echo "@ round $round"
    done
    touch /tmp/worked
) & all=$!
step operate
touch /tmp/stop
wait $all
umount /tmp/files
sync
echo 3 >/proc/sys/vm/drop_caches
for disk in vda vdb vdc; do
    echo "@ sha256-$disk $(head -c 16777216 /dev/$disk | sha256sum | cut -d' ' -f1)"
done
"#;

/// The guest works for so many minutes.
pub fn case(minutes: u64) -> Case {
    Case::new("soak", move |bench| soak(bench, minutes))
}

fn soak(bench: &Bench, minutes: u64) -> Result<()> {
    let disks = [
        ("vda", Kind::ExternalRaw, Maker::QemuImg),
        ("vdb", Kind::Internal, Maker::QemuImg),
        ("vdc", Kind::Packed, Maker::TandemImg),
    ];
    let (socket, metrics) = (bench.scratch("control"), bench.scratch("metrics"));
    let mut guest = Guest::new(bench)
        .cpus(4)
        .limit(Duration::from_secs(60 * (minutes + 30)))
        .option("--memory", format!("{GUEST_MEMORY}K"))
        .option("--metrics", &metrics)
        .option("--control", &socket)
        .option("--allow-dir", bench.directory());
    let mut images = Vec::new();
    for (disk, kind, maker) in disks {
        let image = Image::create(bench, disk, kind, maker, "", &SIZE.to_string())?;
        guest = guest.disk(&image.path, "");
        images.push(image);
    }
    let copy = Image::new(bench, "copy", Kind::Internal, "1M")?;
    let script = format!("{}{ROUNDS}", fio::jobs(&["vda", "vdb"]));
    let mut outside = Outside {
        bench,
        control: Control::new(&socket),
        copy,
        id: 0,
        grown: false,
        acts: 0,
        backups: 0,
    };
    let mut table = Vec::new();
    let boot = guest.tools().steps(&script, |_, tandem| {
        outside.id = tandem.id();
        table = outside.operate(Duration::from_secs(60 * minutes))?;
        Ok(())
    })?;
    let boot = boot.succeeded();
    println!("{}", shown(&table));
    println!("rounds of the guest: {}", boot.value("round"));
    let metrics = last_metrics(&metrics)?;
    for (index, ((disk, kind, _), image)) in disks.into_iter().zip(images).enumerate() {
        let total = &metrics["disks"][index]["total"];
        println!("{disk}: {total}");
        // Of the second disk, writes may fail to what has just been cut off.
        assert!(index == 1 || total["failed"] == 0, "{disk}: {total}");
        image.check()?;
        image.assert_sha256(kind, boot.value(&format!("sha256-{disk}")))?;
    }
    judge(&table)
}

/// Whoever operates the machine.
struct Outside<'a> {
    bench: &'a Bench,
    control: Control,
    /// For copies of the second disk.
    copy: Image<'a>,
    id: u32,
    grown: bool,
    acts: usize,
    backups: usize,
}

/// What `tandem` takes at one time.
struct Sample {
    minute: u64,
    /// KiB that are resident, without the guest's memory.
    memory: u64,
    descriptors: usize,
    threads: usize,
    acts: usize,
}

impl Outside<'_> {
    /// Does one thing after another, and takes a sample each minute.
    fn operate(&mut self, time: Duration) -> Result<Vec<Sample>> {
        let acts = [
            Self::ask,
            Self::flush,
            Self::pause,
            Self::resize,
            Self::copy,
            Self::leave,
            Self::bitmaps,
            Self::backup,
            Self::fork,
        ];
        let begin = Instant::now();
        let mut samples = vec![self.sample(0)?];
        while begin.elapsed() < time || self.grown {
            acts[self.acts % acts.len()](self)?;
            self.acts += 1;
            // Between two acts, so that none of their clients is left.
            sleep(Duration::from_secs(1));
            let minute = begin.elapsed().as_secs() / 60;
            if samples.last().is_none_or(|last| last.minute < minute) {
                let sample = self.sample(minute)?;
                println!("soak: {sample}");
                samples.push(sample);
            }
        }
        Ok(samples)
    }

    fn ask(&mut self) -> Result<()> {
        for command in ["status", "disks", "metrics"] {
            self.control.command(command)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.control.command("flush").map(drop)
    }

    fn pause(&mut self) -> Result<()> {
        self.control.command("pause")?;
        sleep(Duration::from_millis(200));
        self.control.command("resume").map(drop)
    }

    /// Makes all disks larger, and smaller again the next time.
    fn resize(&mut self) -> Result<()> {
        self.grown = !self.grown;
        let size = if self.grown { GROWN } else { SIZE };
        for disk in 0..3 {
            let request = json!({"command": "resize", "disk": disk, "size": size, "shrink": true});
            self.control.ask(&request)?;
        }
        Ok(())
    }

    /// The files of a paused machine are a whole image.
    fn copy(&mut self) -> Result<()> {
        self.control.command("pause")?;
        self.control.command("flush")?;
        let copied = fs::copy(self.bench.scratch("vdb"), &self.copy.path);
        copied.context("copying the image")?;
        self.control.command("resume")?;
        self.copy.check_but_leaks();
        Ok(())
    }

    /// A client that goes without having said a word, and one that says nonsense.
    fn leave(&mut self) -> Result<()> {
        self.control.connect()?;
        let error = self.control.ask(&json!({"command": "nonsense"}));
        assert!(error.is_err_and(|error| error.to_string().contains("unknown-command")));
        Ok(())
    }

    fn bitmaps(&mut self) -> Result<()> {
        for command in ["bitmap-add", "bitmap-disable", "bitmap-remove"] {
            let request = json!({"command": command, "disk": "vda", "name": "b"});
            self.control.ask(&request)?;
        }
        Ok(())
    }

    /// A full backup the first time, then what has changed; both are thrown away.
    fn backup(&mut self) -> Result<()> {
        let since = if self.backups == 0 {
            "--track"
        } else {
            "--since"
        };
        self.backups += 1;
        let mut backup = self.bench.tool(self.bench.tandem_img());
        backup.args(["backup", "-q", "--control", "control"]);
        backup.args([since, "b", "-O", "stream", "vdb", "backup"]);
        process::run(&mut backup)?;
        fs::remove_file(self.bench.scratch("backup")).context("removing a backup")
    }

    /// The second disk is forked, and what it has written since goes back to where it was.
    fn fork(&mut self) -> Result<()> {
        let [overlay, fork] = ["overlay", "fork"].map(|name| self.bench.scratch(name));
        let request = json!({"command": "fork", "disk": "vdb", "overlay": overlay, "fork": fork});
        self.control.ask(&request)?;
        // Nothing but this disk may lie on what changes.
        fs::remove_file(&fork).context("removing a fork")?;
        let request = json!({"command": "commit", "disk": "vdb", "pivot": true});
        live::finished(&self.control, &request)?;
        fs::remove_file(&overlay).context("removing an overlay")
    }

    fn sample(&self, minute: u64) -> Result<Sample> {
        let of_process = |name: &str| PathBuf::from(format!("/proc/{}/{name}", self.id));
        let entries = |name| -> Result<usize> {
            let entries = fs::read_dir(of_process(name)).context(format!("listing {name}"))?;
            Ok(entries.count())
        };
        let maps = fs::read_to_string(of_process("smaps")).context("reading smaps")?;
        Ok(Sample {
            minute,
            memory: process::memory(&maps, GUEST_MEMORY, "Rss:")?.1,
            descriptors: entries("fd")?,
            threads: entries("task")?,
            acts: self.acts,
        })
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "minute {:3}  {:6} KiB  {:4} descriptors  {:4} threads  {:5} acts",
            self.minute, self.memory, self.descriptors, self.threads, self.acts
        )
    }
}

fn shown(table: &[Sample]) -> String {
    let lines: Vec<_> = table.iter().map(Sample::to_string).collect();
    lines.join("\n")
}

/// After the first third everything stays as it is.
fn judge(table: &[Sample]) -> Result<()> {
    let settled = &table[table.len() / 3..];
    let spread = |of: fn(&Sample) -> u64| {
        let values = settled.iter().map(of);
        values.clone().max().unwrap_or(0) - values.min().unwrap_or(0)
    };
    // Half against half: a leak is not a spread around one value.
    let (early, late) = settled.split_at(settled.len() / 2);
    let most =
        |samples: &[Sample], of: fn(&Sample) -> u64| samples.iter().map(of).max().unwrap_or(0);
    for (what, of, limit) in [
        (
            "KiB of memory",
            (|s| s.memory) as fn(&Sample) -> u64,
            MEMORY_LIMIT,
        ),
        // A client's may not be closed yet.
        ("file descriptors", |s| s.descriptors as u64, 2),
        // A disk has up to 16 of them for requests that wait, as they are needed.
        ("threads", |s| s.threads as u64, 8),
    ] {
        let (before, after) = (most(early, of), most(late, of));
        let grown = after.saturating_sub(before);
        println!(
            "{what}: at most {before}, then {after}; spread {}",
            spread(of)
        );
        if grown > limit {
            return Err(Error::new(format!(
                "{grown} more {what} in the second half:\n{}",
                shown(table)
            )));
        }
    }
    Ok(())
}
