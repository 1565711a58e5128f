//! What this process may still do once a guest runs: a guest, or a front end, that took over one of
//! its threads by a bug is to find nothing there that it could use.
//!
//! Two parts, each of which needs no privilege, and cannot be undone:
//!
//! * [`enter`] confines a thread, and those that it starts, to the system calls of its [`Role`]. No
//!   role starts programs, makes sockets, or maps memory to be executed; only [`Role::Control`] opens
//!   files. What is forbidden ends the process, after a line on standard error.
//! * [`confine_files`] keeps a thread, and those that it starts, from all files that are not open yet.
//!
//! The program `tandem` has both in force before the guest's first instruction. A library does not
//! confine the process of its user unasked: [`Config::seccomp`](crate::Config::seccomp) has the threads of a
//! VM enter their roles, and the thread of [`Server::run`](crate::Server::run) may enter
//! [`Role::Server`] before.
//!
//! ```no_run
//! use tandem_vmm::sandbox::{FileRules, confine_files};
//! use tandem_vmm::{Config, Vmm};
//!
//! let mut config = Config::new("/boot/vmlinuz");
//! config.seccomp = true;
//! let vmm = Vmm::build(&config)?;
//! // All files are open. Call it on the only thread: others, if there are any, stay as they are.
//! confine_files(&FileRules::default())?;
//! vmm.run()?;
//! # Ok::<(), tandem_vmm::Error>(())
//! ```
//!
//! All this needs the cargo feature `sandbox`. Without it, there is but [`Role`], and a
//! [`Config`](crate::Config) that asks for it is refused.

#[cfg(not(feature = "sandbox"))]
mod absent;
#[cfg(feature = "sandbox")]
mod calls;
#[cfg(feature = "sandbox")]
mod files;
#[cfg(feature = "sandbox")]
mod filters;
#[cfg(feature = "sandbox")]
mod violation;

use std::io;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

use crate::error::{HostContext, Result};

#[cfg(not(feature = "sandbox"))]
pub(crate) use absent::{enter, hint, install_handler};
#[cfg(feature = "sandbox")]
pub(crate) use files::hint;
#[cfg(feature = "sandbox")]
pub use files::{Enforced, FileRules, confine_files, is_refusal};
#[cfg(feature = "sandbox")]
pub use filters::enter;
#[cfg(feature = "sandbox")]
pub(crate) use violation::install_handler;

/// What a thread does, which decides what it may ask of the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Waits for the console, for signals and for the end of a VM, and closes its disks.
    Main,
    /// Runs a CPU, or serves a queue: the threads of queues are started by those of CPUs.
    Cpu,
    /// Carries out requests of a [`ControlSocket`](crate::ControlSocket).
    Control,
    /// Writes metrics, or watches block devices grow.
    Watch,
    /// Serves a vhost-user front end, and its queues.
    Server,
}

/// Starts a thread that carries out `body`. Where it has a `role`, it has entered that on return.
pub(crate) fn spawn(
    name: String,
    role: Option<Role>,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>> {
    let (sender, entered) = sync_channel(1);
    let body = move || {
        let outcome = role.map_or(Ok(()), enter);
        let may_go_on = outcome.is_ok();
        // Somebody waits for it.
        let _ = sender.send(outcome);
        if may_go_on {
            body();
        }
    };
    let failed = "start a thread of the VM";
    let thread = Builder::new().name(name).spawn(body).host(failed)?;
    entered.recv().map_err(io::Error::other).host(failed)??;
    Ok(thread)
}
