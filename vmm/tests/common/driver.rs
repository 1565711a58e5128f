//! A driver of a few instructions for the first disk.

use super::{COM1, Code};

/// Registers of the first disk.
pub const DISK: u32 = 0xd000_0000;

/// Rings of the first queue.
const DESCRIPTORS: u32 = 0x40_0000;
pub const AVAILABLE: u32 = DESCRIPTORS + 0x1000;
const USED: u32 = DESCRIPTORS + 0x2000;
const QUEUE_NOTIFY: u32 = 0x50;

/// Header, data and status of a request.
const HEADER: u32 = DESCRIPTORS + 0x4000;
const DATA: u32 = DESCRIPTORS + 0x5000;
const REQUEST_STATUS: u32 = DESCRIPTORS + 0x6000;

/// Starts the device with one queue of 8 descriptors, whose content `prepare` writes. Leaves `rbx`
/// at the registers.
pub fn start(prepare: &Code) -> Code {
    let registers = [
        (0x70, 3),           // Status: ACKNOWLEDGE, DRIVER
        (0x24, 1),           // DriverFeaturesSel: the upper half
        (0x20, 1),           // DriverFeatures: VERSION_1
        (0x70, 0xb),         // Status: FEATURES_OK, too
        (0x38, 8),           // QueueNum
        (0x80, DESCRIPTORS), // QueueDescLow
        (0x90, AVAILABLE),   // QueueDriverLow
        (0xa0, USED),        // QueueDeviceLow
        (0x44, 1),           // QueueReady
        (0x70, 0xf),         // Status: DRIVER_OK, too
    ];
    let code = prepare.clone().mov_ebx(DISK);
    registers
        .into_iter()
        .fold(code, |code, (register, value)| code.store(register, value))
}

/// Prepares a request to read the first sector. It is offered once [`offer`] has been called.
pub fn prepare_read() -> Code {
    const NEXT: u32 = 1;
    const WRITE: u32 = 2;
    let chain = [
        (HEADER, 16, NEXT),
        (DATA, 512, NEXT | WRITE),
        (REQUEST_STATUS, 1, WRITE),
    ];
    // The header is all zeros: IN, sector 0.
    let mut code = Code::default().mov_ebx(DESCRIPTORS);
    for (index, (address, length, flags)) in (0..).zip(chain) {
        let at = index * 16;
        code = code.store(at, address).store(at + 8, length);
        code = code.store(at + 12, flags | (index + 1) << 16);
    }
    code
}

/// Makes the first descriptor available, `count` times, and rings the doorbell.
pub fn offer(code: Code, count: u8) -> Code {
    // The index is the upper half; the ring itself is all zeros.
    let code = code.mov_ebx(AVAILABLE).store(0, u32::from(count) << 16);
    code.mov_ebx(DISK).store(QUEUE_NOTIFY, 0)
}

/// Waits until `count` requests have been completed.
pub fn await_used(code: Code, count: u8) -> Code {
    // again: mov eax, [rbx]; shr eax, 16; cmp eax, count; jne again
    let code = code.mov_ebx(USED);
    code.raw(&[0x8b, 0x03, 0xc1, 0xe8, 16, 0x83, 0xf8, count, 0x75, 0xf6])
}

/// Prints the byte at `address`.
pub fn print_byte(code: Code, address: u32) -> Code {
    let [low, high] = COM1.to_le_bytes();
    // mov al, [rbx]; mov dx, COM1; out dx, al
    let code = code.mov_ebx(address);
    code.raw(&[0x8a, 0x03, 0x66, 0xba, low, high, 0xee])
}
