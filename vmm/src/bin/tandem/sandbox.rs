//! `--no-sandbox`, and what is in force without it.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{ArgAction, Args};
use rustix::process::{Resource, Rlimit, setrlimit};
use tandem_vmm::Result;
use tandem_vmm::sandbox::{self, Enforced, FileRules, Role};

/// Whether the process confines itself.
#[derive(Args, Debug, PartialEq)]
pub struct SandboxArgs {
    /// Do without the filters of system calls and the rules for files that confine this program
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "true|false")]
    #[arg(action = ArgAction::Set, default_value_t = false, default_missing_value = "true")]
    #[arg(hide_default_value = true, hide_possible_values = true)]
    no_sandbox: bool,
}

impl SandboxArgs {
    /// Whether it does.
    pub fn is_on(&self) -> bool {
        !self.no_sandbox
    }

    /// Keeps the process from files that are not open yet, but for those below `directories`, and the
    /// one of `socket`, which is removed at the end. Memory of the guest is not dumped into a file.
    pub fn confine_files(&self, directories: Vec<PathBuf>, socket: Option<PathBuf>) -> Result<()> {
        if self.no_sandbox {
            return Ok(());
        }
        let mut rules = FileRules::default();
        rules.directories = directories;
        rules.socket = socket;
        if sandbox::confine_files(&rules)? == Enforced::Nothing {
            let _ = writeln!(
                io::stderr(),
                "tandem: this system has no Landlock: the sandbox consists of filters of system calls alone"
            );
        }
        let none = Rlimit {
            current: Some(0),
            maximum: Some(0),
        };
        // Less is always possible.
        let _ = setrlimit(Resource::Core, none);
        Ok(())
    }

    /// Confines this thread, which serves front ends, to the system calls that it needs.
    pub fn confine_server(&self) -> Result<()> {
        match self.no_sandbox {
            true => Ok(()),
            false => sandbox::enter(Role::Server),
        }
    }
}
