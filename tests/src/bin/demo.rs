//! The demo: a small Linux whose root disk is a qcow2 image with its data in a raw file.

use std::fs;
use std::io::{IsTerminal, stdin};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use tandem_tests::emulated::Machine;
use tandem_tests::error::{Context, Error, Result};
use tandem_tests::guest::{probe, root_initrd};
use tandem_tests::lab::Kernel;
use tandem_tests::process::{self, command};
use tandem_tests::suite::{Bench, Setting};
use tandem_tests::tree::{Tree, find_program};

const TARGET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
const SIZE: &str = "64M";
const LIMIT: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let target = Path::new(TARGET)
        .canonicalize()
        .context("finding the target directory")?;
    let setting = Setting::of_build(&target.join("lab"))?;
    let directory = target.join("demo");
    fs::create_dir_all(&directory).context(format!("making {directory:?}"))?;
    let demo = Demo { setting, directory };

    if demo.file("image.qcow2").exists() {
        heading("The root disk of the last run is still there; rm -r target/demo starts afresh");
    } else {
        heading("A root disk: the image has the metadata, image.raw the data, as a plain disk");
        demo.make_disk()?;
    }
    fs::write(demo.file("initrd"), root_initrd(&demo.setting.lab)?)
        .context("writing the initrd")?;

    let bench = Bench::new(demo.setting.clone(), &target.join("lab/probe"))?;
    match probe(&bench) {
        Ok(()) => {
            heading("Linux boots from it");
            demo.boot_here()?;
        }
        Err(reason) => {
            heading(&format!(
                "{reason}; so Linux boots from it in an emulated AMD machine"
            ));
            demo.boot_emulated()?;
        }
    }
    heading("Back on the host: the guest's file, read from image.raw without Tandem");
    demo.show(command(find_program("debugfs".as_ref())?).args(["-R", "cat /hello", "image.raw"]))?;
    heading("What QEMU says of the image");
    demo.show(command("qemu-img").args(["info", "image.qcow2"]))?;
    demo.show(command("qemu-img").args(["check", "image.qcow2"]))
}

struct Demo {
    setting: Setting,
    directory: PathBuf,
}

impl Demo {
    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn make_disk(&self) -> Result<()> {
        let root = tandem_tests::demo::root(&self.setting.lab)?;
        let tree = self.file("root");
        let _ = fs::remove_dir_all(&tree);
        root.write_to(&tree)?;
        let options = "data_file=image.raw,data_file_raw=on";
        let made = self
            .show(command(self.setting.programs.join("tandem-img")).args([
                "create",
                "-f",
                "qcow2",
                "-o",
                options,
                "image.qcow2",
                SIZE,
            ]))
            .and_then(|()| {
                self.show(
                    command(find_program("mke2fs".as_ref())?)
                        .args(["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0"])
                        .args(["-d", "root", "image.raw"]),
                )
            });
        if made.is_err() {
            let _ = fs::remove_file(self.file("image.qcow2"));
        }
        fs::remove_dir_all(&tree).context(format!("removing {tree:?}"))?;
        made
    }

    /// `tandem run` and its arguments; the kernel is at `kernel`.
    fn tandem(&self, program: &Path, kernel: &Path) -> Command {
        let mut tandem = Command::new(program);
        tandem
            .args(["run", "--kernel"])
            .arg(kernel)
            .args(["--initrd", "initrd"]);
        tandem.args(["--disk", "image.qcow2", "--cmdline"]);
        tandem.arg(if stdin().is_terminal() {
            "quiet demo.shell"
        } else {
            "quiet"
        });
        tandem
    }

    fn boot_here(&self) -> Result<()> {
        let kernel = self.setting.lab.kernel(Kernel::BzImage);
        self.show(&mut self.tandem(&self.setting.programs.join("tandem"), &kernel))
    }

    /// Boots in the emulated machine, and brings the disk back from there.
    fn boot_emulated(&self) -> Result<()> {
        let mut tree = Tree::default();
        tree.program(self.setting.programs.join("tandem"))?;
        tree.copy("/vmlinuz", self.setting.lab.kernel(Kernel::BzImage));
        for name in ["image.qcow2", "image.raw", "initrd"] {
            tree.copy(Path::new("/out/demo").join(name), self.file(name));
        }
        let tandem = self.tandem(Path::new("tandem"), Path::new("/vmlinuz"));
        let line = quoted(&tandem);
        let payload = format!(
            "#!/bin/sh\ncd /out/demo\necho '$ '{}\n{line}\n",
            quote(&line)
        );
        let machine =
            Machine::new(&self.setting.lab, self.directory.join("machine"), LIMIT).interactive();
        let status = machine.run(tree, &payload)?;
        let back = machine.copy_out("/out/demo", &self.file("back"))?;
        for name in ["image.qcow2", "image.raw"] {
            fs::rename(back.join(name), self.file(name)).context(format!("taking back {name}"))?;
        }
        if status != 0 {
            return Err(Error::new(format!("tandem ended with status {status}")));
        }
        Ok(())
    }

    /// Prints a command and runs it, with this program's own input and output.
    fn show(&self, command: &mut Command) -> Result<()> {
        println!("$ {}", process::shown(command));
        let status = command.current_dir(&self.directory).status();
        let status = status.context(process::shown(command))?;
        if !status.success() {
            return Err(Error::new(format!(
                "{} ended with {status}",
                process::shown(command)
            )));
        }
        Ok(())
    }
}

fn heading(text: &str) {
    println!("\n== {text}");
}

/// A command line for a shell.
fn quoted(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| quote(&word.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}

fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}
