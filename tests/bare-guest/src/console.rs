//! The serial port, and the end of the guest.

use core::fmt::{self, Write};

use crate::processor;

const COM1: u16 = 0x3f8;
const POWER: u16 = 0x600;
/// ACPI state S5.
const POWER_OFF: u8 = 5 << 2 | 1 << 5;

/// Prints a line.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => {
        $crate::console::print(format_args!("{}\n", format_args!($($arg)*)))
    };
}

/// Prints what [`println!`] has formatted.
pub fn print(text: fmt::Arguments) {
    struct Com1;
    impl Write for Com1 {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            text.bytes().for_each(|byte| processor::out(COM1, byte));
            Ok(())
        }
    }
    // `Com1` never fails.
    let _ = Com1.write_fmt(text);
}

/// Switches the machine off.
pub fn power_off() -> ! {
    processor::out(POWER, POWER_OFF);
    loop {
        core::hint::spin_loop();
    }
}
