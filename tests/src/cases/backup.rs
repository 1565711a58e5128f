//! Backups of a disk that a guest is writing to: each restored, and compared with what the disk was.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control::Control;
use crate::disk::{Image, Kind, sha256};
use crate::error::{Context, Error, Result};
use crate::guest::Guest;
use crate::process::{run, shown, stdout};
use crate::suite::{Bench, Case};

/// How long a backup may take to begin, and a program to listen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writes of many sizes, discards, and zeroes, one round after another until there is `/tmp/stop`.
const WORK: &str = r#"
tools /dev/vdb
cat >/tmp/jobs <<'END'
[global]
thread
direct=1
ioengine=libaio
filename=/dev/vda
randrepeat=0
norandommap
[writes]
rw=randwrite
bsrange=512-64k
iodepth=8
fsync=32
size=14M
io_size=2M
[trims]
rw=randtrim
bs=64k
iodepth=2
size=14M
io_size=512k
END
(
    until [ -e /tmp/stop ]; do
        chroot /tools /bin/fio --minimal /tmp/jobs >/tmp/said 2>&1 || { cat /tmp/said; exit 1; }
        /bin/blkdiscard -z -o 3145728 -l 262144 /dev/vda
        dd if=/seed of=/dev/vda bs=64k seek=$((i % 14 * 16)) count=1 conv=notrunc 2>/dev/null
        i=$((i + 1))
    done
) & working=$!
"#;

/// Ends that, and tells what the guest has on its disk.
const END: &str = r#"
touch /tmp/stop
wait $working
sync
echo 3 >/proc/sys/vm/drop_caches
echo "@ sha256 $(sha256sum </dev/vda | cut -d' ' -f1)"
"#;

/// What is dirty after this: two stretches.
const DIRTY: &str = r#"
dd if=/seed of=/dev/vda bs=64k seek=15 count=2 conv=notrunc,fsync 2>/dev/null
dd if=/seed of=/dev/vda bs=4k seek=1601 count=1 conv=notrunc,fsync 2>/dev/null
"#;

pub fn cases() -> Vec<Case> {
    let kinds = [
        ("backup::external_raw", Kind::ExternalRaw),
        ("backup::internal", Kind::Internal),
    ];
    kinds
        .into_iter()
        .map(|(name, kind)| Case::new(name, move |bench| backups(bench, kind)))
        .collect()
}

/// A series of backups, a full one first, each of what has changed since the one before.
struct Series<'a> {
    bench: &'a Bench,
    socket: &'a Path,
    /// The bitmap that knows what has changed.
    bitmap: &'static str,
    is_stream: bool,
    taken: Vec<String>,
}

impl Series<'_> {
    /// Starts taking the next one.
    fn begin(&mut self) -> Result<Child> {
        let mut command = self.bench.tool(self.bench.tandem_img());
        command.args(["backup", "-q", "--control"]).arg(self.socket);
        let last = self.taken.last().map(String::as_str);
        command.args([
            if last.is_some() { "--since" } else { "--track" },
            self.bitmap,
        ]);
        match last {
            _ if self.is_stream => command.args(["-O", "stream"]),
            // Slow enough for the guest to change what is still to be copied.
            Some(last) => command.args(["-r", "2M", "-b", last, "-F", "qcow2"]),
            None => command.args(["-r", "8M"]),
        };
        let name = format!("{}{}", self.bitmap, self.taken.len());
        command.args(["vda", &name]).stderr(Stdio::inherit());
        self.taken.push(name);
        command.spawn().context(shown(&command))
    }

    /// Restores the last one, in QEMU's hands where there is a chain of images, and returns its SHA-256.
    fn restored(&self) -> Result<String> {
        let to = self.bench.scratch("restored");
        // `restore` makes a new one.
        let _ = fs::remove_file(&to);
        if self.is_stream {
            let mut restore = self.bench.tool(self.bench.tandem_img());
            restore.args(["restore", "-O", "raw"]).args(&self.taken);
            run(restore.arg(&to))?;
            return sha256(&to);
        }
        let last = self.taken.last().map(String::as_str).unwrap_or_default();
        let mut check = self.bench.tool("qemu-img");
        self.bench
            .run(check.args(["check", "-q", "-f", "qcow2", last]))?;
        let mut convert = self.bench.tool("qemu-img");
        convert.args(["convert", "-f", "qcow2", "-O", "raw", last]);
        run(convert.arg(&to))?;
        sha256(&to)
    }
}

