//! A 16550A serial port, COM1 of a PC.
//!
//! The guest's output goes to any [`Write`]. Input follows hardware flow control: the port takes
//! bytes only while the guest asserts RTS, which drivers do when they are ready to receive, and only
//! as many as its receive FIFO holds. What does not fit stays with the caller, who is told through an
//! `EventFd` when there may be room again.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Transmit and receive registers, or the divisor latch.
const DATA: u8 = 0;
/// Line control register: bit 7 (DLAB) puts the divisor latch in the place of [`DATA`].
const LCR: u8 = 3;
const LCR_DLAB: u8 = 0x80;
/// Modem control register.
const MCR: u8 = 4;
const MCR_RTS: u8 = 0x02;
const MCR_LOOP: u8 = 0x10;

/// A serial port.
pub struct SerialPort {
    /// Where the guest's bytes go. Locked before `uart` where both are needed, and never by input: a
    /// terminal that takes no output must stop neither input nor the other registers.
    output: Mutex<Box<dyn Write + Send>>,
    uart: Mutex<Uart>,
    input_ready: EventFd,
}

type Uart = Serial<Interrupt, Drained, Outgoing>;

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Notes that the guest has emptied the receive FIFO.
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        notify(&self.0);
    }
}

/// Holds what the registers transmit until the register lock is released.
#[derive(Default)]
struct Outgoing(Vec<u8>);

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An `EventFd` that is full has been signalled already.
fn notify(event: &EventFd) {
    let _ = event.write(1);
}

impl SerialPort {
    /// Number of registers, each a byte.
    pub const REGION_SIZE: u64 = 8;

    /// A port that raises `irq` (edge-triggered) and writes what the guest sends to `output`.
    ///
    /// Returns the port and the event that is signalled when the guest may take more input. Output
    /// that `output` refuses is dropped: a guest cannot do anything about it.
    pub fn new(irq: EventFd, output: Box<dyn Write + Send>) -> io::Result<(Arc<Self>, EventFd)> {
        let input_ready = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let drained = Drained(input_ready.try_clone()?);
        let port = Self {
            output: Mutex::new(output),
            uart: Mutex::new(Serial::with_events(
                Interrupt(irq),
                drained,
                Outgoing::default(),
            )),
            input_ready: input_ready.try_clone()?,
        };
        Ok((Arc::new(port), input_ready))
    }

    /// Number of bytes that [`SerialPort::send`] takes at this moment.
    pub fn input_room(&self) -> usize {
        room(&mut self.uart())
    }

    /// Sends `bytes` to the guest and returns how many were taken, from the front.
    pub fn send(&self, bytes: &[u8]) -> usize {
        let mut uart = self.uart();
        let count = bytes.len().min(room(&mut uart));
        // An error is that of the interrupt's `EventFd`, which fails only when it is full: the
        // interrupt is pending then.
        let _ = uart.enqueue_raw_bytes(&bytes[..count]);
        count
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Transmits `bytes`, the lock on the registers being released before they are written out.
    fn transmit(&self, bytes: &[u8]) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let mut outgoing = {
            let mut uart = self.uart();
            for byte in bytes {
                let _ = uart.write(DATA, *byte);
            }
            std::mem::take(&mut uart.writer_mut().0)
        };
        let _ = output.write_all(&outgoing).and_then(|()| output.flush());
        // Gives the buffer back, so that transmitting does not allocate.
        outgoing.clear();
        self.uart().writer_mut().0 = outgoing;
    }
}

fn room(uart: &mut Uart) -> usize {
    if uart.read(MCR) & (MCR_RTS | MCR_LOOP) == MCR_RTS {
        uart.fifo_capacity()
    } else {
        0
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.uart();
        data.fill_with(|| uart.read(offset as u8));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let offset = offset as u8;
        if offset == DATA && self.uart().read(LCR) & LCR_DLAB == 0 {
            return self.transmit(data);
        }
        let mut uart = self.uart();
        for byte in data {
            let _ = uart.write(offset, *byte);
        }
        if offset == MCR && room(&mut uart) > 0 {
            notify(&self.input_ready);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const IER: u64 = 1;
    const IIR: u64 = 2;
    const LSR: u64 = 5;

    struct Channel(mpsc::Sender<u8>);

    impl Write for Channel {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            for byte in bytes {
                self.0.send(*byte).map_err(io::Error::other)?;
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Fixture {
        port: Arc<SerialPort>,
        input_ready: EventFd,
        irq: EventFd,
        output: mpsc::Receiver<u8>,
    }

    fn fixture() -> Fixture {
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (sender, output) = mpsc::channel();
        let (port, input_ready) =
            SerialPort::new(irq.try_clone().unwrap(), Box::new(Channel(sender))).unwrap();
        Fixture {
            port,
            input_ready,
            irq,
            output,
        }
    }

    fn read(port: &SerialPort, offset: u64) -> u8 {
        let mut data = [0xff];
        port.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn transmits_bytes_and_strings_but_not_the_divisor() {
        let f = fixture();
        f.port.write(0, b"a");
        f.port.write(u64::from(LCR), &[LCR_DLAB]);
        f.port.write(0, &[0x01]);
        f.port.write(u64::from(LCR), &[0x03]);
        f.port.write(0, b"bcd");
        assert_eq!(f.output.try_iter().collect::<Vec<_>>(), b"abcd");
    }

    #[test]
    fn input_waits_for_rts_and_for_room() {
        let f = fixture();
        let text: Vec<u8> = (0..200).collect();
        assert_eq!((f.port.input_room(), f.port.send(&text)), (0, 0));
        assert!(f.input_ready.read().is_err());

        f.port.write(IER, &[1]);
        let _ = f.irq.read();
        f.port.write(u64::from(MCR), &[MCR_RTS]);
        f.input_ready.read().unwrap();
        let taken = f.port.send(&text);
        assert!(taken > 0 && taken < text.len());
        assert_eq!(f.port.input_room(), 0);
        f.irq.read().unwrap();
        assert_eq!(read(&f.port, IIR) & 0xf, 4);

        for byte in &text[..taken] {
            assert_eq!(read(&f.port, LSR) & 1, 1);
            assert!(f.input_ready.read().is_err());
            assert_eq!(read(&f.port, 0), *byte);
        }
        assert_eq!(read(&f.port, LSR) & 1, 0);
        f.input_ready.read().unwrap();
        assert_eq!(f.port.input_room(), taken);
    }

    #[test]
    fn loopback_takes_no_input() {
        let f = fixture();
        f.port.write(u64::from(MCR), &[MCR_RTS | MCR_LOOP]);
        assert_eq!(f.port.send(b"x"), 0);
        f.port.write(0, b"y");
        assert_eq!(read(&f.port, 0), b'y');
        assert!(f.output.try_recv().is_err());
    }

    #[test]
    fn refused_output_is_dropped() {
        let f = fixture();
        drop(f.output);
        f.port.write(0, b"lost");
        assert_eq!(read(&f.port, LSR) & 0x20, 0x20);
    }
}
