//! `tandem serve`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use tandem_vmm::signals::Signals;
use tandem_vmm::{DiskConfig, ExitReason, Result, Server};

use crate::disk_keys::{DISK_KEYS, disk_parser};
use crate::sandbox::SandboxArgs;

/// What to serve.
#[derive(Args)]
#[command(after_help = EXAMPLES, after_long_help = details())]
pub struct Serve {
    /// Socket to make; only the user that runs this may connect to it
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Disk image
    #[arg(long, value_name = "PATH[,KEY=VALUE...]", value_parser = disk_parser())]
    disk: DiskConfig,

    #[command(flatten)]
    sandbox: SandboxArgs,
}

const EXAMPLES: &str = "\
Examples:
  tandem serve --socket /run/user/1000/disk.sock --disk image.qcow2
  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on \\
      -numa node,memdev=mem -chardev socket,id=disk,path=/run/user/1000/disk.sock \\
      -device vhost-user-blk-pci,chardev=disk ...

--help tells the disk keys and the exit status.";

fn details() -> String {
    format!(
        "{DISK_KEYS}

Queues:
  A front end may use up to queues=N of them; only those that it uses have a thread. QEMU's num-queues= is
  the number of the guest's CPUs unless it is told otherwise. A request has at most 126 buffers, which fit
  into QEMU's default queue-size=128.

Front ends:
  One after another is served; others wait for the one before to disconnect. The guest's memory must be
  shared. The disk is flushed when a front end disconnects. A socket that is there already and that
  nobody listens on is replaced.

Sandbox:
  Once the disk and the socket are there, tandem keeps itself to the system calls that it needs (seccomp), and
  from all other files (Landlock). A forbidden system call ends it, and one line says which it was.

Exit status:
  1      The disk or the socket could not be opened, or the disk could not be flushed at the end
  2      The command line is wrong
  Killed by SIGTERM, SIGINT, SIGHUP or SIGQUIT (a shell shows 128 + number): the same, after requests under
  way have been completed, the disk has been flushed and closed, and the socket has been removed; by SIGSYS:
  the sandbox has forbidden something
  A front end that breaks the protocol loses its connection, and one line tells of it; the next one is
  served.

Examples:
  Each is run beside: tandem serve --socket disk.sock --disk image.qcow2

  QEMU:
    qemu-system-x86_64 -accel kvm -m 1G -smp 4 -object memory-backend-memfd,id=mem,size=1G,share=on \\
        -numa node,memdev=mem -chardev socket,id=disk,path=disk.sock \\
        -device vhost-user-blk-pci,chardev=disk,num-queues=4 ...

  cloud-hypervisor:
    cloud-hypervisor --memory size=1G,shared=on --cpus boot=4 \\
        --disk vhost_user=true,socket=disk.sock,num_queues=4,queue_size=128 ...

  crosvm:
    crosvm run --mem 1024 --cpus 4 --vhost-user type=block,socket=disk.sock ..."
    )
}

impl Serve {
    /// Serves the disk until a signal ends it.
    pub fn execute(self) -> Result<ExitReason> {
        // Before there is a second thread.
        let signals = Signals::block()?;
        let server = Server::open(&self.socket, &self.disk)?;
        // All files are open, and there is no second thread yet.
        self.sandbox.confine_files(vec![], Some(self.socket))?;
        self.sandbox.confine_server()?;
        let stats = server.stats();
        let say = |text: &dyn std::fmt::Display| {
            let _ = writeln!(io::stderr(), "tandem: {text}");
        };
        let outcome = server.run(Some(signals), |incident| say(&incident));
        if let Some(error) = stats.last_error() {
            let path = self.disk.path.display();
            say(&format_args!("disk '{path}': last error: {error}"));
        }
        outcome
    }
}
