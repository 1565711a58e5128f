//! Giving a disk its space before anything is written to it.

use crate::names::named;

/// How much of a new disk gets its space at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Preallocation {
    /// Space is taken when the guest writes.
    #[default]
    Off,
    /// qcow2 only: the mapping is complete, the data is sparse.
    Metadata,
    /// The space is reserved on the host.
    Falloc,
    /// Zeros are written to all of it.
    Full,
}

named!(Preallocation: Off = "off", Metadata = "metadata", Falloc = "falloc", Full = "full");
