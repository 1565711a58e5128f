//! The ways to stop while requests wait: they are completed first, and nothing touches the front end's
//! memory afterwards.

use std::thread;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::common::gate::Call;
use crate::driver::IN;
use crate::front_end::{COLD, FrontEnd, Service, open_during};
use crate::machine::within_deadline;

/// Requests that wait.
const WAITING: usize = 3;

/// A front end with requests that wait.
fn waiting(service: &Service) -> FrontEnd {
    let mut front = FrontEnd::new(service, 1);
    front.start(0, 0);
    service.disk.close();
    for place in 0..WAITING as u16 {
        front.drivers[0].put(place, IN, COLD + 2 * u64::from(place), 512);
    }
    front.offer(0, &[0, 1, 2]);
    service.disk.wait_for_waiting(WAITING);
    front
}

fn assert_completed(front: &mut FrontEnd) {
    assert_eq!(front.drivers[0].take_used().len(), WAITING);
    for place in 0..WAITING as u16 {
        let fill = COLD as u8 + 2 * place as u8;
        assert_eq!(front.drivers[0].data(place, 512), [fill; 512]);
    }
}

/// What is offered now is not even looked at.
fn assert_left_alone(front: &mut FrontEnd) {
    front.drivers[0].put(3, IN, 0, 512);
    front.offer(0, &[3]);
    let before = front.memory();
    thread::sleep(Duration::from_millis(10));
    assert!(front.memory() == before, "memory has changed");
}

#[test]
fn a_stopped_ring_has_answered_all_and_goes_on_behind() {
    within_deadline(|| {
        let service = Service::new(1);
        let mut front = waiting(&service);
        let base = open_during(&service, || front.link.get_vring_base(0).unwrap());
        assert_eq!(base, 3);
        assert_completed(&mut front);
        service.disk.take_calls();
        assert_left_alone(&mut front);

        front.start(0, 3);
        assert_eq!(front.drivers[0].wait_for_used(1), [(3, 513)]);
        assert_eq!(service.disk.take_calls(), [Call::Read(0, 512)]);
        // Where nothing waits, nothing is waited for.
        assert_eq!(front.link.get_vring_base(0).unwrap(), 4);
    });
}

#[test]
fn a_reset_completes_requests_and_leaves_rings_disabled() {
    within_deadline(|| {
        let service = Service::new(1);
        let mut front = waiting(&service);
        open_during(&service, || front.link.reset_device().unwrap());
        assert_completed(&mut front);
        assert_left_alone(&mut front);
        front.start(0, 3);
        assert_eq!(front.drivers[0].wait_for_used(1), [(3, 513)]);
    });
}

#[test]
fn a_disabled_ring_has_answered_all() {
    within_deadline(|| {
        let service = Service::new(1);
        let mut front = waiting(&service);
        open_during(&service, || front.link.set_vring_enable(0, false).unwrap());
        assert_completed(&mut front);
        assert_left_alone(&mut front);
    });
}

/// The connection breaks while the disk is slow. The next front end waits, and is served.
#[test]
fn a_front_end_that_goes_while_requests_wait() {
    within_deadline(|| {
        let service = Service::new(1);
        let mut front = waiting(&service);
        front.disconnect();
        let next = service.connect();
        thread::sleep(Duration::from_millis(20));
        assert!(!service.has_ended(), "requests still wait");
        assert_eq!(front.drivers[0].ring.used_idx(), 0);
        service.disk.open();
        service.wait_for_end().unwrap();
        assert_completed(&mut front);
        assert_left_alone(&mut front);
        drop(next);
        service.wait_for_end().unwrap();
        service.assert_serves();
    });
}

/// A front end finds what it has left, and goes on from there.
#[test]
fn a_front_end_that_connects_again() {
    within_deadline(|| {
        let service = Service::new(1);
        let mut front = FrontEnd::new(&service, 1);
        front.start(0, 0);
        front.assert_reads(0, 1);
        front.assert_reads(0, 2);
        front.disconnect();
        service.wait_for_end().unwrap();
        front.drivers[0].put(3, IN, 0, 512);
        front.offer(0, &[3]);
        front.connect(&service);
        front.start(0, 2);
        assert_eq!(front.drivers[0].wait_for_used(1), [(3, 513)]);
    });
}

#[test]
fn a_stop_ends_a_connection_with_its_requests_completed() {
    within_deadline(|| {
        let mut service = Service::new(1);
        let mut front = waiting(&service);
        service.stop.stop();
        thread::sleep(Duration::from_millis(20));
        assert!(!service.has_ended(), "requests still wait");
        service.disk.open();
        service.wait_for_end().unwrap();
        service.join();
        assert_completed(&mut front);
        assert_left_alone(&mut front);
    });
}

#[test]
fn a_stop_ends_the_wait_for_a_front_end() {
    within_deadline(|| {
        let mut service = Service::new(1);
        service.stop.stop();
        service.join();
        assert!(!service.has_ended());
    });
}

/// Also of one that has begun a message.
#[test]
fn a_stop_ends_the_wait_for_the_rest_of_a_message() {
    within_deadline(|| {
        let mut service = Service::new(1);
        let mut connection = service.connect();
        std::io::Write::write_all(&mut connection, &[1, 0, 0]).unwrap();
        thread::sleep(Duration::from_millis(10));
        service.stop.stop();
        service.join();
    });
}
