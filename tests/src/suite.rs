//! The runner of the guest suite: a table of cases, one line for each.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread;
use std::time::Instant;

use crate::error::{Context, Error, Result};
use crate::guest::{base_initrd, tools_disk};
use crate::lab::Lab;
use crate::process;
use crate::stock::System;

/// A named test, which fails by an error or a panic.
pub struct Case {
    name: String,
    run: Box<Test>,
    needs_kvm: bool,
    system: Option<System>,
}

type Test = dyn Fn(&Bench) -> Result<()> + Send;

impl Case {
    /// A case for the table.
    pub fn new(
        name: impl Into<String>,
        run: impl Fn(&Bench) -> Result<()> + Send + 'static,
    ) -> Self {
        Case {
            name: name.into(),
            run: Box::new(run),
            needs_kvm: true,
            system: None,
        }
    }

    /// The same case, whose guests run without KVM.
    pub fn without_kvm(self) -> Self {
        Case {
            needs_kvm: false,
            ..self
        }
    }

    /// The same case, which boots `system`.
    pub fn of(self, system: System) -> Self {
        Case {
            system: Some(system),
            ..self
        }
    }

    /// The system that it boots, if that is not the busybox of all others.
    pub fn system(&self) -> Option<System> {
        self.system
    }

    /// Whether it runs where the cases with one of `words` in their names are to, or all if there are none.
    /// One of a system, which takes minutes to make, does so only if it is the systems that are asked
    /// for, and not a kind of disk that others have, too.
    pub fn is_asked_for(&self, words: &[String]) -> bool {
        let means_systems = |word: &String| match self.system {
            Some(system) => ["stock", system.suite]
                .iter()
                .any(|name| word.contains(name)),
            None => true,
        };
        match words {
            [] => self.system.is_none(),
            _ => words
                .iter()
                .any(|word| self.name.contains(word) && means_systems(word)),
        }
    }

    /// Whether its guests need KVM: it runs in the emulated machine where there is none.
    pub fn needs_kvm(&self) -> bool {
        self.needs_kvm
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// What all cases share.
#[derive(Clone)]
pub struct Setting {
    /// The kernels and busybox.
    pub lab: Arc<Lab>,
    /// The initrd of the guests, without a script.
    pub initrd: PathBuf,
    /// The directory of `tandem` and `tandem-img`.
    pub programs: PathBuf,
    /// How many rounds cases make that can make any number.
    pub rounds: u64,
}

impl Setting {
    /// The lab in `lab`, the initrd made anew in it, and the programs that `cargo build` has put
    /// beside this one.
    pub fn of_build(lab: &Path) -> Result<Self> {
        let initrd = lab.join("guest-initrd");
        let lab = Lab::open(lab)?;
        fs::write(&initrd, base_initrd(&lab)?).context(format!("writing {initrd:?}"))?;
        tools_disk(&tools_beside(&initrd))?;
        let this = std::env::current_exe().context("finding this program")?;
        let programs = this.parent().unwrap_or(Path::new("/")).to_owned();
        for program in ["tandem", "tandem-img"] {
            if !programs.join(program).exists() {
                return Err(Error::new(format!(
                    "no {program} in {programs:?}: run cargo build --workspace (same profile)"
                )));
            }
        }
        Ok(Setting {
            lab: Arc::new(lab),
            initrd,
            programs,
            rounds: 1,
        })
    }
}

/// Where the disk with large tools is: beside the initrd.
pub fn tools_beside(initrd: &Path) -> PathBuf {
    initrd.with_file_name("guest-tools")
}

/// What a case works with: the setting, a directory of its own, and a log that is shown when the
/// case fails.
pub struct Bench {
    setting: Setting,
    directory: PathBuf,
    log: Mutex<String>,
}

impl Bench {
    /// A bench whose files are in `directory`, which is made.
    pub fn new(setting: Setting, directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).context(format!("making {directory:?}"))?;
        let directory = directory
            .canonicalize()
            .context(format!("finding {directory:?}"))?;
        Ok(Bench {
            setting,
            directory,
            log: Mutex::default(),
        })
    }

    /// The kernel and the other files of the lab.
    pub fn lab(&self) -> &Lab {
        &self.setting.lab
    }

    /// The initrd of the guests, without a script.
    pub fn base_initrd(&self) -> &Path {
        &self.setting.initrd
    }

    /// The disk with tools that are too large for the initrd.
    pub fn tools_disk(&self) -> PathBuf {
        tools_beside(&self.setting.initrd)
    }

    /// The program `tandem`.
    pub fn tandem(&self) -> PathBuf {
        self.setting.programs.join("tandem")
    }

    /// The program `tandem-img`.
    pub fn tandem_img(&self) -> PathBuf {
        self.setting.programs.join("tandem-img")
    }

    /// How many rounds to make, where any number is possible.
    pub fn rounds(&self) -> u64 {
        self.setting.rounds
    }

    /// The directory of this case.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A file in the directory of this case.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Adds to the log.
    pub fn log(&self, text: &str) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.push_str(text.trim_end());
        log.push('\n');
    }

