//! Rings that are served: requests, interrupts, and what may change meanwhile.

use std::fs::File;
use std::os::fd::AsRawFd;

use tandem_devices::virtio::FEATURE_VERSION_1;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::common::ring::{readable, writable};
use crate::driver::{IN, OUT};
use crate::front_end::{COLD, FrontEnd, Service, open_during, regions, wait_for};
use crate::machine::within_deadline;

const IOERR: u8 = 1;

#[test]
fn many_requests_on_several_queues() {
    within_deadline(|| {
        let service = Service::new(3);
        let mut front = FrontEnd::new(&service, 3);
        (0..3).for_each(|queue| front.start(queue, 0));
        let places: Vec<u16> = (0..60).collect();
        let sector = |queue: usize, place: u16| 60 * queue as u64 + u64::from(place);
        for kind in [OUT, IN] {
            for queue in 0..3 {
                let driver = &front.drivers[queue];
                for &place in &places {
                    driver.put(place, kind, sector(queue, place), 512);
                    let fill = if kind == OUT {
                        sector(queue, place) as u8 ^ 0xff
                    } else {
                        0
                    };
                    driver.set_data(place, &[fill; 512]);
                }
                front.offer(queue, &places);
            }
            for driver in &mut front.drivers {
                driver.wait_for_used(60);
            }
        }
        for (queue, driver) in front.drivers.iter().enumerate() {
            for &place in &places {
                let fill = sector(queue, place) as u8 ^ 0xff;
                assert_eq!(
                    (driver.status(place), driver.data(place, 512)),
                    (0, vec![fill; 512])
                );
            }
            assert!(wait_for(&front.calls[queue]) > 0);
        }
        assert_eq!(service.handle.stats().failed_requests(), 0);
    });
}

/// A ring is served once it is enabled, with what it was kicked for before, and not when it is not.
#[test]
fn rings_are_served_while_they_are_enabled() {
    within_deadline(|| {
        let service = Service::new(2);
        let mut front = FrontEnd::new(&service, 2);
        front.set_up(0, 0);
        front.drivers[0].put(0, IN, 1, 512);
        front.offer(0, &[0]);
        // The other queue is served meanwhile, so the first one would have been.
        front.start(1, 0);
        front.assert_reads(1, 3);
        assert_eq!(front.drivers[0].ring.used_idx(), 0);
        front.link.set_vring_enable(0, true).unwrap();
        assert_eq!(front.drivers[0].wait_for_used(1), [(0, 513)]);

        front.link.set_vring_enable(0, false).unwrap();
        front.offer(0, &[0]);
        front.assert_reads(1, 4);
        assert_eq!(front.drivers[0].ring.used_idx(), 1);
        front.link.set_vring_enable(0, true).unwrap();
        assert_eq!(front.drivers[0].wait_for_used(1), [(0, 513)]);
    });
}

/// Who has not accepted the feature cannot enable a ring.
#[test]
fn without_features_of_the_protocol_rings_are_enabled() {
    within_deadline(|| {
        let service = Service::new(1);
        let features = FEATURE_VERSION_1 | tandem_devices::virtio::FEATURE_INDIRECT_DESC;
        let mut front = FrontEnd::with_features(&service, 1, features);
        front.set_up(0, 0);
        front.assert_reads(0, 5);
    });
}

#[test]
fn the_interrupt_can_be_exchanged() {
    within_deadline(|| {
        let service = Service::new(1);
        let mut front = FrontEnd::new(&service, 1);
        front.start(0, 0);
        front.assert_reads(0, 1);
        assert_eq!(wait_for(&front.calls[0]), 1);
        let other = EventFd::new(EFD_NONBLOCK).unwrap();
        front.link.set_vring_call(0, &other).unwrap();
        // For what may have been signalled to the old one too late.
        assert_eq!(other.read().unwrap(), 1);
        front.assert_reads(0, 2);
        assert_eq!(wait_for(&other), 1);
        assert!(front.calls[0].read().is_err());
    });
}

