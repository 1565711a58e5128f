//! Disks that `tandem serve` offers to a guest under QEMU's emulator.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::cases::disks::root_image;
use crate::cases::fio;
use crate::cases::roundtrip::{FILL, VERIFY};
use crate::disk::{Image, Kind, Maker};
use crate::error::{Context, Error, Result};
use crate::guest::{Boot, initrd, values};
use crate::lab::Kernel;
use crate::suite::{Bench, Case};

/// The socket, in the directory of the case: there is a limit on the length of whole names.
const SOCKET: &str = "disk.sock";
const LIMIT: Duration = Duration::from_secs(60);

pub fn cases() -> Vec<Case> {
    let kinds = [
        ("served::external_raw", Kind::ExternalRaw),
        ("served::internal", Kind::Internal),
    ];
    let mut cases: Vec<_> = kinds
        .into_iter()
        .map(|(name, kind)| Case::new(name, move |bench| served(bench, kind)))
        .collect();
    cases.push(Case::new("served::root_and_fio", root_and_fio));
    cases.push(Case::new("served::stopped_and_reset", stopped_and_reset));
    cases.push(Case::new("served::started_again", started_again));
    cases.into_iter().map(Case::without_kvm).collect()
}

/// Two guests, one after another, are served by one process.
fn served(bench: &Bench, kind: Kind) -> Result<()> {
    let image = Image::new(bench, "disk.qcow2", kind, "32M")?;
    let service = Service::new(bench, &image.path)?;
    let facts = r#"
        echo "@ serial $(cat /sys/block/vda/serial)"
        echo "@ queues $(ls /sys/block/vda/mq | wc -l)"
        echo "@ cache $(cat /sys/block/vda/queue/write_cache)"
        echo "@ segments $(cat /sys/block/vda/queue/max_segments)"
    "#;
    let first = boot(bench, &format!("{facts}{FILL}"))?;
    assert_eq!(first.value("serial"), "served-disk");
    assert_eq!(first.value("queues"), "2");
    assert_eq!(first.value("cache"), "write back");
    assert_eq!(first.value("segments"), "126");
    // Behind the files.
    let discard = "/bin/busybox blkdiscard -o 25165824 -l 1048576 /dev/vda\n";
    let second = boot(bench, &format!("{discard}{VERIFY}"))?;
    service.end()?;
    image.check()?;
    image.assert_sha256(kind, second.value("sha256"))
}

/// Boots from a served disk, and has `fio` verify what it does to another one, on four queues.
fn root_and_fio(bench: &Bench) -> Result<()> {
    let root = root_image(bench)?;
    let service = Service::new(bench, &root.path)?;
    let first = boot(
        bench,
        "mount -t ext4 /dev/vda /mnt\nmount --move /dev /mnt/dev\ntouch /switch_root\n",
    )?;
    service.end()?;
    assert_eq!(first.value("root"), "/dev/vda ext4");
    root.check()?;

    let kind = Kind::Packed;
    let image = Image::create(bench, "disk.qcow2", kind, Maker::TandemImg, "", "16M")?;
    let service = Service::new(bench, &image.path)?;
    let tools = bench.tools_disk();
    let tools = format!(
        "file={},if=none,id=tools,format=raw,readonly=on",
        tools.display()
    );
    let mut qemu = qemu_with(bench, 4, "", &fio::script(&["vda"], "vdb"))?;
    qemu.args(["-no-reboot", "-drive", &tools]);
    qemu.args(["-device", "virtio-blk-pci,drive=tools"]);
    let second = Boot::watch(bench, qemu, |_, _| ())?.succeeded();
    service.end()?;
    image.check()?;
    image.assert_sha256(kind, second.value("sha256-vda"))
}

/// Writes, and reads back what has been written, six times.
const ROUNDS: &str = r#"
for round in 1 2 3 4 5 6; do
    writers=
    for part in 0 1 2 3; do
        at=$((part * 2000 + round))
        dd if=/seed of=/dev/vda bs=4k seek=$at oflag=direct 2>/dev/null &
        writers="$writers $!"
    done
    for writer in $writers; do wait $writer; done
    echo "@ round $round"
    echo 3 >/proc/sys/vm/drop_caches
    for part in 0 1 2 3; do
        at=$((part * 2000 + round))
        dd if=/dev/vda bs=4k skip=$at count=256 2>/dev/null | cmp - /seed
    done
done
echo "@ sha256 $(sha256sum </dev/vda | cut -d' ' -f1)"
"#;

