//! The control socket's protocol for a fuzzer: clients that are connected already, and a machine
//! without CPUs.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tandem_block::Disk;

use super::{Control, client};

pub use super::without_vm::control;

/// Serves a client until it has gone, or cannot be understood.
///
/// # Errors
/// The client takes no answers.
pub fn serve(control: &Control, client: &UnixStream) -> io::Result<()> {
    client::serve(control, client, &AtomicBool::new(false))
}

/// The disks as a guest uses them.
pub fn disks(control: &Control) -> Vec<Arc<dyn Disk>> {
    let disks = control.operated().iter();
    disks.map(|disk| disk.handle.disk()).collect()
}

/// Ends the machine, as its end by itself does. Returns how it has gone with each disk.
pub fn end(control: &Control) -> Vec<tandem_block::Result<()>> {
    control.shut_down();
    control.finish();
    let disks = control.operated().iter();
    disks.map(|disk| disk.image.disk.close()).collect()
}
