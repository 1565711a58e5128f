//! Requests of several queues at the same time.

use tandem_block::LiveDisk;

use crate::storage::{Event, Log};
use crate::workload::{Op, request};

#[cfg(not(shuttle))]
use std::thread;

#[cfg(shuttle)]
use shuttle::thread;

/// Carries out `ops`, each on the next of `queues` threads, and logs when each is begun and done. Under
/// the model checker `shuttle` the order in which the steps of the threads happen is the same whenever
/// the seed is the same.
pub fn perform(disk: &LiveDisk, ops: &[Op], queues: usize, log: &Log) -> Result<(), String> {
    thread::scope(|scope| {
        let queue = |queue: usize| {
            scope.spawn(move || {
                for (op, what) in ops.iter().enumerate().skip(queue).step_by(queues) {
                    log.lock().unwrap().push(Event::Begun { op });
                    request(disk, what).map_err(|e| format!("{op}: {what:?}: {e}"))?;
                    log.lock().unwrap().push(Event::Done { op });
                }
                Ok(())
            })
        };
        let threads: Vec<_> = (0..queues).map(queue).collect();
        let mut ended = threads.into_iter().map(|thread| thread.join().unwrap());
        ended.try_for_each(|ended| ended)
    })
}

/// Runs `f` where the scheduler of `shuttle` decides on the order of events, by `seed`.
pub fn scheduled<T: Send + 'static>(seed: u64, f: impl Fn() -> T + Send + Sync + 'static) -> T {
    #[cfg(shuttle)]
    {
        use shuttle::scheduler::RandomScheduler;
        let result = std::sync::Arc::new(std::sync::Mutex::new(None));
        let mut config = shuttle::Config::new();
        config.stack_size = 1 << 20;
        config.max_steps = shuttle::MaxSteps::None;
        config.failure_persistence = shuttle::FailurePersistence::None;
        let runner = shuttle::Runner::new(RandomScheduler::new_from_seed(seed, 1), config);
        let slot = result.clone();
        runner.run(move || *slot.lock().unwrap() = Some(f()));
        let result = result.lock().unwrap().take();
        result.expect("it has run once")
    }
    #[cfg(not(shuttle))]
    {
        let _ = seed;
        f()
    }
}
