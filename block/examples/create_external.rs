//! Makes an image whose data is a raw file beside it, writes to the disk, and finds the bytes in the
//! file: `cargo run --example create_external DIRECTORY`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use tandem_block::{Disk, Error, VolatileSlice};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir: PathBuf = std::env::args_os()
        .nth(1)
        .ok_or("in which directory?")?
        .into();
    let (image, data) = (dir.join("disk.qcow2"), dir.join("disk.raw"));
    let options = CreateOptions {
        size: 1 << 30,
        data_file: Some("disk.raw".into()),
        data_file_raw: true,
        ..CreateOptions::default()
    };
    // The name that the image keeps is relative to where it lies, and so is that of the file to make.
    std::env::set_current_dir(&dir)?;
    create("disk.qcow2".as_ref(), &options)?;

    let disk = Qcow2::open(&image, &OpenOptions::default())?;
    let mut text = *b"what a guest writes";
    disk.write_at(&[VolatileSlice::from(&mut text[..])], 512 << 20)?;
    disk.flush()?;
    let mut found = [0; 19];
    File::open(&data)?.read_exact_at(&mut found, 512 << 20)?;
    println!("in the file: {}", String::from_utf8_lossy(&found));

    // Errors tell what is wrong in words, and can be matched.
    match Qcow2::open(&image, &OpenOptions::default()) {
        Err(Error::Locked { permission, .. }) => println!("a second one may not {permission}"),
        Err(error) => return Err(error.into()),
        Ok(_) => return Err("an image was opened twice".into()),
    }
    disk.close()?;
    Ok(())
}
