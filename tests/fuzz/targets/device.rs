//! The device with its threads, and a guest that changes its memory meanwhile.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tandem_fuzz::driver::{Machine, block, disk};
use tandem_fuzz::input::Input;
use tandem_fuzz::limit::limited;

static MACHINE: LazyLock<Machine> = LazyLock::new(|| Machine::new(Box::new(block(&disk()))));

fuzz_target!(|bytes: &[u8]| {
    limited(|| MACHINE.run(&mut Input::new(bytes)));
});
