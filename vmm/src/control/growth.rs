//! Disks on block devices that grow while the VM runs.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Control;
use crate::error::Result;
use crate::sandbox::{self, Role};

/// How often a device is asked for its size: the system tells nobody of a change.
const INTERVAL: Duration = Duration::from_secs(2);

/// Has each disk that is as large as the block device it lies on grow with that device. Dropping it
/// ends that.
pub(crate) struct GrowthWatch {
    /// `None` only while it is dropped.
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// A disk on a block device.
struct Watched {
    index: usize,
    /// What the device had when it was last asked, in bytes.
    known: u64,
}

impl GrowthWatch {
    /// `None` without a disk on a block device.
    pub(crate) fn start(control: &Control) -> Result<Option<Self>> {
        let disks = (0..control.0.disks.len()).filter_map(|index| {
            let known = control.0.disks.get(index)?.device_size()?;
            Some(Watched { index, known })
        });
        let disks: Vec<_> = disks.collect();
        if disks.is_empty() {
            return Ok(None);
        }
        let (end, ended) = mpsc::channel();
        let control = control.clone();
        let role = control.confined(Role::Watch);
        let body = move || watch(&control, disks, &ended);
        let thread = sandbox::spawn("device-growth".to_owned(), role, body)?;
        Ok(Some(Self {
            end: Some(end),
            thread: Some(thread),
        }))
    }
}

impl Drop for GrowthWatch {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been reported on the thread itself.
            let _ = thread.join();
        }
    }
}

fn watch(control: &Control, mut disks: Vec<Watched>, ended: &mpsc::Receiver<()>) {
    while ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
        for disk in &mut disks {
            disk.look(control);
        }
    }
}

impl Watched {
    fn look(&mut self, control: &Control) {
        let Some(operated) = control.0.disks.get(self.index) else {
            return;
        };
        let Some(size) = operated.device_size() else {
            return;
        };
        // One that was smaller than its device is meant to be.
        if size > self.known && operated.handle.disk().size() == self.known {
            // What keeps it from growing now may do so the next time; the disk is as it was.
            if control.resize(self.index, None, false).is_err() {
                return;
            }
        }
        self.known = size;
    }
}