    /// A command that runs in the directory of this case: QEMU looks for a data file in the
    /// current directory, not in the image's.
    pub fn tool(&self, program: impl AsRef<OsStr>) -> Command {
        let mut tool = process::command(program);
        tool.current_dir(&self.directory);
        tool
    }

    /// Runs a command that must succeed, and logs it with its output.
    pub fn run(&self, command: &mut Command) -> Result<()> {
        let output = process::stdout(command)?;
        self.log(&format!(
            "$ {}\n{}",
            process::shown(command),
            String::from_utf8_lossy(&output)
        ));
        Ok(())
    }
}

/// Where and how cases run.
pub struct Runner {
    /// What all cases share.
    pub setting: Setting,
    /// A directory for the cases' files; those of failed cases are left there.
    pub scratch: PathBuf,
    /// How many cases run at a time.
    pub jobs: usize,
}

impl Runner {
    /// Runs the cases, prints a line for each and the closing line in cargo's form, and says
    /// whether all passed.
    pub fn run(&self, cases: Vec<Case>, filtered_out: usize) -> bool {
        println!("\nrunning {} tests", cases.len());
        let started = Instant::now();
        let total = cases.len();
        let failed = Mutex::new(Vec::new());
        let queue = Mutex::new(VecDeque::from(cases));
        let next = || {
            queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front()
        };
        keep_panics();
        thread::scope(|scope| {
            for _ in 0..self.jobs {
                scope.spawn(|| {
                    while let Some(case) = next() {
                        if !self.run_one(&case) {
                            failed
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .push(case.name);
                        }
                    }
                });
            }
        });
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !failed.is_empty() {
            println!("\nfailures:\n    {}", failed.join("\n    "));
        }
        println!(
            "\ntest result: {}. {} passed; {} failed; 0 ignored; 0 measured; {filtered_out} filtered \
             out; finished in {:.2}s\n",
            if failed.is_empty() { "ok" } else { "FAILED" },
            total - failed.len(),
            failed.len(),
            started.elapsed().as_secs_f64(),
        );
        failed.is_empty()
    }

    fn run_one(&self, case: &Case) -> bool {
        let started = Instant::now();
        let directory = self.scratch.join(case.name.replace("::", "-"));
        let (outcome, log) = match Bench::new(self.setting.clone(), &directory) {
            Ok(bench) => (
                caught(|| (case.run)(&bench)),
                bench
                    .log
                    .into_inner()
                    .unwrap_or_else(PoisonError::into_inner),
            ),
            Err(error) => (Err(error), String::new()),
        };
        let reason = outcome.err().map(|error| error.to_string());
        let seconds = started.elapsed().as_secs_f64();
        match &reason {
            None => println!("test {} ... ok ({seconds:.1} s)", case.name),
            // One call, so that the lines of two cases don't mix.
            Some(reason) => println!(
                "test {} ... FAILED ({seconds:.1} s)\n{}\n{}\n---- end of {}",
                case.name,
                indented(reason),
                indented(tail(&log, 60)),
                case.name
            ),
        }
        if reason.is_none() {
            // What is left over is in the way of nothing.
            let _ = fs::remove_dir_all(&directory);
        }
        reason.is_none()
    }
}

