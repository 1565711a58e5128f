//! Operations that take time, beside the requests of clients.

use std::any::Any;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::Builder;

use serde::Serialize;
use tandem_block::{LiveReport, Progress};

use super::{Control, ControlError, Operated, device_name, lock};

/// Most jobs that are remembered, unless more go on: one on each disk.
const REMEMBERED: usize = 16;

/// What jobs there are.
#[derive(Default)]
pub(crate) struct Jobs(Mutex<State>);

#[derive(Default)]
struct State {
    last: u64,
    /// From the oldest on.
    jobs: VecDeque<Arc<Job>>,
}

struct Job {
    id: u64,
    kind: &'static str,
    disk: String,
    done: AtomicU64,
    total: AtomicU64,
    is_cancelled: AtomicBool,
    outcome: Mutex<Option<Outcome>>,
}

/// How a job has ended.
#[derive(Clone)]
enum Outcome {
    Done {
        stopped_us: u64,
        warning: Option<String>,
    },
    Cancelled,
    Failed {
        kind: &'static str,
        message: String,
    },
}

/// An operation that takes time.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct JobInfo {
    /// By which it is known.
    pub job: u64,
    /// What it does: `commit` or `rebase`.
    pub kind: &'static str,
    /// The name of the disk.
    pub disk: String,
    /// `running`, `done`, `cancelled` or `failed`.
    pub state: &'static str,
    /// How many bytes it has been through.
    pub done: u64,
    /// How many there are, as far as is known: more when the guest writes.
    pub total: u64,
    /// Microseconds that the guest's requests had to wait for it at a stretch, at most.
    pub stopped_us: Option<u64>,
    /// What has gone wrong that is not needed for the disk as it is now.
    pub warning: Option<String>,
    /// Why it has failed.
    pub error: Option<String>,
    /// The same as a word: the [kind](ControlError::kind) of the error.
    pub error_kind: Option<&'static str>,
}

impl From<&ControlError> for Outcome {
    fn from(error: &ControlError) -> Self {
        Self::Failed {
            kind: error.kind(),
            message: error.to_string(),
        }
    }
}

impl Job {
    fn info(&self) -> JobInfo {
        let mut info = JobInfo {
            job: self.id,
            kind: self.kind,
            disk: self.disk.clone(),
            state: "running",
            done: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
            stopped_us: None,
            warning: None,
            error: None,
            error_kind: None,
        };
        match lock(&self.outcome).clone() {
            None => {}
            Some(Outcome::Cancelled) => info.state = "cancelled",
            Some(Outcome::Failed { kind, message }) => {
                info.state = "failed";
                info.error = Some(message);
                info.error_kind = Some(kind);
            }
            Some(Outcome::Done {
                stopped_us,
                warning,
            }) => {
                info.state = "done";
                info.stopped_us = Some(stopped_us);
                info.warning = warning;
            }
        }
        info
    }

    fn is_over(&self) -> bool {
        lock(&self.outcome).is_some()
    }

    /// Has `operation` of `disk` done, which asks from time to time whether it is to go on.
    fn run(
        &self,
        disk: &Operated,
        operation: impl FnOnce(Progress<'_>) -> tandem_block::Result<LiveReport>,
    ) -> Outcome {
        let report = operation(&mut |done, total| {
            self.done.store(done, Ordering::Relaxed);
            self.total.store(total, Ordering::Relaxed);
            match self.is_cancelled.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        });
        match report {
            Ok(report) => {
                let total = self.total.load(Ordering::Relaxed);
                self.done.store(total, Ordering::Relaxed);
                Outcome::Done {
                    stopped_us: micros(&report),
                    warning: report.warning.map(|warning| warning.to_string()),
                }
            }
            Err(tandem_block::Error::Cancelled) => Outcome::Cancelled,
            Err(error) => (&disk.error(error)).into(),
        }
    }
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it said nothing").to_owned()
}

/// How long requests had to wait.
pub(super) fn micros(report: &LiveReport) -> u64 {
    u64::try_from(report.stopped.as_micros()).unwrap_or(u64::MAX)
}

impl Jobs {
    /// Ends those that run as soon as they can be ended.
    pub(super) fn cancel_all(&self) {
        for job in &lock(&self.0).jobs {
            job.is_cancelled.store(true, Ordering::Relaxed);
        }
    }

    fn add(&self, kind: &'static str, disk: String) -> Result<Arc<Job>, ControlError> {
        let mut state = lock(&self.0);
        let is_in_its_way = |job: &&Arc<Job>| job.disk == disk && !job.is_over();
        if let Some(job) = state.jobs.iter().find(is_in_its_way) {
            return Err(ControlError::Busy { disk, job: job.id });
        }
        state.last += 1;
        let job = Arc::new(Job {
            id: state.last,
            kind,
            disk,
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            is_cancelled: AtomicBool::new(false),
            outcome: Mutex::default(),
        });
        if state.jobs.len() >= REMEMBERED
            && let Some(oldest) = state.jobs.iter().position(|job| job.is_over())
        {
            state.jobs.remove(oldest);
        }
        state.jobs.push_back(job.clone());
        Ok(job)
    }
}

impl Control {
    /// The operations that take time: those that go on, and the last ones that have ended.
    pub fn jobs(&self) -> Vec<JobInfo> {
        let jobs = lock(&self.0.jobs.0);
        jobs.jobs.iter().map(|job| job.info()).collect()
    }

    /// Has the operation known as `job` end without having done what it is for, unless that is done or
    /// cannot be stopped any more. This does not wait for its end.
    ///
    /// # Errors
    /// [`ControlError::NoSuchJob`].
    pub fn cancel_job(&self, job: u64) -> Result<(), ControlError> {
        let jobs = lock(&self.0.jobs.0);
        let found = jobs.jobs.iter().find(|other| other.id == job);
        let found = found.ok_or(ControlError::NoSuchJob(job))?;
        found.is_cancelled.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Begins `operation`, called `kind`, on disk number `index`. Returns its number.
    pub(super) fn start_job(
        &self,
        kind: &'static str,
        index: usize,
        operation: impl FnOnce(Progress<'_>) -> tandem_block::Result<LiveReport> + Send + 'static,
    ) -> Result<u64, ControlError> {
        let _operation = self.begin()?;
        let job = self.0.jobs.add(kind, device_name(index))?;
        let (control, run) = (self.clone(), job.clone());
        let body = move || {
            // The end of the VM waits for this.
            let operation = || match control.begin() {
                Ok(_operation) => Ok(run.run(control.disk(index)?, operation)),
                Err(error) => Err(error),
            };
            // The disk is as valid as after a request that panics, and the job is not looked at again.
            let ended = catch_unwind(AssertUnwindSafe(operation));
            let ended = ended.unwrap_or_else(|panic| {
                Err(ControlError::Panic {
                    disk: run.disk.clone(),
                    message: message(&*panic),
                })
            });
            *lock(&run.outcome) = Some(ended.unwrap_or_else(|error| (&error).into()));
        };
        let thread = Builder::new().name("job".to_owned()).spawn(body);
        thread.map_err(|source| {
            let action = "start the thread of a job";
            let error = ControlError::Host { action, source };
            *lock(&job.outcome) = Some((&error).into());
            error
        })?;
        Ok(job.id)
    }
}
