//! Interrupt lines and doorbells: `EventFd`s that KVM turns into interrupts, and guest writes that it
//! turns into `EventFd`s, without an exit to this process.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, HostContext, KvmContext, Result};
use crate::layout;

/// Makes the interrupt controllers: an IOAPIC, and a local APIC for each CPU made later.
///
/// KVM makes a pair of 8259 PICs as well and wires the first 16 lines to both. A guest that does not
/// know of the PICs (none is described to it) would then receive each interrupt a second time, on an
/// exception's vector; so the lines are routed to the IOAPIC alone.
pub fn create_controllers(vm: &VmFd) -> Result<()> {
    vm.create_irq_chip()
        .context("make the interrupt controllers")?;
    let routes: Vec<_> = (0..layout::GSI_COUNT)
        .map(|gsi| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                irqchip: kvm_irq_routing_irqchip {
                    irqchip: KVM_IRQCHIP_IOAPIC,
                    pin: gsi,
                },
            },
            ..Default::default()
        })
        .collect();
    let routing = KvmIrqRouting::from_entries(&routes)
        .map_err(|e| Error::KvmUnfit(format!("takes no interrupt routes: {e:?}")))?;
    vm.set_gsi_routing(&routing).context("route interrupts")
}

/// An event that raises interrupt `gsi`, edge-triggered, whenever it is written.
pub fn line(vm: &VmFd, gsi: u32) -> Result<EventFd> {
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .host("make an event for an interrupt")?;
    vm.register_irqfd(&event, gsi)
        .context("connect an interrupt")?;
    Ok(event)
}

/// Has a 32-bit write of `value` at `address` signal `event`.
pub fn doorbell(vm: &VmFd, event: &EventFd, address: u64, value: u32) -> Result<()> {
    vm.register_ioevent(event, &IoEventAddress::Mmio(address), value)
        .context("connect a doorbell")
}
