//! Commands of a page of the documentation, performed as they are written there.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::process::{self, command};
use crate::suite::Bench;

/// The prompt of a user's shell.
pub const HOST: &str = "$ ";
/// The prompt of root's shell.
pub const ROOT: &str = "# ";
/// What the guest is asked again for, as it is told of some things a moment later.
const PATIENCE: usize = 50;

/// A command, at one of the prompts, and what it prints, in which `…` stands for any text.
pub struct Step {
    /// The prompt.
    pub at: &'static str,
    /// The command, of one line.
    pub command: String,
    /// What it prints; nothing if the page does not tell.
    pub prints: String,
}

/// The steps in the console blocks of the section `title` of `page`, at these prompts.
pub fn steps(page: &str, title: &str, prompts: &[&'static str]) -> Vec<Step> {
    let section = page.split_once(&format!("\n## {title}\n"));
    let (_, section) = section.unwrap_or_else(|| panic!("a section {title}"));
    let section = section.split("\n## ").next().unwrap_or_default();
    let section = section.replace("\\\n", "");
    let mut steps: Vec<Step> = Vec::new();
    for block in section.split("```console\n").skip(1) {
        for line in block.split("```").next().unwrap_or_default().lines() {
            let typed = prompts
                .iter()
                .find_map(|at| Some((*at, line.strip_prefix(at)?)));
            match (typed, steps.last_mut()) {
                (Some((at, command)), _) => steps.push(Step {
                    at,
                    // Behind it is what it is for.
                    command: command.split("  #").next().unwrap_or_default().into(),
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
pub struct Terminal {
    shell: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Terminal {
    /// A shell in `directory`.
    pub fn open(directory: &Path) -> Result<Self> {
        let mut shell = command("sh");
        shell.current_dir(directory);
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
    pub fn ask(&mut self, line: &str) -> Result<(String, String)> {
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

    /// Types the command of `step`, which must succeed and print what the page tells.
    pub fn perform(&mut self, bench: &Bench, step: &Step) -> Result<()> {
        let (printed, status) = self.ask(&step.command)?;
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

/// How a guest is talked to on its console.
pub struct Console {
    /// The prompt of its shell.
    pub prompt: &'static str,
    /// What is answered to what it asks for before there is a shell.
    pub login: &'static [(&'static str, &'static str)],
    /// The command after which nothing more is typed.
    pub last: &'static str,
    /// How long the guest may take.
    pub limit: Duration,
}

impl Console {
    /// Performs `steps`, the first of which boots a guest in a terminal of its own, until the guest has ended.
    /// Returns how many these were.
    pub fn perform(&self, bench: &Bench, terminal: &mut Terminal, steps: &[Step]) -> Result<usize> {
        let (boot, steps) = steps.split_first().expect("a boot");
        let mut tandem = command("sh");
        tandem.stdin(Stdio::piped());
        tandem.args(["-c", &format!("exec {}", boot.command)]);
        tandem.current_dir(terminal.ask("pwd")?.0.trim_end());
        tandem.env("PATH", terminal.ask("echo \"$PATH\"")?.0.trim_end());
        let (mut shown, mut at, mut asked) = (String::new(), 0, 0);
        let mut outcome = Ok(());
        let ended = process::watch(&mut tandem, self.limit, |piece, tandem| {
            shown.push_str(&String::from_utf8_lossy(piece));
            let said = plain(&shown);
            let asks = self.login.iter().find(|(asks, _)| said.ends_with(asks));
            if outcome.is_err() || (asks.is_none() && !said.ends_with(self.prompt)) {
                return;
            }
            shown.clear();
            outcome = (|| {
                if let Some((_, answer)) = asks {
                    return type_line(tandem, answer);
                }
                let answer = said.strip_suffix(self.prompt).unwrap_or(&said);
                let printed = answer.split_once('\n').map_or("", |(_, printed)| printed);
                if asked > 0 && steps[at].command == self.last {
                    return Ok(());
                }
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
                type_line(tandem, &steps[at].command)
            })();
            if outcome.is_err() {
                let _ = tandem.kill();
            }
        })?;
        bench.log(&ended.output);
        outcome?;
        let status = ended.status.expect("the guest did not end in time");
        assert!(status.success(), "{status}");
        // The boot, and the last command, which no prompt follows.
        Ok(at + 2)
    }
}

/// Types a line.
pub fn type_line(tandem: &mut Child, line: &str) -> Result<()> {
    let console = tandem.stdin.as_mut();
    let console = console.ok_or_else(|| Error::new("the console takes no input"))?;
    writeln!(console, "{line}").context("typing on the console")
}

/// What a console has shown, without what is meant for a terminal.
pub fn plain(shown: &str) -> String {
    let mut text = String::with_capacity(shown.len());
    let mut rest = shown.chars();
    while let Some(c) = rest.next() {
        match c {
            '\r' => {}
            '\x1b' => match rest.next() {
                Some('[') => drop(rest.find(|c| ('@'..='~').contains(c))),
                Some(']') => drop(rest.find(|c| "\x07\x1b".contains(*c))),
                _ => {}
            },
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pattern_fits() {
        assert!(fits("a\nb\nc\n", "a\n…c\n") && fits("", "") && fits("ab", "…"));
        assert!(!fits("a\nb\n", "a\n") && !fits("b", "a…") && !fits("abc", "a…x…c"));
    }

    #[test]
    fn steps_of_a_section() {
        let page =
            "\n## One\n```console\n$ a \\\n  b\nc\n# d  # why\n```\n## Two\n```console\n$ e\n```\n";
        let steps = steps(page, "One", &[HOST, ROOT]);
        let seen: Vec<_> = steps
            .iter()
            .map(|s| (s.at, s.command.as_str(), s.prints.as_str()))
            .collect();
        assert_eq!(seen, [(HOST, "a   b", "c\n"), (ROOT, "d", "")]);
    }

    #[test]
    fn a_terminal_is_told_things() {
        let shown = "\x1b[!p\x1b]104\x07\x1b[?7h\x1b[6nguest \x1b[0;1mlogin\x1b[0m: \r\n\x1b[?20";
        assert_eq!(plain(shown), "guest login: \n");
    }
}
