//! Debian as it is: its kernel, its initrd, and systemd up to a login, on a root disk of each kind of image.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use crate::disk::{Image, Kind, Maker};
use crate::error::{Context, Result};
use crate::guest::values;
use crate::page::{Console, HOST, Terminal, plain, steps, type_line};
use crate::process::{memory, run, shown, stdout, watch};
use crate::stock::{PAGE, SYSTEMS, System};
use crate::suite::{Bench, Case};

/// What the page makes of the file system.
const SIZE: &str = "2G";
/// The guest's memory in KiB.
const MEMORY: u64 = 512 << 10;
const CONSOLE: Console = Console {
    prompt: "root@guest:~# ",
    login: &[("login: ", "root"), ("Password: ", "secret")],
    last: "poweroff",
    limit: Duration::from_secs(900),
};

/// Typed as soon as there is a shell; it is on the second disk.
const RUN: &str = "sh /dev/vdb";
const SCRIPT: &str = r#"
echo
echo "@ kernel $(uname -r)"
echo "@ state $(systemctl is-system-running --wait)"
systemctl --failed --plain --no-legend | sed 's/^/@ failed /'
journalctl -b -p err -o cat --no-pager -q | sed 's/^/@ error /'
dmesg --level=warn | sed 's/^/@ warning /'
echo "@ booted in $(systemd-analyze time | head -n 1)"
echo "@ root $(findmnt -n -o SOURCE,FSTYPE /)"
head -c 20000000 /dev/urandom >/root/noise
echo "@ noise $(sha256sum </root/noise | cut -d' ' -f1)"
sync
poweroff
exit
"#;

#[derive(Clone, Copy)]
enum Root {
    /// Without an image.
    Raw,
    /// A copy in an image.
    Image(Kind, Maker),
    /// An overlay of the raw disk.
    Overlay,
}

impl Root {
    fn name(self) -> &'static str {
        match self {
            Root::Raw => "raw",
            Root::Image(Kind::Internal, _) => "internal",
            Root::Image(Kind::External, _) => "external",
            Root::Image(Kind::ExternalRaw, _) => "external_raw",
            Root::Image(Kind::Packed, _) => "packed",
            Root::Overlay => "overlay",
        }
    }
}

pub fn cases() -> Vec<Case> {
    use Maker::{QemuImg, TandemImg};
    let roots = [
        Root::Raw,
        Root::Image(Kind::Internal, QemuImg),
        Root::Image(Kind::External, TandemImg),
        Root::Image(Kind::ExternalRaw, QemuImg),
        Root::Image(Kind::Packed, TandemImg),
        Root::Overlay,
    ];
    let mut cases = Vec::new();
    for system in SYSTEMS {
        let name = |of: &str| format!("stock::{}_{of}", system.name());
        // How the disk is stored makes no difference to the larger kernel.
        let count = if system.full { 1 } else { roots.len() };
        for root in roots.into_iter().rev().take(count) {
            let case = Case::new(name(root.name()), move |bench| boots(bench, system, root));
            cases.push(case.of(system));
        }
        if !system.full {
            cases.push(Case::new(name("page"), move |bench| page(bench, system)).of(system));
        }
    }
    cases
}

/// It boots without anything to complain of, writes, and is turned off; what it has written is on the disk.
fn boots(bench: &Bench, system: System, root: Root) -> Result<()> {
    let original = system.file(bench.lab(), "root.raw");
    let copy = bench.scratch("root.raw");
    let mut image = None;
    let disk = match root {
        Root::Raw => {
            convert(bench, "qemu-img".as_ref(), &["-O", "raw"], &original, &copy)?;
            format!("{},format=raw", copy.display())
        }
        Root::Image(kind, maker) => {
            let made = Image::create(bench, "disk.qcow2", kind, maker, "", SIZE)?;
            let program = match maker {
                Maker::QemuImg => PathBuf::from("qemu-img"),
                Maker::TandemImg => bench.tandem_img(),
            };
            let options = ["-n", "-O", "qcow2"];
            convert(bench, &program, &options, &original, &made.path)?;
            let disk = made.path.display().to_string();
            image = Some(made);
            disk
        }
        Root::Overlay => {
            let overlay = bench.scratch("overlay.qcow2");
            let overlay = overlay.display();
            format!("{},format=raw,overlay={overlay}", original.display())
        }
    };
    let said = boot(bench, system, &disk)?;
    let all = |key| values(&said, key).collect::<Vec<_>>();
    let one = |key| all(key).pop().unwrap_or_default().to_owned();
    assert!(one("kernel").starts_with(system.kernel), "{said}");
    assert_eq!(one("kernel").contains("cloud"), !system.full);
    assert_eq!(one("state"), "running");
    assert_eq!(one("root"), "/dev/vda ext4");
    assert_eq!((all("failed"), all("error")), (vec![], vec![]));
    println!("stock::{}: {}", system.name(), one("booted"));
    for warning in all("warning") {
        bench.log(warning);
    }

    let raw = match (root, image) {
        (Root::Image(Kind::ExternalRaw, _), Some(image)) => {
            image.check()?;
            image.data_file.expect("a data file")
        }
        (_, Some(image)) => {
            image.check()?;
            image.convert()?
        }
        (Root::Overlay, None) => {
            let overlay = bench.scratch("overlay.qcow2");
            bench.run(bench.tool("qemu-img").arg("check").arg(&overlay))?;
            let options = ["-f", "qcow2", "-O", "raw"];
            convert(bench, "qemu-img".as_ref(), &options, &overlay, &copy)?;
            copy
        }
        (_, None) => copy,
    };
    bench.run(bench.tool("e2fsck").args(["-f", "-n"]).arg(&raw))?;
    let noise = stdout(
        bench
            .tool("debugfs")
            .args(["-R", "cat /root/noise"])
            .arg(&raw),
    )?;
    let file = bench.scratch("noise");
    fs::write(&file, noise).context("writing the guest's file")?;
    assert_eq!(crate::disk::sha256(&file)?, one("noise"));
    Ok(())
}

