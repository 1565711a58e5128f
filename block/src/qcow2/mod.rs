//! The qcow2 image format.
//!
//! Names of structures and fields are those of the published specification.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `header`, `parse`, `extension`, `entry`, `subclusters`, `table`, `refcount_width` | the format on disk |
//! | `switch` | changing the header as a whole |
//! | `policy` | which files an image may name |
//! | `open` | from files to a [`Qcow2`] |
//! | `mapping`, `remap` | guest offset → place, and changing it |
//! | `io` | reads and writes on top of that |
//! | `nowait` | those that wait for nothing |
//! | `compressed`, `compress`, `zstd` | compressed clusters: reading them, and writing them |
//! | `zeroes` | writing zeroes, and discarding |
//! | `vm_state` | what lies behind the disk in the same mapping |
//! | `resize`, `preallocate` | growing and shrinking the disk |
//! | `backing` | what shows where the image has nothing |
//! | `stamp` | whether that has changed since |
//! | `live` | what is done to the image of a disk in use |
//! | `rebase`, `commit` | putting an image on another backing file; moving its data to one below |
//! | `placement`, `packed` | where data lies: in the image, or in a data file of some kind |
//! | `cache`, `summary`, `l1`, `words`, `refcount` | L2 slices, the L1 table and refcounts, in memory |
//! | `allocator`, `free_map`, `reserved` | free clusters, and those that can never be free |
//! | `overlap` | keeping guest data off metadata, and marking damaged images |
//! | `requests`, `retired` | when clusters that lost their mapping may be used again |
//! | `flush` | the order in which all of that reaches the disk |
//! | `snapshot` | internal snapshots: their table, taking, applying and deleting them |
//! | `bitmaps` | persistent bitmaps of what has changed |
//! | `create`, `amend` | making new images, and changing options of others |
//! | `overlay` | making images on a base that they share, and opening them |
//! | `info`, `measure` | what a user wants to know of an image, and how large one will be |
//! | `check` | checking and repairing an image that is not open |
//!
//! # Lock order
//! A thread that holds one of these takes only ones further down:
//!
//! 1. the right to change the size (`Qcow2::resizing`);
//! 2. the right to start the bitmaps (`Bitmaps::starting`);
//! 3. a range of guest clusters (`crate::ranges`), at most one;
//! 4. the completeness of raw tables (`placement::Passthrough`);
//! 5. the right to write back (`Qcow2::flushing`);
//! 6. a set of the slice cache, or the list of new L1 entries;
//! 7. the refcounts, the clusters of a packed data file, the known hole of a data file
//!    or of a raw disk below (`crate::hole`), or the retired clusters;
//! 8. the right to sync a file (`ImageFile::sync_failed`) and, behind it, its new name
//!    (`ImageFile::named_in`), the list of ranges that are held, or the cluster that was decompressed
//!    last;
//! 9. inside a file that is used past the page cache, the range of a write (`Writers`).
//!
//! I/O may go on under all of them but the lists of ranges and of retired clusters: metadata is read
//! under 2, 4, 6 and 7, written under 2 (the marks of bitmaps), 5, 6 (a new L2 table) and 7, synced
//! under 2 and 5, and under 7 when the refcount table moves.
//!
//! The locks of an image come before those of the images below it, and behind those of a disk in use
//! (`crate::live`).
//!
//! Reads of clusters whose mapping is cached, and writes to them, take none, but for the first request
//! to each L2 table of a raw disk, and one of many to a slice of the cache or to the image file, which
//! makes a summary of that slice or the filter of metadata. A request whose slice is not in the cache
//! takes its set to read it; if every slice of the set waits to be written back, the request writes
//! back first, waits for that, and fails if that fails.

mod allocator;
mod amend;
mod backing;
mod bitmaps;
mod cache;
mod check;
mod commit;
mod compress;
mod compressed;
mod create;
mod entry;
mod extension;
mod flush;
mod free_map;
mod geometry;
mod header;
mod info;
mod io;
mod l1;
mod live;
mod mapping;
mod measure;
mod nowait;
mod open;
mod overlap;
mod overlay;
mod packed;
mod parse;
mod placement;
mod policy;
mod preallocate;
mod rebase;
mod refcount;
mod refcount_width;
mod remap;
mod requests;
mod reserved;
mod resize;
mod retired;
mod snapshot;
mod stamp;
mod subclusters;
mod summary;
mod switch;
mod table;
mod vm_state;
mod words;
mod zeroes;
mod zstd;

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64};
use std::fmt;
use std::sync::{Arc, OnceLock};

