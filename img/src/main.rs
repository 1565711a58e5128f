//! `tandem-img`: creates, inspects and checks disk images, in the language of `qemu-img`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tandem_img::output::collected(tandem_img::program::main)
}
