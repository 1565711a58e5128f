//! What a VM's disks have done so far, for other programs to read.

mod log;

use std::path::PathBuf;
use std::time::SystemTime;

use serde::Serialize;
use tandem_devices::virtio::block::{Counters, LATENCY_BUCKETS};

use crate::control::{Control, Operated, VmState, device_name, lossy, millis};

pub use log::{MetricsLog, MetricsOutput, Reporter};

/// What a VM's disks have done since it was built.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Metrics {
    /// Milliseconds since 1970, UTC.
    pub timestamp_ms: u64,
    /// Milliseconds since the VM was built.
    pub uptime_ms: u64,
    /// What the VM is doing.
    pub state: VmState,
    /// The disks, in the order of [`Config::disks`](crate::Config::disks).
    pub disks: Vec<DiskMetrics>,
}

/// What a disk has done.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct DiskMetrics {
    /// Its place in [`Config::disks`](crate::Config::disks).
    pub index: usize,
    /// What Linux guests call it.
    pub name: String,
    /// The image.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// What went through all queues.
    pub total: QueueMetrics,
    /// What went through each queue.
    pub queues: Vec<QueueMetrics>,
    /// How often the guest broke a ring, so that the device needed a reset.
    pub broken_rings: u64,
    /// The last failure that is not simply a bad request.
    pub last_error: Option<String>,
}

/// Counters of a queue, or of several.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct QueueMetrics(#[serde(with = "CountersDef")] pub Counters);

/// How [`Counters`] are written. What has no entry here does not compile.
#[derive(Serialize)]
#[serde(remote = "Counters")]
struct CountersDef {
    reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
    zeroes: u64,
    ids: u64,
    invalid: u64,
    read_bytes: u64,
    written_bytes: u64,
    failed: u64,
    without_status: u64,
    merged: u64,
    handed_on: u64,
    latency: [u64; LATENCY_BUCKETS],
}

impl Control {
    /// What the disks have done so far. It never waits, and tells the truth also when the VM has
    /// ended.
    pub fn metrics(&self) -> Metrics {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let disks = self.operated().iter().enumerate();
        let status = self.status();
        Metrics {
            timestamp_ms: millis(since_1970.unwrap_or_default()),
            uptime_ms: status.uptime_ms,
            state: status.state,
            disks: disks.map(|(index, disk)| disk.metrics(index)).collect(),
        }
    }
}

impl Operated {
    fn metrics(&self, index: usize) -> DiskMetrics {
        let stats = self.handle.stats();
        let queues: Vec<_> = stats.queues().into_iter().map(QueueMetrics).collect();
        DiskMetrics {
            index,
            name: device_name(index),
            path: self.image.path(),
            total: sum(&queues),
            queues,
            broken_rings: stats.broken_rings(),
            last_error: stats.last_error(),
        }
    }
}

fn sum(queues: &[QueueMetrics]) -> QueueMetrics {
    let mut total: Counters = Counters::default();
    for QueueMetrics(queue) in queues {
        let pairs = [
            (&mut total.reads, queue.reads),
            (&mut total.writes, queue.writes),
            (&mut total.flushes, queue.flushes),
            (&mut total.discards, queue.discards),
            (&mut total.zeroes, queue.zeroes),
            (&mut total.ids, queue.ids),
            (&mut total.invalid, queue.invalid),
            (&mut total.read_bytes, queue.read_bytes),
            (&mut total.written_bytes, queue.written_bytes),
            (&mut total.failed, queue.failed),
            (&mut total.without_status, queue.without_status),
            (&mut total.merged, queue.merged),
            (&mut total.handed_on, queue.handed_on),
        ];
        let latencies = total.latency.iter_mut().zip(queue.latency);
        for (sum, counter) in pairs.into_iter().chain(latencies) {
            *sum = sum.wrapping_add(counter);
        }
    }
    QueueMetrics(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_have_every_counter() {
        let mut queue = Counters::default();
        queue.latency = std::array::from_fn(|bucket| 100 + bucket as u64);
        queue.reads = 1;
        queue.writes = 2;
        queue.flushes = 3;
        queue.discards = 4;
        queue.zeroes = 5;
        queue.ids = 6;
        queue.invalid = 7;
        queue.read_bytes = 8;
        queue.written_bytes = 9;
        queue.failed = 10;
        queue.without_status = 11;
        queue.merged = 12;
        queue.handed_on = 13;
        let one = serde_json::to_value(QueueMetrics(queue)).unwrap();
        let two = serde_json::to_value(sum(&[QueueMetrics(queue), QueueMetrics(queue)])).unwrap();
        let (one, two) = (one.as_object().unwrap(), two.as_object().unwrap());
        assert_eq!(one.len(), 14);
        for (name, value) in one {
            let double = |value: &serde_json::Value| value.as_u64().unwrap() * 2;
            match value.as_array() {
                None => assert_eq!(two[name], double(value), "{name}"),
                Some(buckets) => {
                    assert_eq!(buckets.len(), LATENCY_BUCKETS);
                    let doubled: Vec<_> = buckets.iter().map(double).collect();
                    assert_eq!(two[name], serde_json::json!(doubled), "{name}");
                }
            }
        }
    }
}
