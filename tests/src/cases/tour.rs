//! The tour of the README, command by command as it is written there.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use crate::demo;
use crate::error::{Context, Result};
use crate::guest::initrd;
use crate::lab::Kernel;
use crate::page::{Console, HOST, Step, Terminal, steps};
use crate::suite::{Bench, Case};

const README: &str = include_str!("../../../README.md");
/// The shell of the demo, which the last command ends.
const CONSOLE: Console = Console {
    prompt: "/ # ",
    login: &[],
    last: "exit",
    limit: Duration::from_secs(300),
};

pub fn cases() -> Vec<Case> {
    vec![Case::new("tour", tour)]
}

/// What the demo leaves: a disk, and what it boots with.
fn prepare(bench: &Bench) -> Result<()> {
    let target = bench.scratch("target");
    fs::create_dir_all(target.join("lab/kernel")).context("making directories")?;
    fs::create_dir_all(target.join("demo")).context("making directories")?;
    let programs = bench.tandem();
    let links = [
        (programs.parent().unwrap_or(&target), "release"),
        (&bench.lab().kernel(Kernel::BzImage), "lab/kernel/vmlinuz"),
    ];
    for (to, name) in links {
        symlink(to, target.join(name)).context(format!("linking {name}"))?;
    }
    demo::root(bench.lab())?.ext4(&target.join("demo/image.raw"), demo::SIZE)?;
    let made = initrd(
        bench,
        "mount -t ext4 /dev/vda /mnt\nmount --move /dev /mnt/dev\ntouch /switch_root\n",
    )?;
    fs::rename(made, target.join("demo/initrd")).context("moving the initrd")
}

fn tour(bench: &Bench) -> Result<()> {
    prepare(bench)?;
    let steps = steps(README, "A tour", &[HOST, CONSOLE.prompt]);
    let boots = |step: &Step| step.command.starts_with("tandem run ");
    let boot = steps.iter().position(boots).expect("a boot");
    let mut terminal = Terminal::open(bench.directory())?;
    for step in &steps[..boot] {
        terminal.perform(bench, step)?;
    }
    let booted = CONSOLE.perform(bench, &mut terminal, &steps[boot..])?;
    for step in &steps[boot + booted..] {
        terminal.perform(bench, step)?;
    }
    Ok(())
}
