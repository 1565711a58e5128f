//! `tandem serve` and `tandem run` are killed hard, again and again, while somebody writes to their
//! disks. What had been flushed is there afterwards, a sector written since is old or new, nothing else
//! has changed, and QEMU finds leaked clusters at worst. Then the next one goes on with the same image.
//!
//! The programs are those that `cargo build` has put beside this one. `TANDEM_KILLS=200` has so many of
//! them killed on each image.

mod client;
#[path = "../../bare-guest/src/content.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod content;
#[path = "../bare_guest/guest.rs"]
mod guest;
mod history;
mod image;
mod run;
mod serve;
#[path = "../common/vhost_client.rs"]
mod vhost_client;

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often to kill on each image: `plain` times, or as the environment says.
fn kills(plain: u64) -> u64 {
    let asked = std::env::var("TANDEM_KILLS").ok();
    asked.and_then(|kills| kills.parse().ok()).unwrap_or(plain)
}

/// One of the programs under test.
fn program(name: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let directory = this.parent().and_then(|deps| deps.parent()).unwrap();
    let program = directory.join(name);
    assert!(program.exists(), "no {program:?}: run cargo build --bins");
    program
}

/// A program that runs until it is killed, by the end of this value at the latest.
struct Running(Child);

impl Running {
    fn start(mut command: Command) -> Self {
        Self(command.stdin(Stdio::null()).spawn().unwrap())
    }

    fn assert_running(&mut self) {
        let status = self.0.try_wait().unwrap();
        assert!(status.is_none(), "it has ended by itself: {status:?}");
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        let status = self.0.wait().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended, unless the test fails.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// xorshift64
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % end
    }
}
