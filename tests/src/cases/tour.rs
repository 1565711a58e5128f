//! The tour of the README, command by command as it is written there.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::demo;
use crate::error::{Context, Error, Result};
use crate::guest::initrd;
use crate::lab::Kernel;
use crate::process::{self, command};
use crate::suite::{Bench, Case};

const README: &str = include_str!("../../../README.md");
const HOST: &str = "$ ";
const GUEST: &str = "/ # ";
const LIMIT: Duration = Duration::from_secs(300);
/// What the guest is asked again for, as it is told of some things a moment later.
const PATIENCE: usize = 50;

pub fn cases() -> Vec<Case> {
    vec![Case::new("tour", tour)]
}

/// A command, at one of the prompts, and what it prints, in which `…` stands for any text.
struct Step {
    at: &'static str,
    command: &'static str,
    prints: String,
}

/// The steps in the console blocks of the tour.
fn steps() -> Vec<Step> {
    let tour = README.split_once("\n## A tour\n").expect("a tour").1;
    let tour = tour.split("\n## ").next().unwrap_or_default();
    let mut steps: Vec<Step> = Vec::new();
    for block in tour.split("```console\n").skip(1) {
        for line in block.split("```").next().unwrap_or_default().lines() {
            let typed = [HOST, GUEST]
                .into_iter()
                .find_map(|at| Some((at, line.strip_prefix(at)?)));
            match (typed, steps.last_mut()) {
                (Some((at, command)), _) => steps.push(Step {
                    at,
                    // Behind it is what it is for.
                    command: command.split("  #").next().unwrap_or_default(),
                    prints: String::new(),
                }),
                (None, Some(step)) => step.prints += &format!("{line}\n"),
                (None, None) => panic!("{line} is before any command"),
            }
        }
    }
    steps
}

/// Whether `text` is what `pattern` tells.
fn fits(text: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('…');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, between)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in between {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// A shell that commands are typed into.
struct Terminal {
    shell: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Terminal {
    fn open(bench: &Bench) -> Result<Self> {
        let mut shell = bench.tool("sh");
        shell.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = shell.spawn().context("starting a shell")?;
        let pipes = shell.stdin.take().zip(shell.stdout.take());
        let (input, output) = pipes.ok_or_else(|| Error::new("the shell has no pipes"))?;
        let output = BufReader::new(output);
        let mut terminal = Self {
            shell,
            input,
            output,
        };
        terminal.ask("exec 2>&1").map(|_| terminal)
    }

    /// What `line` prints, and its exit status.
    fn ask(&mut self, line: &str) -> Result<(String, String)> {
        let context = || format!("typing {line}");
        writeln!(self.input, "{line}\necho \"@ status $?\"").context(context())?;
        let mut printed = String::new();
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line).context(context())? == 0 {
                return Err(Error::new(format!("{}: the shell has ended", context())));
            }
            match line.strip_prefix("@ status ") {
                Some(status) => return Ok((printed, status.trim_end().to_owned())),
                None => printed += &line,
            }
        }
    }

    fn perform(&mut self, bench: &Bench, step: &Step) -> Result<()> {
        let (printed, status) = self.ask(step.command)?;
        bench.log(&format!("$ {}\n{printed}", step.command));
        assert_eq!(status, "0", "{}: {printed}", step.command);
        let is_told = step.prints.is_empty() || fits(&printed, &step.prints);
        assert!(is_told, "{}: {printed}", step.command);
        Ok(())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.shell.kill().and_then(|()| self.shell.wait());
    }
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
    let steps = steps();
    let boots = |step: &Step| step.command.starts_with("tandem run ");
    let boot = steps.iter().position(boots).expect("a boot");
    let mut terminal = Terminal::open(bench)?;
    for step in &steps[..boot] {
        terminal.perform(bench, step)?;
    }
    let booted = 1 + with_guest(bench, &mut terminal, &steps[boot], &steps[boot + 1..])?;
    for step in &steps[boot + booted..] {
        terminal.perform(bench, step)?;
    }
    Ok(())
}

/// Boots by `boot`, in a terminal of its own, and performs steps until the guest has ended. Returns how
/// many.
fn with_guest(
    bench: &Bench,
    terminal: &mut Terminal,
    boot: &Step,
    steps: &[Step],
) -> Result<usize> {
    let mut tandem = command("sh");
    tandem.stdin(Stdio::piped());
    tandem.args(["-c", &format!("exec {}", boot.command)]);
    tandem.current_dir(terminal.ask("pwd")?.0.trim_end());
    tandem.env("PATH", terminal.ask("echo \"$PATH\"")?.0.trim_end());
    let (mut shown, mut at, mut asked) = (String::new(), 0, 0);
    let mut outcome = Ok(());
    let ended = process::watch(&mut tandem, LIMIT, |piece, tandem| {
        shown.push_str(&String::from_utf8_lossy(piece));
        // The shell asks where the cursor is.
        shown = shown.replace("\x1b[6n", "");
        if outcome.is_err() || !shown.ends_with(GUEST) {
            return;
        }
        let answer = std::mem::take(&mut shown).replace('\r', "");
        outcome = (|| {
            let answer = answer.strip_suffix(GUEST).unwrap_or(&answer);
            let printed = answer.split_once('\n').map_or("", |(_, printed)| printed);
            if asked > 0 && fits(printed, &steps[at].prints) {
                (at, asked) = (at + 1, 0);
            }
            while asked == 0 && steps[at].at == HOST {
                terminal.perform(bench, &steps[at])?;
                at += 1;
            }
            if asked > 0 {
                assert!(asked < PATIENCE, "{}: {printed}", steps[at].command);
                sleep(Duration::from_millis(200));
            }
            asked += 1;
            let input = tandem.stdin.as_mut();
            let input = input.ok_or_else(|| Error::new("the guest takes no input"))?;
            writeln!(input, "{}", steps[at].command).context("typing in the guest")
        })();
        if outcome.is_err() {
            let _ = tandem.kill();
        }
    })?;
    bench.log(&ended.output);
    outcome?;
    let status = ended.status.expect("the guest did not end in time");
    assert!(status.success(), "{status}");
    // The last command ends the guest, and no prompt follows.
    Ok(at + 1)
}
