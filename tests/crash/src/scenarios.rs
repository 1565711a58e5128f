//! Operations on images that no guest uses, by name.

use crate::power::Run;
use crate::{operations, rewrites};

/// Explores an operation; a violation panics.
pub type Scenario = fn(&mut Run);

pub const SCENARIOS: [(&str, Scenario); 14] = [
    ("taking-a-snapshot", operations::taking_a_snapshot),
    ("applying-a-snapshot", operations::applying_a_snapshot),
    ("deleting-a-snapshot", operations::deleting_a_snapshot),
    (
        "snapshots-without-a-dirty-bit",
        operations::operations_without_a_dirty_bit,
    ),
    ("rebasing", operations::rebasing),
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
    ("committing", rewrites::committing),
    ("growing-with-space", rewrites::growing_with_space),
];