thread_local! {
    /// In a thread that runs a case: what its panic said, and where.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// From now on a panic in a case is kept for the case's report; others are printed as ever.
fn keep_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let kept = PANIC.with_borrow_mut(|panic| {
                panic
                    .as_mut()
                    .map(|message| *message = info.to_string())
                    .is_some()
            });
            if !kept {
                print(info);
            }
        }));
    });
}

/// Runs a case; its panic becomes an error.
fn caught(case: impl FnOnce() -> Result<()>) -> Result<()> {
    PANIC.set(Some(String::new()));
    let outcome = panic::catch_unwind(AssertUnwindSafe(case));
    let message = PANIC.take().unwrap_or_default();
    outcome.unwrap_or_else(|_| Err(Error::new(message)))
}

/// The last `lines` lines.
fn tail(text: &str, lines: usize) -> &str {
    let start = text
        .rmatch_indices('\n')
        .nth(lines)
        .map_or(0, |(at, _)| at + 1);
    &text[start..]
}

fn indented(text: &str) -> String {
    text.lines()
        .map(|line| format!("    | {}", line.trim_end()))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stock::SYSTEMS;

    #[test]
    fn systems_run_only_if_they_are_asked_for() {
        let case = |name| Case::new(name, |_| Ok(()));
        let plain = case("roundtrip::internal");
        let of_system = case("stock::bookworm_internal").of(SYSTEMS[0]);
        for (words, expected) in [
            ("", [true, false]),
            ("internal", [true, false]),
            ("stock", [false, true]),
            ("bookworm_internal", [false, true]),
            ("trixie", [false, false]),
            ("trixie internal bookworm", [true, true]),
        ] {
            let words: Vec<_> = words.split_whitespace().map(str::to_owned).collect();
            let found = [&plain, &of_system].map(|case| case.is_asked_for(&words));
            assert_eq!(found, expected, "{words:?}");
        }
    }

    #[test]
    fn the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(tail("a\nb\n", 5), "a\nb\n");
    }

    #[test]
    fn an_error_and_a_panic_fail_and_leave_their_files() {
        let lab_dir = tempfile::tempdir().unwrap();
        for file in ["kernel/vmlinuz", "busybox/bin/busybox"] {
            let path = lab_dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let scratch = tempfile::tempdir().unwrap();
        let runner = Runner {
            setting: Setting {
                lab: Arc::new(Lab::open(lab_dir.path()).unwrap()),
                initrd: PathBuf::new(),
                programs: PathBuf::new(),
                rounds: 1,
            },
            scratch: scratch.path().into(),
            jobs: 2,
        };
        let leave_file = |bench: &Bench| {
            fs::write(bench.scratch("left"), "").unwrap();
            Ok(())
        };
        let passing = || Case::new("passes", leave_file);
        assert!(runner.run(vec![passing()], 0));
        assert!(!runner.run(
            vec![
                passing(),
                Case::new("gives::error", move |bench| {
                    leave_file(bench)?;
                    Err(Error::new("no"))
                }),
                Case::new("panics", move |bench| {
                    leave_file(bench)?;
                    panic!("no")
                }),
            ],
            0
        ));
        assert!(!scratch.path().join("passes").exists());
        assert!(scratch.path().join("gives-error/left").exists());
        assert!(scratch.path().join("panics/left").exists());
    }
}