/// The SHA-256 of the disk of a paused machine.
fn standing(bench: &Bench, control: &Control, image: &Image<'_>) -> Result<String> {
    control.command("flush")?;
    if let (Kind::ExternalRaw, Some(data_file)) = (image.kind(), &image.data_file) {
        return sha256(data_file);
    }
    let to = bench.scratch("standing");
    let mut convert = bench.tool("qemu-img");
    convert.args(["convert", "-U", "-f", "qcow2", "-O", "raw"]);
    run(convert.arg(&image.path).arg(&to))?;
    sha256(&to)
}

/// Takes a backup. A machine that is paused goes on once it has begun.
fn taken(series: &mut Series<'_>, control: &Control, is_paused: bool) -> Result<()> {
    let mut backup = series.begin()?;
    if is_paused {
        let end = Instant::now() + PATIENCE;
        while control.command("backups")?["backups"] == json!([])
            && backup.try_wait().context("a backup")?.is_none()
        {
            if Instant::now() > end {
                return Err(Error::new("the backup does not begin"));
            }
            sleep(Duration::from_millis(20));
        }
        control.command("resume")?;
    }
    let status = backup.wait().context("waiting for a backup")?;
    match status.success() {
        true => Ok(()),
        false => Err(Error::new(format!("tandem-img backup ended with {status}"))),
    }
}

fn backups(bench: &Bench, kind: Kind) -> Result<()> {
    let image = Image::new(bench, "disk", kind, "16M")?;
    let socket = bench.scratch("control");
    let control = Control::new(&socket);
    let series = |bitmap, is_stream| Series {
        bench,
        socket: &socket,
        bitmap,
        is_stream,
        taken: Vec::new(),
    };
    let mut all = [series("images", false), series("streams", true)];
    let mut at_the_end = Vec::new();
    let script = format!("{WORK}step rounds\n{END}step last\n{DIRTY}");
    let boot = Guest::new(bench)
        .cpus(2)
        .limit(Duration::from_secs(300 + 60 * bench.rounds()))
        .option("--control", &socket)
        .option("--allow-dir", bench.directory())
        .disk(&image.path, "")
        .tools()
        .steps(&script, |step, _| {
            if step == "last" {
                for series in &mut all {
                    taken(series, &control, false)?;
                    at_the_end.push(series.restored()?);
                }
                return Ok(());
            }
            for round in 0..bench.rounds() {
                let series = &mut all[round as usize % 2];
                control.command("pause")?;
                let expected = standing(bench, &control, &image)?;
                taken(series, &control, true)?;
                let found = series.restored()?;
                assert_eq!(found, expected, "{:?} in round {round}", series.taken);
            }
            Ok(())
        })?
        .succeeded();
    assert_eq!(
        at_the_end,
        [boot.value("sha256"); 2],
        "after the guest's end"
    );
    image.check()?;
    // 64 KiB at 960 KiB, as much behind that, and 4 KiB in the one at 6400 KiB.
    let expected = [(960 << 10, 128 << 10), (6400 << 10, 64 << 10)];
    for series in &all {
        assert_eq!(
            dirty(bench, &image.path, series.bitmap)?,
            expected,
            "{}",
            series.bitmap
        );
    }
    println!(
        "backup of {kind:?}: {} rounds and two at the end",
        bench.rounds()
    );
    Ok(())
}

/// The stretches that QEMU finds dirty in a bitmap.
fn dirty(bench: &Bench, image: &Path, bitmap: &str) -> Result<Vec<(u64, u64)>> {
    let socket = PathBuf::from("nbd.sock");
    let mut server = bench.tool("qemu-nbd");
    server.args(["-r", "-f", "qcow2", "-B", bitmap, "-k"]);
    let mut server = server
        .arg(bench.scratch("nbd.sock"))
        .arg(image)
        .spawn()
        .context("qemu-nbd")?;
    let source = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.display()
    );
    let end = Instant::now() + PATIENCE;
    let map = loop {
        let mut map = bench.tool("qemu-img");
        match stdout(map.args(["map", "--output=json", "--image-opts", &source])) {
            Ok(map) => break map,
            // It does not listen yet.
            Err(_) if Instant::now() < end => sleep(Duration::from_millis(50)),
            Err(error) => return Err(error),
        }
    };
    server.wait().context("waiting for qemu-nbd")?;
    let map: Vec<Value> = serde_json::from_slice(&map).context("reading a map")?;
    // What is dirty is shown as a hole.
    let dirty = map.iter().filter(|extent| extent["data"] == json!(false));
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap_or_default();
    Ok(dirty
        .map(|extent| (number(extent, "start"), number(extent, "length")))
        .collect())
}