fn convert(bench: &Bench, by: &Path, options: &[&str], from: &Path, to: &Path) -> Result<()> {
    let mut convert = bench.tool(by);
    convert.arg("convert").args(options);
    if !options.contains(&"-f") {
        convert.args(["-f", "raw"]);
    }
    run(convert.args([from, to]))
}

/// Logs in and runs [`SCRIPT`]. What the guest has said.
fn boot(bench: &Bench, system: System, disk: &str) -> Result<String> {
    let script = bench.scratch("script");
    // The full kernel looks for partition tables of all kinds, as far as here.
    fs::write(&script, format!("{SCRIPT:\n<16384}")).context("writing the script")?;
    let mut tandem = bench.tool(bench.tandem());
    tandem.args(["run", "--cmdline=root=/dev/vda quiet"]);
    tandem.arg(format!("--memory={MEMORY}K"));
    tandem
        .arg("--kernel")
        .arg(system.file(bench.lab(), "vmlinuz"));
    tandem
        .arg("--initrd")
        .arg(system.file(bench.lab(), "initrd.img"));
    tandem.args(["--disk", disk, "--disk=script,format=raw,readonly=on"]);
    tandem.stdin(Stdio::piped());
    let answers = CONSOLE.login.iter().chain(&[(CONSOLE.prompt, RUN)]);
    let mut answers = answers.peekable();
    let (mut said, mut outcome) = (String::new(), Ok(()));
    let ended = watch(&mut tandem, CONSOLE.limit, |piece, tandem| {
        said.push_str(&String::from_utf8_lossy(piece));
        if let Some((asks, answer)) = answers.peek()
            && plain(&said).ends_with(asks)
        {
            let told = match *answer {
                RUN => tell_memory(system, tandem.id()),
                _ => Ok(()),
            };
            outcome = told.and_then(|()| type_line(tandem, answer));
            answers.next();
        }
    })?;
    bench.log(&format!("$ {}\n{}", shown(&tandem), ended.output));
    outcome?;
    let status = ended.status.expect("it did not end in time");
    assert!(status.success(), "{status}");
    Ok(plain(&ended.output))
}

/// Tells how much memory `tandem`, the process `id`, takes for a guest that has booted and does nothing.
fn tell_memory(system: System, id: u32) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{id}/smaps")).context("reading smaps")?;
    let (guest, resident) = memory(&maps, MEMORY, "Rss:")?;
    let (_, dirty) = memory(&maps, MEMORY, "Private_Dirty:")?;
    println!(
        "stock::{}: {} MiB of the guest's memory, and {resident} KiB, {dirty} KiB of them its own",
        system.name(),
        guest >> 10
    );
    Ok(())
}

/// The commands of the page, for this system: the disk, which has been made by those of its first part, is
/// booted from, grown, and turned off.
fn page(bench: &Bench, system: System) -> Result<()> {
    for name in ["vmlinuz", "initrd.img"] {
        let link = symlink(system.file(bench.lab(), name), bench.scratch(name));
        link.context("linking a file of the lab")?;
    }
    let original = system.file(bench.lab(), "root.raw");
    let copy = bench.scratch("root.raw");
    convert(bench, "qemu-img".as_ref(), &["-O", "raw"], &original, &copy)?;
    // In the machine of the suite all programs are in one place.
    let programs = bench.tandem();
    let programs = programs.parent().unwrap_or(bench.directory()).display();
    let mut terminal = Terminal::open(bench.directory())?;
    terminal.ask(&format!("export PATH=$PATH:{programs}"))?;
    let prompts = [HOST, CONSOLE.prompt];
    let mut steps: Vec<_> = ["Boot it", "Grow it", "Turn it off"]
        .into_iter()
        .flat_map(|title| steps(PAGE, title, &prompts))
        .collect();
    for step in &mut steps {
        step.command = step.command.replace("/sbin/debugfs", "debugfs");
    }
    let boots = |step: &crate::page::Step| step.command.starts_with("tandem run ");
    let boot = steps.iter().position(boots).expect("a boot");
    for step in &steps[..boot] {
        terminal.perform(bench, step)?;
    }
    let booted = CONSOLE.perform(bench, &mut terminal, &steps[boot..])?;
    for step in &steps[boot + booted..] {
        terminal.perform(bench, step)?;
    }
    Ok(())
}
