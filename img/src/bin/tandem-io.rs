//! `tandem-io`: reads and writes disk images, one command after another, in the language of
//! `qemu-io` 10.
#![deny(missing_docs)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_else(|| "tandem-io".into());
    tandem_img::io::run(name, &args.collect::<Vec<_>>())
}
