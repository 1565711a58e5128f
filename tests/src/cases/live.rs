//! What a disk lies on changes while a guest writes to it.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control::Control;
use crate::disk::{Image, Kind, sha256};
use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::process::run;
use crate::suite::{Bench, Case};

/// How long a job may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Two writers and one that discards and zeroes, until there is `/tmp/stop`.
const WORK: &str = r#"
for part in 0 1; do
    (
        i=$part
        until [ -e /tmp/stop ]; do
            dd if=/seed of=/dev/vda bs=64k seek=$((i * 7 % 240)) skip=$((i % 16)) count=1 \
                oflag=direct conv=notrunc 2>/dev/null
            i=$((i + 2))
        done
    ) & workers="$workers $!"
done
(
    i=0
    until [ -e /tmp/stop ]; do
        /bin/blkdiscard -o $((i * 5 % 240 * 65536)) -l 65536 /dev/vda
        /bin/blkdiscard -z -o $((i * 11 % 240 * 65536)) -l 32768 /dev/vda
        i=$((i + 1))
    done
) & workers="$workers $!"
step operate
touch /tmp/stop
for worker in $workers; do wait $worker; done
sync
echo 3 >/proc/sys/vm/drop_caches
echo "@ sha256 $(sha256sum </dev/vda | cut -d' ' -f1)"
"#;

pub fn cases() -> Vec<Case> {
    vec![Case::new("live::chain", chain)]
}

/// The disk is forked, a second machine boots with the fork, and the fork is committed twice, the second
/// time for good; then it is forked again and takes up everything. The guest does not notice.
fn chain(bench: &Bench) -> Result<()> {
    let image = Image::new(bench, "disk", Kind::ExternalRaw, "16M")?;
    let socket = bench.scratch("control");
    let control = Control::new(&socket);
    let names = ["over", "fork", "again", "fork2"].map(|name| bench.scratch(name));
    let [over, fork, again, fork2] = &names;
    let mut stopped = Vec::new();
    let mut operate = || -> Result<()> {
        // While it stands still, what the fork is to hold can be told.
        control.command("pause")?;
        let forked = control.ask(&json!({
            "command": "fork", "disk": "vda", "overlay": over, "fork": fork,
        }))?;
        stopped.push(("fork", forked["stopped_us"].clone()));
        let expected = content(bench, fork)?;
        control.command("resume")?;
        assert_eq!(
            second_machine(bench, fork)?,
            expected,
            "the disk of the fork"
        );
        for pivot in [false, true] {
            let request = json!({"command": "commit", "disk": "vda", "pivot": pivot});
            // Nothing but this disk may lie on what changes.
            let _ = std::fs::remove_file(fork);
            stopped.push(("commit", finished(&control, &request)?));
        }
        assert_eq!(path_of_vda(&control)?, json!(image.path));
        let forked = control.ask(&json!({
            "command": "fork", "disk": "vda", "overlay": again, "fork": fork2,
        }))?;
        stopped.push(("fork", forked["stopped_us"].clone()));
        let flatten = json!({"command": "rebase", "disk": "vda", "backing": ""});
        stopped.push(("rebase", finished(&control, &flatten)?));
        assert_eq!(path_of_vda(&control)?, json!(again));
        Ok(())
    };
    let boot = Guest::new(bench)
        .cpus(2)
        .option("--control", &socket)
        .option("--allow-dir", bench.directory())
        .disk(&image.path, "")
        .steps(WORK, |_, _| operate())?
        .succeeded();
    println!("live::chain: the guest's requests have waited (µs): {stopped:?}");
    for path in [&image.path, over, again, fork2] {
        let mut check = bench.tool("qemu-img");
        bench.run(check.args(["check", "-q", "-f", "qcow2"]).arg(path))?;
    }
    assert_eq!(
        content(bench, again)?,
        boot.value("sha256"),
        "the guest's disk"
    );
    Ok(())
}

/// The SHA-256 of a disk, which may be in use.
fn content(bench: &Bench, image: &Path) -> Result<String> {
    let raw = bench.scratch("content");
    let mut convert = bench.tool("qemu-img");
    convert.args(["convert", "-U", "-f", "qcow2", "-O", "raw"]);
    run(convert.arg(image).arg(&raw))?;
    sha256(&raw)
}

/// The same, by a guest that uses the disk while the first machine runs.
fn second_machine(bench: &Bench, image: &Path) -> Result<String> {
    let script = r#"
        echo "@ sha256 $(sha256sum </dev/vda | cut -d' ' -f1)"
        dd if=/seed of=/dev/vda bs=1M seek=3 conv=fsync 2>/dev/null
    "#;
    let boot = Guest::new(bench).disk(image, "").boot(script)?.succeeded();
    Ok(boot.value("sha256").to_owned())
}

fn path_of_vda(control: &Control) -> Result<Value> {
    Ok(control.command("disks")?["disks"][0]["path"].clone())
}

/// Waits until a job is done, and returns how long the guest's requests have waited.
pub fn finished(control: &Control, request: &Value) -> Result<Value> {
    let job = control.ask(request)?["job"].clone();
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let jobs = control.command("jobs")?;
        let jobs = jobs["jobs"].as_array().into_iter().flatten();
        let mut jobs = jobs.filter(|other| other["job"] == job);
        let told = jobs.next().cloned().unwrap_or_default();
        match told["state"].as_str() {
            Some("running") => sleep(Duration::from_millis(50)),
            Some("done") => return Ok(told["stopped_us"].clone()),
            _ => return Err(Error::new(format!("{request} came to {told}"))),
        }
    }
    Err(Error::new(format!("{request} does not end")))
}
