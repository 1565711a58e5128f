//! A machine of no CPUs, whose disks are operated as those of any other: for tests, and for a fuzzer.

use std::sync::Arc;
use std::time::Instant;

use tandem_devices::virtio::block::Block;

use super::{Control, MachineInfo, Operated};
use crate::config::DiskConfig;
use crate::disk;
use crate::error::Result;
use crate::exit::Exit;
use crate::gate::Gate;

/// What operates a machine that has `disks` and no CPUs.
///
/// # Errors
/// Those of disks that cannot be opened.
pub fn control(disks: &[DiskConfig]) -> Result<Control> {
    let operated = disks.iter().map(|config| {
        let image = disk::open(config)?;
        let options = disk::options(config, config.queue_count(2));
        let handle = Block::new(image.disk.clone(), options).handle();
        Ok(Operated::new(image, handle))
    });
    let operated = operated.collect::<Result<_>>()?;
    let machine = MachineInfo {
        cpus: 2,
        memory: 8 << 20,
        started: Instant::now(),
        seccomp: false,
    };
    let exit = Arc::new(Exit::new()?);
    let gate = Arc::new(Gate::new(exit.clone()));
    Ok(Control::new(machine, operated, exit, gate))
}
