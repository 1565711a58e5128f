//! Prints the first 16 bytes of a disk: `cargo run --example read_image disk.qcow2`.

use tandem_block::qcow2::{OpenOptions, Qcow2};
use tandem_block::{Disk, VolatileSlice};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("which image?")?;
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let disk = Qcow2::open(path.as_ref(), &options)?;
    let mut bytes = [0; 16];
    disk.read_at(&[VolatileSlice::from(&mut bytes[..])], 0)?;
    println!("{} bytes, which begin with {bytes:02x?}", disk.size());
    Ok(())
}
