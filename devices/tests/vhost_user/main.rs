//! The block device as a vhost-user back end, driven over a real socket by the front end of the crate
//! `vhost` and by front ends that break every rule.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/driver.rs"]
mod driver;
#[path = "../common/machine.rs"]
mod machine;

mod front_end;
mod hostile;
mod negotiation;
mod random;
mod rings;
mod stopping;
