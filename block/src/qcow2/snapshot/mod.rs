//! Internal snapshots (qcow2 specification, "Snapshots").
//!
//! A snapshot has an L1 table of its own, and shares L2 tables and clusters with others and with the
//! disk, which refcounts tell. What is shared lacks the COPIED flag in the tables of the disk, and is
//! copied before it changes (`mapping`, `io`).
//!
//! The operations are for an image that nobody else uses. In version 3 the dirty bit is set
//! meanwhile: refcounts and flags cannot change at once. The switch from the old state to the new one
//! is a single write to the header. References are on disk before it that the new state needs, and
//! those that only the old one needed go after it, so a crash at worst leaks clusters and leaves
//! wrong COPIED flags, which the repair of a dirty image mends.

mod references;
mod table;

use std::time::{Duration, SystemTime};

use super::Qcow2;
use super::entry::COPIED;
use super::geometry::ENTRY_SIZE;
use super::header::{Header, MAX_L1_SIZE, incompatible};
use super::reserved::Field;
use super::table as entries;
use crate::sync::atomic::Ordering;
use crate::{Disk, Error, Result};

use references::References;
pub(crate) use table::{Snapshot, SnapshotTable, encode, read_table};

/// Offset of `size` in the header; `crypt_method`, `l1_size` and `l1_table_offset` follow it.
const HEADER_SIZE: u64 = 24;
/// Offset of `nb_snapshots` in the header; `snapshots_offset` follows it.
const HEADER_SNAPSHOTS: u64 = 60;
/// Most snapshots that an image may have.
const MAX_SNAPSHOTS: usize = 65536;
/// Most bytes of a snapshot's name that other programs read.
const MAX_NAME: usize = 255;

/// An internal snapshot, as its entry in the snapshot table tells.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotInfo {
    /// Which no other snapshot of the image has; untrusted bytes.
    pub id: Vec<u8>,
    /// Which others may have; untrusted bytes.
    pub name: Vec<u8>,
    /// When it was taken, since 1970.
    pub date: Duration,
    /// Clock of the guest since it was started.
    pub vm_clock: Duration,
    /// Bytes of the state of the machine that was saved with it.
    pub vm_state_size: u64,
    /// Size of the disk in bytes.
    pub disk_size: u64,
    /// Instructions that the guest had executed, if they were counted.
    pub icount: Option<u64>,
}

impl From<Snapshot> for SnapshotInfo {
    fn from(snapshot: Snapshot) -> Self {
        let nanos = u64::from(snapshot.date_nsec);
        Self {
            id: snapshot.id,
            name: snapshot.name,
            date: Duration::from_secs(snapshot.date_sec.into()) + Duration::from_nanos(nanos),
            vm_clock: Duration::from_nanos(snapshot.vm_clock_nsec),
            vm_state_size: snapshot.vm_state_size,
            disk_size: snapshot.disk_size,
            icount: snapshot.icount,
        }
    }
}

impl Qcow2 {
    /// The internal snapshots, in the order of their table.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a table that the format does not allow; [`Error::Io`].
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        let header = Header::read(&*self.image.storage, &self.image.path)?;
        let table = read_table(&*self.image.storage, &self.image.path, &header)?;
        Ok(table.snapshots.into_iter().map(Into::into).collect())
    }

    /// Takes a snapshot of the disk, called `name`, and closes the image.
    ///
    /// # Errors
    /// [`Error::Option`] for a name of more than 255 bytes, and for an image with an external data
    /// file, which can have no snapshots; [`Error::Invalid`] if a refcount would become too large:
    /// all before anything has changed. After an error of another kind the old state or the new
    /// one is there, and the image is marked as dirty.
    pub fn create_snapshot(self, name: &[u8]) -> Result<()> {
        if name.len() > MAX_NAME {
            let reason = format!("the name of a snapshot can have {MAX_NAME} bytes at most");
            return Err(Error::Option(reason));
        }
        if self.placement.data_file_layout().is_some() {
            let reason = "an image with an external data file cannot have internal snapshots";
            return Err(Error::Option(reason.to_owned()));
        }
        self.change_snapshots(|change| change.create(name))
    }

    /// Makes the disk what it was when the snapshot with the ID or, if there is none, the name
    /// `name` was taken, and closes the image. What the disk holds now is lost.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`]; as [`create_snapshot`](Self::create_snapshot).
    pub fn apply_snapshot(self, name: &[u8]) -> Result<()> {
        self.change_snapshots(|change| change.apply(name))
    }

    /// Deletes the first snapshot called `name`, and closes the image.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`]; as [`create_snapshot`](Self::create_snapshot).
    pub fn delete_snapshot(self, name: &[u8]) -> Result<()> {
        self.change_snapshots(|change| change.delete(name))
    }

    fn change_snapshots(self, change: impl FnOnce(&mut Change<'_>) -> Result<()>) -> Result<()> {
        self.check_writable()?;
        // No request is running: the first time gives back all clusters, the second one writes
        // their counts.
        self.write_back()?;
        self.write_back()?;
        let header = Header::read(&*self.image.storage, &self.image.path)?;
        let table = read_table(&*self.image.storage, &self.image.path, &header)?;
        let (offset, size) = self.l1.place();
        let mut state = Change {
            disk: &self,
            header,
            table,
            l1: self.l1.entries(size).collect(),
            l1_offset: offset,
        };
        change(&mut state)?;
        self.close()
    }
}

