//! The packed layout of a data file, and its cluster allocator.
//!
//! In the layout of the published format each guest cluster has one place in the data file, that of
//! its guest offset. With the incompatible feature "packed data file" (bit 62) an L2 entry may lead
//! to any cluster of the data file, as in an image without one: the file is as long as what is
//! stored in it, and can be smaller than the disk. An entry whose offset is 0 has a place exactly if
//! its COPIED flag is set, be its zero flag set or not; every entry that has a place has that flag,
//! and no two have the same place.
//!
//! Clusters of the data file have no refcounts: an open image knows what is free from its L2 tables,
//! all of which are read when it is opened for writing, and no guest data. It keeps one bit for each
//! cluster of the data file, 2.03 MiB per TiB in clusters of 64 KiB. A data file may have up to 2^31
//! clusters: 128 TiB of that size.

use super::allocator::Allocation;
use super::entry::{Cluster, Entry, L2Entry};
use super::free_map::FreeMap;
use super::geometry::Geometry;
use super::l1::L1Table;
use super::{DataFileLayout, table};
use crate::file::ImageFile;
use crate::sync::{Mutex, MutexGuard, lock_whole};
use crate::{Error, Result};

/// Most clusters that a data file may have; it bounds the memory for what is free.
pub(super) const MAX_CLUSTERS: u64 = 1 << 31;

/// A data file in the packed layout.
pub(crate) struct Packed {
    pub file: ImageFile,
    /// `None` if the image is open read-only.
    clusters: Option<Mutex<Clusters>>,
}

/// The clusters of a data file.
pub(crate) struct Clusters {
    cluster_bits: u32,
    /// Those below `next` that are free.
    free: FreeMap,
    /// From this one on all are free.
    next: u64,
    /// No cluster from this one on has ever been written: they read as zero.
    untouched: u64,
    /// There are no clusters from this one on.
    end: u64,
}

impl Packed {
    /// A data file that is only read.
    pub fn read_only(file: ImageFile) -> Self {
        Self {
            file,
            clusters: None,
        }
    }

    /// Finds out from the L2 tables of `image` which clusters of `file` are free.
    ///
    /// # Errors
    /// An entry that leads to a place outside the data file, or to one that another has.
    pub fn open(
        file: ImageFile,
        image: &ImageFile,
        geometry: Geometry,
        l1: &L1Table,
    ) -> Result<Self> {
        let file_clusters = file.size()?.div_ceil(geometry.cluster_size());
        let mut used = Used {
            words: Vec::new(),
            clusters: file_clusters.min(MAX_CLUSTERS),
        };
        for table in l1.tables() {
            let words = geometry.l2_words() as usize;
            let words = table::read(image, "l1_table entry", table, words)?;
            for entry in Entry::all(&words, geometry) {
                used.add(image, geometry, entry.word)?;
            }
        }
        let capacity = file.capacity()?.map(|bytes| geometry.cluster(bytes));
        let end = capacity.unwrap_or(MAX_CLUSTERS).min(MAX_CLUSTERS);
        let known = used.words.len() as u64 * u64::from(u64::BITS);
        let mut free = FreeMap::complement(used.words);
        // The last word may have bits of clusters that the device does not have.
        (end..known).for_each(|cluster| free.remove(cluster as usize));
        let clusters = Clusters {
            cluster_bits: geometry.cluster_bits,
            next: known.min(end),
            free,
            untouched: file_clusters,
            end,
        };
        Ok(Self {
            file,
            clusters: Some(Mutex::new(clusters)),
        })
    }

    /// The clusters of a data file that may be written.
    pub fn clusters(&self) -> Result<MutexGuard<'_, Clusters>> {
        let clusters = self.clusters.as_ref().ok_or(Error::ReadOnly)?;
        lock_whole(clusters).ok_or(Error::BrokenOff)
    }
}

impl Clusters {
    /// Takes 1 to `max` free clusters in a row: those from offset `goal` on, if the first of them
    /// is free and others behind it are not, else the first that are.
    ///
    /// # Errors
    /// No space left in `file`.
    pub fn allocate(
        &mut self,
        file: &ImageFile,
        goal: Option<u64>,
        max: u64,
    ) -> Result<Allocation> {
        let goal = goal.map(|offset| (offset >> self.cluster_bits) as usize);
        let run = match goal {
            Some(cluster) if self.free.contains(cluster) => {
                Some(cluster..cluster + self.free.run_length(cluster, max))
            }
            _ => self.free.run(max),
        };
        let (first, end) = match run {
            Some(run) => {
                run.clone().for_each(|cluster| self.free.remove(cluster));
                (run.start as u64, run.end as u64)
            }
            None => (self.next, self.end.min(self.next.saturating_add(max))),
        };
        if first >= end {
            return Err(file.full());
        }
        self.next = self.next.max(end);
        let zeroed = first >= self.untouched;
        self.untouched = self.untouched.max(end);
        Ok(Allocation {
            offset: first << self.cluster_bits,
            clusters: end - first,
            zeroed,
        })
    }

    /// Gives back clusters that no mapping on disk leads to.
    pub fn free(&mut self, offset: u64, clusters: u64) {
        let first = offset >> self.cluster_bits;
        (first..first + clusters).for_each(|cluster| self.free.insert(cluster as usize));
    }
}

/// Clusters that have been found to be in use.
struct Used {
    words: Vec<u64>,
    /// Those of the data file.
    clusters: u64,
}

impl Used {
    fn add(&mut self, image: &ImageFile, geometry: Geometry, entry: L2Entry) -> Result<()> {
        let (Cluster::Normal(offset) | Cluster::ZeroAlloc(offset)) =
            entry.cluster(Some(DataFileLayout::Packed))
        else {
            return Ok(());
        };
        let cluster = geometry.cluster(offset);
        let (word, bit) = ((cluster / 64) as usize, 1 << (cluster % 64));
        let problem = if geometry.in_cluster(offset) != 0 {
            "is not aligned to a cluster"
        } else if cluster >= self.clusters {
            "lies past the end of the data file"
        } else if self.words.get(word).is_some_and(|w| w & bit != 0) {
            "is that of another entry, too"
        } else {
            if self.words.len() <= word {
                self.words.resize(word + 1, 0);
            }
            self.words[word] |= bit;
            return Ok(());
        };
        let reason = format!("the place {offset:#x} in the data file {problem}");
        Err(image.invalid("l2_table entry", entry.0, reason))
    }
}
