//! The cases of the guest suite.

mod abrupt;
mod backup;
mod disks;
mod features;
mod fio;
mod forks;
mod live;
mod machine;
mod operate;
mod roundtrip;
mod sandbox;
mod served;
mod soak;
mod stock;
mod tour;

pub use soak::case as soak;

use crate::suite::Case;

/// Every case, the longest first, so that two jobs end at about the same time.
pub fn all() -> Vec<Case> {
    [
        stock::cases(),
        fio::cases(),
        features::cases(),
        backup::cases(),
        live::cases(),
        operate::cases(),
        roundtrip::cases(),
        served::cases(),
        disks::cases(),
        forks::cases(),
        sandbox::cases(),
        abrupt::cases(),
        machine::cases(),
        tour::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