/// QEMU stops the machine while requests are under way, which stops the rings, has it go on, and resets
/// it once.
fn stopped_and_reset(bench: &Bench) -> Result<()> {
    let kind = Kind::ExternalRaw;
    let image = Image::new(bench, "disk.qcow2", kind, "32M")?;
    let service = Service::new(bench, &image.path)?;
    let mut qemu = qemu(bench, ROUNDS)?;
    qemu.args(["-monitor", "unix:monitor.sock,server=on,wait=off"]);
    let (mut monitor, mut seen) = (None, 0);
    let boot = Boot::watch(bench, qemu, |console, _| {
        let rounds = values(console, "round").count();
        if rounds == seen {
            return;
        }
        seen = rounds;
        let connect = || UnixStream::connect(bench.scratch("monitor.sock")).expect("a monitor");
        let monitor = monitor.get_or_insert_with(connect);
        if rounds == 3 {
            monitor.write_all(b"system_reset\n").expect("a reset");
        } else {
            monitor.write_all(b"stop\n").expect("a stop");
            thread::sleep(Duration::from_millis(100));
            monitor.write_all(b"cont\n").expect("going on");
        }
    })?
    .succeeded();
    assert!(seen >= 9, "{seen} rounds: it has not been reset");
    service.end()?;
    image.check()?;
    image.assert_sha256(kind, boot.value("sha256"))
}

/// `tandem serve` ends and is started again while requests are under way: QEMU connects again, and the
/// guest goes on as if nothing had happened.
fn started_again(bench: &Bench) -> Result<()> {
    let kind = Kind::Internal;
    let image = Image::new(bench, "disk.qcow2", kind, "32M")?;
    let mut service = Some(Service::new(bench, &image.path)?);
    let mut qemu = qemu_with(bench, 2, ",reconnect=1", ROUNDS)?;
    qemu.arg("-no-reboot");
    let mut seen = 0;
    let boot = Boot::watch(bench, qemu, |console, _| {
        let rounds = values(console, "round").count();
        if rounds > seen && [2, 4].contains(&rounds) {
            let old = service.take().expect("a service");
            old.end().expect("an end");
            service = Some(Service::new(bench, &image.path).expect("a new one"));
        }
        seen = rounds;
    })?
    .succeeded();
    service.expect("a service").end()?;
    image.check()?;
    image.assert_sha256(kind, boot.value("sha256"))
}

/// `tandem serve`.
struct Service<'a> {
    bench: &'a Bench,
    child: Child,
}

impl<'a> Service<'a> {
    /// Serves `image`, as soon as this returns.
    fn new(bench: &'a Bench, image: &Path) -> Result<Self> {
        let mut disk = image.as_os_str().to_owned();
        disk.push(",serial=served-disk");
        let mut command = bench.tool(bench.tandem());
        command
            .args(["serve", "--socket", SOCKET, "--disk"])
            .arg(disk);
        let child = command.stderr(Stdio::piped()).spawn();
        let child = child.context("starting tandem serve")?;
        let mut service = Self { bench, child };
        let deadline = Instant::now() + LIMIT;
        while !bench.scratch(SOCKET).exists() {
            if Instant::now() > deadline || service.child.try_wait().is_ok_and(|s| s.is_some()) {
                return Err(Error::new("tandem serve makes no socket"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(service)
    }

    /// Ends it, and checks that it has had nothing to say.
    fn end(mut self) -> Result<()> {
        // SAFETY: the child has not been waited for, so its id is its own.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let status = self.child.wait().context("waiting for tandem serve")?;
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut said).context("reading")?;
        }
        assert_eq!(status.signal(), Some(libc::SIGTERM), "{said}");
        assert_eq!(said, "");
        assert!(!self.bench.scratch(SOCKET).exists());
        Ok(())
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `script` in a guest under QEMU.
fn boot(bench: &Bench, script: &str) -> Result<Boot> {
    let mut qemu = qemu(bench, script)?;
    qemu.arg("-no-reboot");
    Ok(Boot::watch(bench, qemu, |_, _| ())?.succeeded())
}

fn qemu(bench: &Bench, script: &str) -> Result<Command> {
    qemu_with(bench, 2, "", script)
}

/// As many queues as CPUs. `socket` is what more is said of the socket.
fn qemu_with(bench: &Bench, cpus: usize, socket: &str, script: &str) -> Result<Command> {
    let device = format!("vhost-user-blk-pci,chardev=disk,num-queues={cpus}");
    let mut qemu: Command = bench.tool("qemu-system-x86_64");
    qemu.args(["-machine", "q35", "-accel", "tcg", "-cpu", "max"])
        .args(["-smp", &cpus.to_string(), "-m", "256"])
        .args(["-nodefaults", "-display", "none", "-serial", "stdio"])
        .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
        .args(["-numa", "node,memdev=mem"])
        .arg("-chardev")
        .arg(format!("socket,id=disk,path={SOCKET}{socket}"))
        .args(["-device", &device])
        .arg("-kernel")
        .arg(bench.lab().kernel(Kernel::BzImage))
        .arg("-initrd")
        .arg(initrd(bench, script)?)
        .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
    Ok(qemu)
}
