//! A guest without an operating system that tests its disks with a driver written by others.
//!
//! See README.md.
#![no_std]
#![no_main]

extern crate alloc;

mod broken;
mod cases;
#[macro_use]
mod console;
mod content;
mod device;
mod disk;
mod features;
mod memory;
mod plan;
mod processor;
mod runtime;
mod segments;
mod stamps;

use alloc::vec::Vec;
use core::panic::PanicInfo;

use disk::Disk;
use plan::Plan;

/// Where ring 3 begins.
extern "C" fn main(zero_page: *const u8) -> ! {
    processor::init();
    // SAFETY: the boot loader has left the address in a register, and `start.s` passes it on.
    let plan = unsafe { Plan::read(zero_page) };
    let disks = plan.disks.into_iter().enumerate();
    let mut disks: Vec<_> = disks.map(|(index, plan)| Disk::new(index, plan)).collect();
    assert!(!Disk::is_present(disks.len()), "there is a disk too many");
    for name in plan.cases {
        println!("begin {name}");
        match cases::run(name, &mut disks) {
            Ok(()) => println!("case {name} ok"),
            Err(error) => println!("case {name} FAILED {error}"),
        }
    }
    println!("end");
    console::power_off()
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    println!("{info}");
    console::power_off()
}
