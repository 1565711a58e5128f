//! Requests whose data is in many pieces, which the driver never makes.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use crate::cases::{Outcome, compare, filled};
use crate::device::{Device, EVENT_IDX, IN, INDIRECT, OK, OUT};
use crate::disk::Disk;
use crate::ensure;

/// Writes in pieces and reads back in others, under every combination of the ring's features.
pub fn run(disk: &mut Disk) -> Outcome {
    for (seed, features) in (200..).zip([0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX]) {
        let sector = 11;
        let data = filled(sector, 280, seed);
        let mut found = vec![0xee; data.len()];
        let outcome = disk.without_driver(|transport| {
            let mut device = Device::start(transport, features, 1)?;
            // 253 and 254 pieces: the latter are as many as the queue takes.
            let inputs: Vec<_> = data.chunks(567).collect();
            let written = device.request(0, OUT, sector, &inputs, &mut []);
            ensure!(written == Ok((OK, 1)), "writing: {written:?}");
            let length = found.len() as u32;
            let mut outputs: Vec<_> = found.chunks_mut(565).collect();
            let read = device.request(0, IN, sector, &[], &mut outputs);
            ensure!(read == Ok((OK, length + 1)), "reading: {read:?}");
            compare(sector, &found, &data)
        });
        outcome.map_err(|error| format!("ring features {features:#x}: {error}"))?;
    }
    Ok(())
}