/// A write to an eventfd without `O_NONBLOCK` waits while its counter is full.
#[test]
fn an_interrupt_that_nobody_takes_does_not_block() {
    within_deadline(|| {
        let service = Service::new(1);
        let mut front = FrontEnd::new(&service, 1);
        front.start(0, 0);
        let call = EventFd::new(0).unwrap();
        call.write(u64::MAX - 1).unwrap();
        front.link.set_vring_call(0, &call).unwrap();
        front.assert_reads(0, 1);
        front.assert_reads(0, 2);
        // It waits for the signals, too.
        assert_eq!(front.link.get_vring_base(0).unwrap(), 2);
        assert_eq!(call.read().unwrap(), u64::MAX - 1);
        front.start(0, 2);
        front.link.set_vring_call(0, &call).unwrap();
        front.assert_reads(0, 3);
        front.link.get_vring_base(0).unwrap();
        assert_eq!(call.read().unwrap(), 2);
    });
}

#[test]
fn memory_comes_and_goes_while_rings_are_served() {
    within_deadline(|| {
        let service = Service::new(2);
        let mut front = FrontEnd::new(&service, 2);
        front.start(0, 0);
        front.start(1, 0);
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x2000).unwrap();
        let region = extra_region(&file);
        let read_into_it = |front: &mut FrontEnd| {
            let data = writable(region.guest_phys_addr + 0x800, 512);
            front.drivers[0].put_buffers(0, IN, 9, &[data]);
            front.offer(0, &[0]);
            front.drivers[0].wait_for_used(1);
            front.drivers[0].status(0)
        };
        assert_eq!(read_into_it(&mut front), IOERR);
        front.link.add_mem_region(&region).unwrap();
        assert_eq!(read_into_it(&mut front), 0);
        let mut bytes = [0; 512];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0x1800).unwrap();
        assert_eq!(bytes, [9; 512]);
        front.link.remove_mem_region(&region).unwrap();
        assert_eq!(read_into_it(&mut front), IOERR);
        front.assert_reads(1, 4);
    });
}

fn extra_region(file: &File) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 40,
        memory_size: 0x1000,
        // Of no meaning but for rings.
        userspace_addr: 0x1000,
        mmap_offset: 0x1000,
        mmap_handle: file.as_raw_fd(),
    }
}

/// Requests under way are completed in the old memory first, and those that come later are served.
#[test]
fn a_new_memory_table_waits_for_requests() {
    within_deadline(|| {
        let service = Service::new(1);
        let mut front = FrontEnd::new(&service, 1);
        front.start(0, 0);
        service.disk.close();
        front.drivers[0].put(0, IN, COLD, 512);
        front.drivers[0].put(1, OUT, COLD + 2, 512);
        front.offer(0, &[0, 1]);
        service.disk.wait_for_waiting(2);
        open_during(&service, || {
            front.link.set_mem_table(&regions(&front.mem)).unwrap()
        });
        assert_eq!(front.drivers[0].ring.used_idx(), 2);
        front.drivers[0].take_used();
        assert_eq!(front.drivers[0].data(0, 512), [COLD as u8; 512]);
        front.assert_reads(0, 8);
    });
}

/// A ring that is broken is told of by its own eventfd, and goes on behind what has been answered.
#[test]
fn a_broken_ring() {
    within_deadline(|| {
        let service = Service::new(2);
        let mut front = FrontEnd::new(&service, 2);
        front.start(0, 0);
        front.start(1, 0);
        let broken = EventFd::new(EFD_NONBLOCK).unwrap();
        front.link.set_vring_err(0, &broken).unwrap();
        front.assert_reads(0, 1);
        front.assert_reads(0, 2);
        assert!(broken.read().is_err());
        // A readable buffer behind a writable one.
        let wrong = [
            writable(0x10_0000, 512),
            readable(0x10_0000, 512),
            writable(0x10_0000, 1),
        ];
        front.drivers[0].ring.offer_chain(&wrong);
        front.kicks[0].write(1).unwrap();
        wait_for(&broken);
        front.assert_reads(1, 3);
        assert_eq!(front.link.get_vring_base(0).unwrap(), 2);

        front.drivers[0].put(0, IN, 4, 512);
        front.drivers[0].ring.set_avail_idx(2);
        front.start(0, 2);
        front.assert_reads(0, 4);
    });
}
