//! Giving a disk its space before anything is written to it.

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

impl Preallocation {
    /// What it is called by tools.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }

    /// The kind called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        let all = [Self::Off, Self::Metadata, Self::Falloc, Self::Full];
        all.into_iter().find(|kind| kind.name() == name)
    }
}