/// A change to the snapshots of an image that nobody else uses.
struct Change<'a> {
    disk: &'a Qcow2,
    header: Header,
    table: SnapshotTable,
    /// The active L1 table.
    l1: Vec<u64>,
    l1_offset: u64,
}

impl Change<'_> {
    fn create(&mut self, name: &[u8]) -> Result<()> {
        if self.table.snapshots.len() >= MAX_SNAPSHOTS {
            let reason = format!("an image can have {MAX_SNAPSHOTS} snapshots at most");
            return Err(Error::Option(reason));
        }
        let mut active = self.l1.clone();
        self.add_references(&active)?;
        let shared: Vec<u64> = active.iter().map(|entry| entry & !COPIED).collect();
        let l1_table_offset = self
            .disk
            .add_table(Field::SnapshotL1Table, &entries::encode(shared))?;
        let mut snapshots = self.table.snapshots.clone();
        snapshots.push(Snapshot {
            l1_table_offset,
            l1_entries: active.len() as u32,
            id: self.next_id().into_bytes(),
            name: name.to_owned(),
            disk_size: self.disk.size(),
            ..taken_now()
        });
        let new = self.add_snapshot_table(&snapshots)?;
        self.disk.write_counts()?;
        self.with_references(|references| references.set_copied(&mut active))?;
        self.write_l1(&active)?;
        self.switch_table(&snapshots, new)?;
        self.finish()
    }

    fn delete(&mut self, name: &[u8]) -> Result<()> {
        let named = |snapshot: &Snapshot| snapshot.name == name;
        let index = self.find(name, named)?;
        let mut snapshots = self.table.snapshots.clone();
        let gone = snapshots.remove(index);
        let l1 = self.read_l1(&gone)?;
        self.set_dirty(true)?;
        let new = self.add_snapshot_table(&snapshots)?;
        self.disk.write_counts()?;
        self.switch_table(&snapshots, new)?;
        let clusters = gone.l1_clusters(self.disk.geometry);
        let mut active = self.l1.clone();
        self.with_references(|references| {
            references.remove(&l1)?;
            references.remove_table(gone.l1_table_offset, clusters)
        })?;
        // A flag says that there is no other reference: that must be so on disk by then.
        self.disk.write_counts()?;
        self.with_references(|references| references.set_copied(&mut active))?;
        self.write_l1(&active)?;
        self.finish()
    }

    fn apply(&mut self, name: &[u8]) -> Result<()> {
        let index = self
            .find(name, |snapshot| snapshot.id == name)
            .or_else(|_| self.find(name, |snapshot| snapshot.name == name))?;
        let snapshot = self.table.snapshots[index].clone();
        let size = snapshot.disk_size & !511;
        let g = self.disk.geometry;
        let needed = g.l1_entries(size).max(snapshot.l1_entries.into());
        if needed > MAX_L1_SIZE / ENTRY_SIZE {
            let reason = "the disk of the snapshot is too large for the cluster size".to_owned();
            let disk_size = snapshot.disk_size;
            return Err(self.disk.image.invalid("disk_size", disk_size, reason));
        }
        let mut l1 = self.read_l1(&snapshot)?;
        // What differs is not known.
        self.disk.check_bitmaps(size.max(self.disk.size()))?;
        self.disk.track(0, size.max(self.disk.size()))?;
        self.add_references(&l1)?;
        l1.resize(needed as usize, 0);
        // Everything is shared with the snapshot.
        l1.iter_mut().for_each(|entry| *entry &= !COPIED);
        let offset = self
            .disk
            .add_table(Field::L1Table, &entries::encode(l1.iter().copied()))?;
        self.disk.write_counts()?;
        self.with_references(|references| references.set_copied(&mut l1))?;
        self.disk.image.sync()?;

        let mut fields = size.to_be_bytes().to_vec();
        fields.extend(self.header.crypt_method.to_be_bytes());
        fields.extend((needed as u32).to_be_bytes());
        fields.extend(offset.to_be_bytes());
        self.disk.image.write_bytes_at(&fields, HEADER_SIZE)?;
        self.disk.image.sync()?;
        self.disk.size.store(size, Ordering::Relaxed);
        self.disk.truncate_bitmaps(size);

        let (old, old_offset) = (self.l1.clone(), self.l1_offset);
        let clusters = g.clusters(old.len() as u64 * ENTRY_SIZE);
        self.with_references(|references| {
            references.remove(&old)?;
            references.remove_table(old_offset, clusters)
        })?;
        self.finish()
    }

    /// Adds a reference for each one that the entries of `l1` lead to. The image is dirty from then
    /// on, unless that fails.
    fn add_references(&self, l1: &[u64]) -> Result<()> {
        self.set_dirty(true)?;
        let added = self.with_references(|references| references.add(l1));
        if added.is_err() {
            self.finish()?;
        }
        added
    }

    /// Index of the first snapshot that `is_it`, called `name` in the error that there is none.
    fn find(&self, name: &[u8], is_it: impl Fn(&Snapshot) -> bool) -> Result<usize> {
        let found = self.table.snapshots.iter().position(is_it);
        found.ok_or_else(|| Error::NoSnapshot {
            file: self.disk.image.path.clone(),
            name: name.to_owned(),
        })
    }

    /// One more than the largest number among the IDs.
    fn next_id(&self) -> String {
        let number = |snapshot: &Snapshot| -> Option<u64> {
            std::str::from_utf8(&snapshot.id).ok()?.parse().ok()
        };
        let largest = self.table.snapshots.iter().filter_map(number).max();
        largest.unwrap_or(0).saturating_add(1).to_string()
    }

    fn read_l1(&self, snapshot: &Snapshot) -> Result<Vec<u64>> {
        entries::read(
            &self.disk.image,
            "l1_table_offset",
            snapshot.l1_table_offset,
            snapshot.l1_entries as usize,
        )
    }

    fn with_references<R>(&self, f: impl FnOnce(&mut References<'_>) -> Result<R>) -> Result<R> {
        let mut refcounts = self.disk.refcounts()?;
        f(&mut References::new(
            &self.disk.image,
            self.disk.geometry,
            &mut refcounts,
        ))
    }

    fn add_snapshot_table(&self, snapshots: &[Snapshot]) -> Result<u64> {
        self.disk
            .add_table(Field::SnapshotTable, &table::encode(snapshots))
    }

    /// Writes the active L1 table where it is. Only flags of it have changed.
    fn write_l1(&self, l1: &[u64]) -> Result<()> {
        if l1 == self.l1 {
            return Ok(());
        }
        let bytes = entries::encode(l1.iter().copied());
        self.disk.image.write_bytes_at(&bytes, self.l1_offset)
    }

    /// Makes the header name the table of `snapshots` at `offset`, once that is on disk, and gives
    /// back the old one.
    fn switch_table(&self, snapshots: &[Snapshot], offset: u64) -> Result<()> {
        let image = &self.disk.image;
        image.sync()?;
        let mut fields = (snapshots.len() as u32).to_be_bytes().to_vec();
        fields.extend(offset.to_be_bytes());
        image.write_bytes_at(&fields, HEADER_SNAPSHOTS)?;
        image.sync()?;
        let clusters = self.disk.geometry.clusters(self.table.len);
        let old = self.header.snapshots_offset;
        self.with_references(|references| references.remove_table(old, clusters))
    }

    fn finish(&self) -> Result<()> {
        self.disk.write_counts()?;
        self.set_dirty(false)
    }

    /// Sets or clears the dirty bit, after everything that has been written. Version 2 has none.
    fn set_dirty(&self, dirty: bool) -> Result<()> {
        if self.header.version < 3 {
            return self.disk.image.sync();
        }
        let clear = self.header.incompatible_features & !incompatible::DIRTY;
        let features = if dirty {
            clear | incompatible::DIRTY
        } else {
            clear
        };
        self.disk.image.sync()?;
        self.disk
            .image
            .write_bytes_at(&features.to_be_bytes(), incompatible::OFFSET)?;
        self.disk.image.sync()
    }
}

/// An entry with the time of day.
fn taken_now() -> Snapshot {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Snapshot {
        l1_table_offset: 0,
        l1_entries: 0,
        id: Vec::new(),
        name: Vec::new(),
        date_sec: now.as_secs() as u32,
        date_nsec: now.subsec_nanos(),
        vm_clock_nsec: 0,
        vm_state_size: 0,
        disk_size: 0,
        icount: Some(0),
        unknown_extra: Vec::new(),
        is_complete: true,
    }
}
