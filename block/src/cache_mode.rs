//! Caches between the guest and the medium.

use crate::names::named;

/// Which caches a write passes through before it is durable, in QEMU's terms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheMode {
    /// The host's page cache and the device's cache: a write is durable once flushed.
    #[default]
    Writeback,
    /// The device's cache only: data goes past the page cache (`O_DIRECT`). A write is durable once
    /// flushed.
    None,
    /// A write is durable when it completes.
    Writethrough,
    /// A write is durable when it completes, and data goes past the page cache.
    Directsync,
    /// As [`Writeback`](Self::Writeback), but nothing is ever synced: whatever was written since the
    /// disk was opened may be lost, or leave the image in pieces, if the host crashes or loses power.
    /// For disks that can be made again.
    Unsafe,
}

named!(
    CacheMode: Writeback = "writeback", None = "none" | "off", Writethrough = "writethrough",
    Directsync = "directsync", Unsafe = "unsafe"
);

impl CacheMode {
    /// Whether data goes past the page cache.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether a write is durable when it completes.
    pub(crate) fn is_write_through(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }
}
