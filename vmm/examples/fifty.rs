//! Runs fifty guests at once from one disk, and tells how much memory that takes:
//!
//! ```text
//! cargo run --release --example fifty -- vmlinuz initrd.img base.raw 'echo hello'
//! ```
//!
//! All of them have been built before the first one runs. What a guest can take is bounded: its memory,
//! what is kept of its output, and what a disk needs in this process.

#[path = "sandbox.rs"]
#[allow(dead_code, reason = "this is a program of its own as well")]
pub mod sandbox;

use std::error::Error;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use sandbox::{Guest, MEMORY, Outcome, Setting};

pub const GUESTS: usize = 50;

/// Runs `command` in `count` guests at once.
pub fn run_all(
    setting: &Setting,
    command: &str,
    count: usize,
) -> Result<Vec<Outcome>, Box<dyn Error>> {
    // Each has some twenty descriptors.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;

    let guests = (0..count).map(|_| Guest::build(setting, command));
    let guests: Vec<_> = guests.collect::<Result<_, _>>()?;
    let running: Vec<_> = guests
        .into_iter()
        .map(|guest| thread::spawn(move || guest.run().map_err(|error| error.to_string())))
        .collect();
    let ended = running.into_iter().map(|guest| {
        let outcome = guest.join().map_err(|_| "a guest's thread has panicked")?;
        Ok(outcome?)
    });
    ended.collect()
}

/// The most memory that this process has had, in MiB, that of guests included.
pub fn peak_memory() -> Result<u64, Box<dyn Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB"));
    Ok(kib.ok_or("no VmHWM")?.trim().parse::<u64>()? >> 10)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [kernel, initrd, base, command] = &arguments[..] else {
        return Err("usage: fifty KERNEL INITRD BASE COMMAND".into());
    };
    let path = |text: &str| Path::new(text).to_owned();
    let setting = Setting {
        kernel: path(kernel),
        initrd: Some(path(initrd)),
        base: path(base),
        scratch: None,
        limit: Duration::from_secs(600),
    };
    let begin = Instant::now();
    let outcomes = run_all(&setting, command, GUESTS)?;
    let took = begin.elapsed().as_millis();
    let succeeded = outcomes.iter().filter(|outcome| outcome.status == Ok(0));
    let peak = peak_memory()?;
    println!(
        "{} of {GUESTS} guests have succeeded, after {took} ms; at most {peak} MiB of memory, {} a guest, \
         of which its own could be {}",
        succeeded.count(),
        peak / GUESTS as u64,
        MEMORY >> 20,
    );
    Ok(())
}
