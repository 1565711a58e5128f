//! Writes and flushes without end, for a test that kills the machine: each flush that has been answered
//! is told on the console.

use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;

use crate::cases::{Outcome, filled};
use crate::content;
use crate::disk::{Direction, Disk, Transfer, transfer};

/// `start` is different for each start of the guest.
pub fn run(start: &str, disks: &mut [Disk]) -> Outcome {
    let start = start.parse().map_err(|_| "no number".to_string())?;
    for number in 1.. {
        let writes = |disk: &Disk| -> Vec<Transfer> {
            let (writes, seed) = content::batch(start, number, disk.plan.sectors);
            let write = |sectors: core::ops::Range<u64>| {
                let data = filled(sectors.start, sectors.end - sectors.start, seed);
                Transfer::new(Direction::Write, sectors.start, data)
            };
            writes.map(write).collect()
        };
        let mut lists: Vec<_> = disks.iter().map(writes).collect();
        transfer(disks, &mut lists)?;
        for disk in disks.iter_mut() {
            let flushed = disk.driver().flush();
            flushed.map_err(|error| format!("flushing disk {}: {error}", disk.index))?;
        }
        println!("flushed {number}");
    }
    Ok(())
}
