//! Operations on images that no guest uses, by name.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::power::Run;
use crate::{chains, commits, operations, rewrites};

/// Explores an operation; a violation panics.
pub type Scenario = fn(&mut Run);

pub const SCENARIOS: [(&str, Scenario); 24] = [
    ("taking-a-snapshot", operations::taking_a_snapshot),
    ("applying-a-snapshot", operations::applying_a_snapshot),
    ("deleting-a-snapshot", operations::deleting_a_snapshot),
    (
        "snapshots-without-a-dirty-bit",
        operations::operations_without_a_dirty_bit,
    ),
    ("rebasing", operations::rebasing),
    (
        "linking-refcount-blocks",
        operations::linking_refcount_blocks,
    ),
    ("repairing", operations::repairing),
    (
        "following-changes-in-a-bitmap",
        operations::following_changes_in_a_bitmap,
    ),
    ("changing-bitmaps", operations::changing_bitmaps),
    ("other-backing-files", rewrites::other_backing_files),
    ("more-in-the-header", rewrites::more_in_the_header),
    ("amending-a-data-file", rewrites::amending_a_data_file),
    ("amending-an-image", rewrites::amending_an_image),
    ("committing", commits::committing),
    ("emptying-a-data-file", commits::emptying_a_data_file),
    ("resizing-a-raw-disk", rewrites::resizing_a_raw_disk),
    ("forking", chains::forking),
    ("committing-in-use", chains::committing_in_use),
    ("rebasing-in-use", chains::rebasing_in_use),
    ("operating-on-chains", chains::operating_on_chains),
    ("committing-with-stamps", chains::committing_with_stamps),
    ("making-overlays", chains::making_overlays),
    ("growing-with-space", rewrites::growing_with_space),
    (
        "growing-after-an-interrupted-shrink",
        rewrites::growing_after_an_interrupted_shrink,
    ),
];

/// Explores `scenario`; what it panics with is an error.
///
/// # Errors
/// What is wrong.
pub fn run(scenario: Scenario, run: &mut Run) -> Result<(), String> {
    let explored = catch_unwind(AssertUnwindSafe(|| scenario(run)));
    explored.map_err(|panic| {
        run.tally.violations += 1;
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default()
    })
}
