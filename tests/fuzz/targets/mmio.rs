//! Accesses to registers, with queues that are served on this thread.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tandem_fuzz::driver::{Inline, Machine, disk};
use tandem_fuzz::input::Input;
use tandem_fuzz::limit::limited;

static MACHINE: LazyLock<Machine> = LazyLock::new(|| Machine::new(Box::new(Inline::new(&disk()))));

fuzz_target!(|bytes: &[u8]| {
    limited(|| MACHINE.run(&mut Input::new(bytes)));
});
