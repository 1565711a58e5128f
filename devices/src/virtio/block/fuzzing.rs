//! A queue that is served on the caller's thread, for fuzzers: what a worker does with what a driver
//! has made available, without the threads around it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use tandem_block::Disk;
use virtio_queue::Queue;

use super::slot::{Slot, Slots};
use super::target::{Gather, Target};
use crate::GuestMemory;
use crate::virtio::queue::{ActiveQueue, RingError};

/// Answers what is available in `queue`, which is ready and lies in `mem`, for a driver that has
/// accepted `features`. Returns the queue, and how many requests have been answered.
///
/// # Errors
/// How the driver has broken the ring.
pub fn serve(
    disk: Arc<dyn Disk>,
    features: u64,
    mem: &GuestMemory,
    queue: Queue,
) -> (Queue, Result<usize, String>) {
    let writeback = Arc::new(AtomicBool::new(true));
    let target = Target::new(disk, None, writeback, features);
    let mut queue = ActiveQueue::new(mem, queue);
    let answered = answer_available(&target, &mut queue);
    (queue.into_inner(), answered.map_err(|e| e.to_string()))
}

fn answer_available(target: &Target, queue: &mut ActiveQueue<'_>) -> Result<usize, RingError> {
    let mut slots = Slots::new();
    let taken = take_available(target, queue, &mut slots);
    let mut gather = Gather::new();
    let mut answered = 0;
    for mut slot in slots {
        if !target.try_now(&mut slot, &mut gather) {
            target.carry_out(&mut slot, &mut gather);
        }
        let joined = std::mem::take(&mut slot.joined);
        for mut slot in std::iter::once(slot).chain(joined) {
            let written = slot.answer();
            queue.complete(slot.head, written)?;
            answered += 1;
        }
    }
    queue.publish()?;
    queue.wants_interrupt()?;
    queue.enable_doorbell()?;
    taken.map(|()| answered)
}

/// Takes what is available; requests that go together are in one slot.
fn take_available<'m>(
    target: &Target,
    queue: &mut ActiveQueue<'m>,
    slots: &mut Slots<'m>,
) -> Result<(), RingError> {
    let now = Instant::now();
    queue.disable_doorbell()?;
    for _ in 0..queue.available()? {
        let mut slot = Box::new(Slot::new(now));
        let Some(head) = queue.take(&mut slot.buffers)? else {
            break;
        };
        slot.parse(head, &target.rules, now);
        let rest = match slots.last_mut() {
            Some(last) => last.join(slot),
            None => Some(slot),
        };
        slots.extend(rest);
    }
    Ok(())
}
