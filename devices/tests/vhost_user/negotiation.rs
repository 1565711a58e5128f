//! Features, the configuration space, and what a front end may ask before there is a ring.

use tandem_devices::virtio::{FEATURE_EVENT_IDX, FEATURE_RING_RESET, FEATURE_VERSION_1};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::front_end::{FEATURE_PROTOCOL, FrontEnd, SECTORS, Service, negotiate};
use crate::machine::within_deadline;

/// Offsets in the configuration space (virtio 1.3, section 5.2.4).
const SEG_MAX: u32 = 12;
const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const WRITEBACK: u32 = 32;
const NUM_QUEUES: u32 = 34;

fn read_config<const N: usize>(link: &mut Frontend, offset: u32) -> [u8; N] {
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, data) = link.get_config(offset, N as u32, flags, &[0; N]).unwrap();
    data.try_into().unwrap()
}

#[test]
fn what_is_offered() {
    within_deadline(|| {
        let service = Service::new(3);
        let mut link = Frontend::from_stream(service.connect(), 3);
        let features = link.get_features().unwrap();
        let expected = FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_PROTOCOL;
        assert_eq!(features & expected, expected);
        assert_eq!(features & FEATURE_RING_RESET, 0);
        link.set_features(features).unwrap();
        let protocol = link.get_protocol_features().unwrap();
        let expected = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        assert_eq!(protocol, expected);
        link.set_protocol_features(protocol).unwrap();
        assert_eq!(link.get_queue_num().unwrap(), 3);
        assert_eq!(link.get_max_mem_slots().unwrap(), 64);
        drop(link);
        service.wait_for_end().unwrap();
    });
}

#[test]
fn features_that_cannot_be() {
    within_deadline(|| {
        let service = Service::new(1);
        let version_1 = FEATURE_VERSION_1;
        for features in [
            0,
            FEATURE_PROTOCOL,
            version_1 | FEATURE_RING_RESET,
            version_1 | 1 << 50,
        ] {
            let link = Frontend::from_stream(service.connect(), 1);
            link.get_features().unwrap();
            let _ = link.set_features(features);
            assert!(service.wait_for_end().is_err(), "{features:#x}");
        }
        service.assert_serves();
    });
}

#[test]
fn configuration_space() {
    within_deadline(|| {
        let service = Service::new(3);
        // Whoever cannot flush finds no write cache.
        let without = negotiate(&service, 3, FEATURE_VERSION_1 | FEATURE_PROTOCOL);
        assert_eq!(read_config(&mut { without }, WRITEBACK), [0]);
        service.wait_for_end().unwrap();
        let features = FEATURE_VERSION_1 | FEATURE_PROTOCOL | FLUSH | CONFIG_WCE;
        let mut link = negotiate(&service, 3, features);
        assert_eq!(read_config(&mut link, 0), u64::from(SECTORS).to_le_bytes());
        // As many buffers as a queue of 128 descriptors holds.
        assert_eq!(read_config(&mut link, SEG_MAX), 126u32.to_le_bytes());
        assert_eq!(read_config(&mut link, NUM_QUEUES), 3u16.to_le_bytes());
        assert_eq!(read_config(&mut link, 250), [0; 6], "behind the end");

        assert_eq!(read_config(&mut link, WRITEBACK), [1]);
        let flags = VhostUserConfigFlags::WRITABLE;
        link.set_config(WRITEBACK, flags, &[0]).unwrap();
        assert_eq!(read_config(&mut link, WRITEBACK), [0]);
        // What is not to be written stays.
        link.set_config(0, flags, &[0xff; 8]).unwrap();
        assert_eq!(read_config(&mut link, 0), u64::from(SECTORS).to_le_bytes());

        link.reset_device().unwrap();
        assert_eq!(read_config(&mut link, WRITEBACK), [1]);
        link.set_config(WRITEBACK, flags, &[0]).unwrap();
        drop(link);
        service.wait_for_end().unwrap();
        let mut next = negotiate(&service, 1, features);
        assert_eq!(
            read_config(&mut next, WRITEBACK),
            [1],
            "of another front end"
        );
    });
}

/// The size is what a front end reads when it reads again.
#[test]
fn a_disk_that_grows() {
    within_deadline(|| {
        let service = Service::new(1);
        let mut front = FrontEnd::new(&service, 1);
        front.start(0, 0);
        service.handle.resize(512 * 250).unwrap();
        assert_eq!(read_config(&mut front.link, 0), 250u64.to_le_bytes());
        front.drivers[0].put(0, crate::driver::IN, 249, 512);
        front.offer(0, &[0]);
        assert_eq!(front.drivers[0].wait_for_used(1), [(0, 513)]);
        assert_eq!(front.drivers[0].status(0), 0);
    });
}
