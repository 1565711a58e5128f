//! What of the processor and the interrupt controllers ring 3 cannot do without.
//!
//! `start.s` has all of ring 0: the start, which leaves for ring 3 at once, the handler of the faults
//! by which ring 3 asks for what it may not do, and a handler for each interrupt line, which counts.
//! The interrupt table and the controllers' registers are memory like any other, so they are filled
//! in from ring 3.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

/// Interrupt lines of the IOAPIC.
const LINES: usize = 24;
/// Vector of interrupt line 0.
const FIRST_VECTOR: usize = 0x20;
const GENERAL_PROTECTION: usize = 13;
const SPURIOUS_VECTOR: u32 = 0xff;
/// Bytes between two of the `interrupt_handlers`.
const HANDLER_SIZE: usize = 32;

const RING0_CODE: u128 = 0x08;
const INTERRUPT_GATE: u128 = 0x8e;

const LAPIC_SPURIOUS: usize = 0xfee0_00f0;
const LAPIC_ENABLE: u32 = 1 << 8;
const IOAPIC_SELECT: usize = 0xfec0_0000;
const IOAPIC_WINDOW: usize = 0xfec0_0010;
const IOAPIC_REDIRECTION: u32 = 0x10;

global_asm!(
    include_str!("start.s"),
    main = sym crate::main,
    idt = sym IDT,
    counters = sym COUNTERS,
    lines = const LINES,
);

unsafe extern "C" {
    fn general_protection();
    fn interrupt_handlers();
}

#[repr(C, align(16))]
struct InterruptTable(UnsafeCell<[u128; 256]>);

// SAFETY: only `init` writes it, before there are interrupts.
unsafe impl Sync for InterruptTable {}

static IDT: InterruptTable = InterruptTable(UnsafeCell::new([0; 256]));

/// How many interrupts have come on each line.
static COUNTERS: [AtomicU64; LINES] = [const { AtomicU64::new(0) }; LINES];

/// Fills in the interrupt table and switches the local APIC on. To be called first, and once.
pub fn init() {
    let gate = |handler: usize| {
        let address = handler as u128;
        address & 0xffff | RING0_CODE << 16 | INTERRUPT_GATE << 40 | (address >> 16) << 48
    };
    let table = IDT.0.get();
    // SAFETY: nothing else refers to the table, and nothing is delivered yet.
    unsafe {
        (*table)[GENERAL_PROTECTION] = gate(general_protection as *const () as usize);
        for line in 0..LINES {
            let handler = interrupt_handlers as *const () as usize + line * HANDLER_SIZE;
            (*table)[FIRST_VECTOR + line] = gate(handler);
        }
    }
    write_register(LAPIC_SPURIOUS, LAPIC_ENABLE | SPURIOUS_VECTOR);
}

/// Writes `value` to an I/O port.
pub fn out(port: u16, value: u8) {
    // SAFETY: the fault handler changes no memory and no other register.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, out("rcx") _, options(nostack)) };
}

/// An interrupt line.
#[derive(Clone, Copy)]
pub struct Line(usize);

impl Line {
    /// Has line `number` interrupt this processor, edge-triggered.
    pub fn enable(number: usize) -> Self {
        assert!(number < LINES);
        let register = IOAPIC_REDIRECTION + 2 * number as u32;
        // The upper half names the processor, number 0; the lower half ends the masking.
        for (register, value) in [(register + 1, 0), (register, FIRST_VECTOR + number)] {
            write_register(IOAPIC_SELECT, register);
            write_register(IOAPIC_WINDOW, value as u32);
        }
        Self(number)
    }

    /// How many interrupts have come.
    pub fn count(self) -> u64 {
        COUNTERS[self.0].load(Ordering::SeqCst)
    }

    /// Has the processor sleep until the count is no longer `seen`.
    pub fn wait(self, seen: u64) {
        let counter = &COUNTERS[self.0];
        // SAFETY: the fault handler reads the counter and changes no other register.
        unsafe { asm!("hlt", in("rdi") counter.as_ptr(), in("rsi") seen, out("rcx") _) };
    }
}

fn write_register(address: usize, value: u32) {
    // SAFETY: all callers name registers of the interrupt controllers.
    unsafe { (address as *mut u32).write_volatile(value) };
}
