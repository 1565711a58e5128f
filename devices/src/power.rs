//! How a guest turns its machine off or restarts it.
//!
//! [`AcpiPower`] is the one register of a hardware-reduced ACPI platform: sleep control, sleep status
//! and reset register in one byte. [`Keyboard`] is the reset line of the PC's keyboard controller,
//! which systems fall back to.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::{I8042Device, Trigger};

use crate::bus::BusDevice;

/// What the guest asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// Power off: ACPI state S5.
    Off,
    /// Restart.
    Reset,
}

/// Is told each [`PowerEvent`], on the thread of the vCPU that asks.
pub type PowerHandler = Arc<dyn Fn(PowerEvent) + Send + Sync>;

/// ACPI sleep control, sleep status and reset register (ACPI 6.5, 4.8.3.7 and 4.8.3.6).
///
/// The FADT of the machine must name the port for all three, with [`AcpiPower::RESET_VALUE`], and the
/// DSDT must give [`AcpiPower::SLEEP_TYPE_S5`] as `SLP_TYP` of `\_S5`.
pub struct AcpiPower {
    handler: PowerHandler,
}

impl AcpiPower {
    /// Size of the register in bytes.
    pub const REGION_SIZE: u64 = 1;
    /// What the guest writes to restart.
    pub const RESET_VALUE: u8 = 1;
    /// `SLP_TYP` of the soft-off state.
    pub const SLEEP_TYPE_S5: u8 = 5;

    /// `SLP_EN`: enter the state that bits 2 to 4 name.
    const SLEEP_ENABLE: u8 = 1 << 5;

    /// A register that reports to `handler`.
    pub fn new(handler: PowerHandler) -> Self {
        Self { handler }
    }
}

impl BusDevice for AcpiPower {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        match data.first() {
            Some(&Self::RESET_VALUE) => (self.handler)(PowerEvent::Reset),
            Some(value)
                if value & Self::SLEEP_ENABLE != 0 && (value >> 2) & 7 == Self::SLEEP_TYPE_S5 =>
            {
                (self.handler)(PowerEvent::Off);
            }
            // Linux clears the wake status (bit 7) here before it sleeps.
            _ => {}
        }
    }
}

/// The keyboard controller's ports 0x60 to 0x64, of which only the reset command exists.
pub struct Keyboard {
    controller: Mutex<I8042Device<ResetLine>>,
}

struct ResetLine(PowerHandler);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        (self.0)(PowerEvent::Reset);
        Ok(())
    }
}

impl Keyboard {
    /// Number of ports, counted from 0x60.
    pub const REGION_SIZE: u64 = 5;

    /// A controller that reports to `handler`.
    pub fn new(handler: PowerHandler) -> Self {
        Self {
            controller: Mutex::new(I8042Device::new(ResetLine(handler))),
        }
    }
}

impl BusDevice for Keyboard {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut controller = self
            .controller
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // The ports between data (0) and command (4) belong to others: 0x61 is the speaker's.
        if matches!(offset, 0 | 4) {
            data.fill(controller.read(offset as u8));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut controller = self
            .controller
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for byte in data {
            let Ok(()) = controller.write(offset as u8, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorder() -> (Arc<Mutex<Vec<PowerEvent>>>, PowerHandler) {
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = events.clone();
        (
            events,
            Arc::new(move |event| sink.lock().unwrap().push(event)),
        )
    }

    #[test]
    fn acpi_sleeps_only_into_s5() {
        let (events, handler) = recorder();
        let power = AcpiPower::new(handler);
        for value in [0, 0x80, 5 << 2, 0x20, 4 << 2 | 0x20] {
            power.write(0, &[value]);
        }
        assert!(events.lock().unwrap().is_empty());
        power.write(0, &[5 << 2 | 0x20]);
        power.write(0, &[1]);
        assert_eq!(
            *events.lock().unwrap(),
            [PowerEvent::Off, PowerEvent::Reset]
        );
    }

    #[test]
    fn keyboard_resets_on_command_only() {
        let (events, handler) = recorder();
        let keyboard = Keyboard::new(handler);
        keyboard.write(0, &[0xfe]);
        keyboard.write(1, &[0xfe]);
        keyboard.write(4, &[0xff]);
        assert!(events.lock().unwrap().is_empty());
        keyboard.write(4, &[0xfe]);
        assert_eq!(*events.lock().unwrap(), [PowerEvent::Reset]);
        let mut data = [0xff];
        keyboard.read(1, &mut data);
        assert_eq!(data, [0xff]);
        keyboard.read(4, &mut data);
        assert_eq!(data, [0]);
    }
}
