//! Rings and requests in guest memory, served on this thread.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use tandem_block::Disk;
use tandem_devices::GuestMemory;
use tandem_devices::virtio::block::fuzzing::serve;
use tandem_fuzz::driver::{AVAILABLE, Driver, FEATURES, TABLE, USED, clear, disk, guest_memory};
use tandem_fuzz::input::Input;
use tandem_fuzz::limit::limited;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

/// Most times that the device looks at the ring.
const ROUNDS: usize = 6;

static MEMORY: LazyLock<GuestMemory> = LazyLock::new(guest_memory);
static DISK: LazyLock<Arc<dyn Disk>> = LazyLock::new(disk);

fn queue(size: u16, event_idx: bool) -> Queue {
    let mut queue = Queue::new(16).unwrap();
    queue.set_size(size);
    queue
        .try_set_desc_table_address(GuestAddress(TABLE))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(AVAILABLE))
        .unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    queue
}

fn run(input: &mut Input<'_>) {
    clear(&MEMORY);
    let size = 1 << input.below(5);
    let features = FEATURES & !(u64::from(input.u16()) & u64::from(input.u16()));
    let mut queue = queue(size, input.bool());
    let mut driver = Driver::new(&MEMORY, size);
    for _ in 0..ROUNDS {
        for _ in 0..1 + input.below(12) {
            driver.step(input);
        }
        let before = queue.next_used();
        let served = serve(Arc::clone(&DISK), features, &MEMORY, queue);
        queue = served.0;
        let Ok(answered) = served.1 else { return };
        let used = queue.next_used().wrapping_sub(before);
        assert_eq!(usize::from(used), answered, "each is answered once");
        if input.is_empty() {
            return;
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    limited(|| run(&mut Input::new(bytes)));
});
