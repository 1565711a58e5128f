//! What the fuzzers have in common.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `input` | the fuzzer's bytes as numbers and choices |
//! | `limit` | how much memory an input may make the code take |
//! | `memory` | files in memory |
//! | `kinds` | valid images of all kinds |
//! | `places` | where the structures of an image are, and changing them |
//! | `exercise` | all that can be done with an image, and what must hold |
//! | `feedback` | what else makes an input worth keeping |
//! | `files` | a directory of images, and what they must not lead to |
//! | `driver` | what a guest can do with a block device |
//! | `machine` | a machine whose disks are operated, and clients that do so |
//! | `requests` | what clients of the control socket may say |

pub mod driver;
pub mod exercise;
pub mod feedback;
pub mod files;
pub mod input;
pub mod kinds;
pub mod limit;
pub mod machine;
pub mod memory;
pub mod places;
pub mod requests;