use bitmaps::Bitmaps;
use cache::SliceCache;
use compressed::Decompressed;
use geometry::Geometry;
use l1::L1Table;
use overlap::Filter;
use placement::Placement;

use refcount::Refcounts;
use requests::Requests;
use retired::Retired;

use crate::Disk;
use crate::file::ImageFile;
use crate::names::named;
use crate::ranges::RangeLocks;

pub use amend::{AmendOptions, amend};
pub use backing::{Backing, find_backing, path_of as backing_path};
pub(crate) use backing::{open_renamed, open_with_base};
pub(crate) use bitmaps::MAX_BITMAP_NAME;
pub use bitmaps::{BitmapAction, BitmapEditor, BitmapInfo, DirtyBits};
pub use check::{CheckOptions, CheckReport, Finding, FindingKind, Repair, check, check_storage};
pub use commit::Commit;
pub(crate) use commit::Part;
pub use compress::CompressedCluster;
pub use compressed::CompressionType;
pub use create::{CreateOptions, DataFileReuse, create, create_with};
pub(crate) use create::{NewFiles, begin};
pub use info::Info;
pub use measure::{bitmaps_size, full_size};
pub use open::OpenOptions;
pub(crate) use overlay::name_from;
pub use overlay::{Base, OverlayOptions, OverlayPlace};
pub use placement::DataFile;
pub use policy::Follow;
pub(crate) use rebase::Taking;
pub use rebase::{BackingName, NewBacking, set_backing_name};
pub use snapshot::{SnapshotInfo, SnapshotName};
pub use stamp::{base_difference, stamp_base};
pub(crate) use words::Words;

/// How guest data lies in an external data file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DataFileLayout {
    /// Each guest cluster at its guest offset, as the published format demands.
    #[default]
    Standard,
    /// Each guest cluster where there is room, and its space used again for others once it is
    /// discarded. Other programs refuse such an image.
    Packed,
}

named!(DataFileLayout: Standard = "standard", Packed = "packed");

/// An open qcow2 image.
///
/// Metadata that changed is written back on [`flush`](crate::Disk::flush), when the cache fills
/// up, and when the image is dropped, always behind the data that it maps.
pub struct Qcow2 {
    image: ImageFile,
    placement: Placement,
    /// What shows where the image has nothing.
    backing: Option<Arc<dyn Disk>>,
    geometry: Geometry,
    /// Of the disk, in bytes. A request that looks at it twice may see two sizes.
    size: AtomicU64,
    version: u32,
    has_snapshots: bool,
    read_only: bool,
    l1: L1Table,
    l2: SliceCache,
    /// Where metadata lies that guest data must not land on: in the image file, once guest data has
    /// been written in place there.
    metadata: OnceLock<Arc<Filter>>,
    incompatible_features: u64,
    compression_type: CompressionType,
    decompressed: Mutex<Decompressed>,
    /// The image has turned out to be damaged.
    corrupt: AtomicBool,
    /// Everything has been stored for the last time.
    closed: AtomicBool,
    /// That has failed.
    is_lost: AtomicBool,
    /// `None` in an image that is open read-only.
    bitmaps: Option<Bitmaps>,
    /// `None` in an image that is open read-only.
    refcounts: Option<Mutex<Refcounts>>,
    /// Data in the image file, or the packed data file, lies below this offset: the end of the file
    /// when it was opened, and of what has been allocated since. An entry that leads further is
    /// not ours.
    data_end: AtomicU64,
    ranges: RangeLocks,
    requests: Requests,
    retired: Retired,
    /// Whether the image file looks as if its clusters had been allocated beforehand.
    preallocated: OnceLock<bool>,
    /// Whether what reads as zero anyway is marked when zeros are written.
    mark_zeroes: bool,
    /// Held by whoever changes the size.
    resizing: Mutex<()>,
    /// Held by whoever writes metadata back.
    flushing: Mutex<()>,
}

impl fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2")
            .field("image", &self.image.path)
            .field("size", &self.size())
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}
