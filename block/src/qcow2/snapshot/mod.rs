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
//! wrong COPIED flags, which the repair of a dirty image mends. After an error before the switch,
//! what was made for the new state is taken back.
//!
//! What L2 entries say is the image's word: before anything changes they are all looked at, and an
//! image in which data would take the place of metadata, or be given back with it, stays as it is.

mod references;
mod table;

use std::time::{Duration, SystemTime};

use super::Qcow2;
use super::entry::COPIED;
use super::geometry::{ENTRY_SIZE, Geometry};
use super::header::{Header, MAX_L1_SIZE, incompatible};
use super::parse::{MAX_SNAPSHOTS, offset};
use super::reserved::{Field, MAX_SNAPSHOT_TABLES};
use super::table as entries;
use crate::file::ImageFile;
use crate::sync::atomic::Ordering;
use crate::{Disk, Error, Result};

use references::References;
use table::MAX_TABLE_SIZE;
pub(crate) use table::{MIN_ENTRY_SIZE, Snapshot, SnapshotTable, encode, read_table};

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

/// Which snapshot is meant: the first one that fits.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SnapshotName {
    /// The one with this ID or, if there is none, this name.
    IdOrName(Vec<u8>),
    /// One that has the ID and the name, as far as they are given.
    Exact {
        /// Its ID.
        id: Option<Vec<u8>>,
        /// Its name.
        name: Option<Vec<u8>>,
    },
}

impl SnapshotName {
    fn find<'a>(&self, snapshots: &'a [Snapshot]) -> Option<&'a Snapshot> {
        match self {
            Self::IdOrName(text) => {
                let by_id = snapshots.iter().find(|snapshot| snapshot.id == *text);
                by_id.or_else(|| snapshots.iter().find(|snapshot| snapshot.name == *text))
            }
            Self::Exact { id, name } => snapshots.iter().find(|snapshot| {
                id.as_ref().is_none_or(|id| *id == snapshot.id)
                    && name.as_ref().is_none_or(|name| *name == snapshot.name)
            }),
        }
    }

    /// For messages.
    fn text(&self) -> Vec<u8> {
        match self {
            Self::IdOrName(text) => text.clone(),
            Self::Exact { id, name } => name.clone().or_else(|| id.clone()).unwrap_or_default(),
        }
    }
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
    /// [`Error::Option`] for a name of more than 255 bytes, for an image with an external data file,
    /// which can have no snapshots, and where there is no room for one more; [`Error::Invalid`] for
    /// damage, or if a refcount would become too large: nothing has changed then, but for the mark of
    /// a corrupt image. After an error of another kind the old state or the new one is there, and the
    /// image is marked as dirty unless all of the old state is.
    pub fn create_snapshot(self, name: &[u8]) -> Result<()> {
        if name.len() > MAX_NAME {
            let reason = format!("the name of a snapshot can have {MAX_NAME} bytes at most");
            return Err(Error::Option(reason));
        }
        Change::new(&self)?.run(|change| change.create(name))
    }

    /// Makes the disk what it was when the snapshot with the ID or, if there is none, the name
    /// `name` was taken, and closes the image. What the disk holds now is lost.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`]; as [`create_snapshot`](Self::create_snapshot).
    pub fn apply_snapshot(self, name: &[u8]) -> Result<()> {
        let change = Change::new(&self)?;
        let index = change
            .find(name, |snapshot| snapshot.id == name)
            .or_else(|_| change.find(name, |snapshot| snapshot.name == name))?;
        change.run(|change| change.apply(index))
    }

    /// Deletes the first snapshot called `name`, and closes the image.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`]; as [`create_snapshot`](Self::create_snapshot).
    pub fn delete_snapshot(self, name: &[u8]) -> Result<()> {
        let change = Change::new(&self)?;
        let index = change.find(name, |snapshot| snapshot.name == name)?;
        change.run(|change| change.delete(index))
    }
}

/// Makes `header` show the disk of the snapshot `name` of `image`, which is only read.
///
/// # Errors
/// [`Error::Option`] for an image that may be written; [`Error::NoSnapshot`]; [`Error::Invalid`] for a
/// snapshot that the format does not allow; [`Error::Io`].
pub(super) fn show(
    image: &ImageFile,
    header: &mut Header,
    name: &SnapshotName,
    read_only: bool,
) -> Result<()> {
    if !read_only {
        let reason = "a snapshot can only be opened read-only";
        return Err(Error::Option(reason.to_owned()));
    }
    let table = read_table(&*image.storage, &image.path, header)?;
    let geometry = header.geometry();
    table.check_l1_tables(&image.path, geometry)?;
    let snapshot = name
        .find(&table.snapshots)
        .ok_or_else(|| Error::NoSnapshot {
            file: image.path.clone(),
            name: name.text(),
        })?;
    check_size(image, geometry, snapshot)?;
    header.size = snapshot.disk_size;
    header.l1_size = snapshot.l1_entries;
    header.l1_table_offset = snapshot.l1_table_offset;
    Ok(())
}

/// Entries of an L1 table for the disk of `snapshot`.
///
/// # Errors
/// [`Error::Invalid`] if that are too many.
fn check_size(image: &ImageFile, geometry: Geometry, snapshot: &Snapshot) -> Result<u64> {
    let disk_size = snapshot.disk_size;
    let needed = geometry.l1_entries(disk_size & !511);
    let needed = needed.max(snapshot.l1_entries.into());
    if needed > MAX_L1_SIZE / ENTRY_SIZE {
        let reason = "the disk of the snapshot is too large for the cluster size".to_owned();
        return Err(image.invalid("disk_size", disk_size, reason));
    }
    Ok(needed)
}

/// A change to the snapshots of an image that nobody else uses.
struct Change<'a> {
    disk: &'a Qcow2,
    header: Header,
    table: SnapshotTable,
    /// The active L1 table.
    l1: Vec<u64>,
    l1_offset: u64,
    stage: Stage,
    made: Made,
}

/// How far a change has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The image is as it was.
    Checked,
    /// The header leads to the old state.
    Begun,
    /// The header leads to the new state, or may do so.
    Switched,
}

/// What has been made for the new state, while the header leads to the old one.
#[derive(Default)]
struct Made {
    /// What will lead to each table, its offset and its clusters.
    tables: Vec<(Field, u64, u64)>,
    /// A reference has been added for each one that the entries of this L1 table lead to.
    added: Vec<u64>,
}

impl<'a> Change<'a> {
    fn new(disk: &'a Qcow2) -> Result<Self> {
        disk.check_writable()?;
        let image = &disk.image;
        let header = Header::read(&*image.storage, &image.path)?;
        let table = read_table(&*image.storage, &image.path, &header)?;
        let (l1_offset, size) = disk.l1.place();
        Ok(Self {
            disk,
            header,
            table,
            l1: disk.l1.entries(size).collect(),
            l1_offset,
            stage: Stage::Checked,
            made: Made::default(),
        })
    }

    fn run(mut self, operation: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.disk.placement.data_file_layout().is_some() {
            let reason = "an image with an external data file cannot have internal snapshots";
            return Err(Error::Option(reason.to_owned()));
        }
        // No request is running: the first time gives back all clusters, the second one writes
        // their counts.
        self.disk.write_back()?;
        self.disk.write_back()?;
        let done = operation(&mut self);
        if done.is_err() {
            // The error is told already.
            drop(self.recover());
        }
        done?;
        self.disk.close()
    }

    fn create(&mut self, name: &[u8]) -> Result<()> {
        let mut snapshots = self.table.snapshots.clone();
        snapshots.push(Snapshot {
            l1_entries: self.l1.len() as u32,
            id: self.next_id().into_bytes(),
            name: name.to_owned(),
            disk_size: self.disk.size(),
            ..taken_now()
        });
        self.check_room(&snapshots)?;
        self.references().check(&self.l1)?;
        self.references().check_add(&self.l1)?;
        self.begin()?;
        let shared = self.l1.iter().map(|entry| entry & !COPIED);
        let shared = entries::encode(shared);
        let l1_table_offset = self.make_table(Field::SnapshotL1Table, &shared)?;
        if let Some(last) = snapshots.last_mut() {
            last.l1_table_offset = l1_table_offset;
        }
        let new = self.make_table(Field::SnapshotTable, &table::encode(&snapshots))?;
        self.add_references(self.l1.clone())?;
        self.disk.write_counts()?;
        self.update_flags()?;
        self.switch_table(snapshots.len(), new)?;
        self.finish()
    }

    fn delete(&mut self, index: usize) -> Result<()> {
        let mut snapshots = self.table.snapshots.clone();
        let gone = snapshots.remove(index);
        let l1 = self.read_l1(&gone)?;
        self.references().check(&l1)?;
        self.begin()?;
        let new = self.make_table(Field::SnapshotTable, &table::encode(&snapshots))?;
        self.disk.write_counts()?;
        self.switch_table(snapshots.len(), new)?;
        let clusters = gone.l1_clusters(self.disk.geometry);
        let references = self.references();
        references.remove(&l1)?;
        references.remove_table(Field::SnapshotL1Table, gone.l1_table_offset, clusters)?;
        // A flag says that there is no other reference: that must be so on disk by then.
        self.disk.write_counts()?;
        self.update_flags()?;
        self.finish()
    }

    fn apply(&mut self, index: usize) -> Result<()> {
        let snapshot = self.table.snapshots[index].clone();
        let size = snapshot.disk_size & !511;
        let g = self.disk.geometry;
        let needed = check_size(&self.disk.image, g, &snapshot)?;
        let mut l1 = self.read_l1(&snapshot)?;
        self.references().check(&l1)?;
        self.references().check_add(&l1)?;
        self.references().check(&self.l1)?;
        // What differs is not known.
        self.disk.check_bitmaps(size.max(self.disk.size()))?;
        self.disk.track(0, size.max(self.disk.size()))?;
        self.begin()?;
        l1.resize(needed as usize, 0);
        // Everything is shared with the snapshot.
        l1.iter_mut().for_each(|entry| *entry &= !COPIED);
        let offset = self.make_table(Field::L1Table, &entries::encode(l1.iter().copied()))?;
        self.add_references(l1.clone())?;
        self.disk.write_counts()?;
        self.references().set_copied(&mut l1)?;

        let mut fields = size.to_be_bytes().to_vec();
        fields.extend(self.header.crypt_method.to_be_bytes());
        fields.extend((needed as u32).to_be_bytes());
        fields.extend(offset.to_be_bytes());
        self.switch(&fields, offset::SIZE)?;
        let old = std::mem::replace(&mut self.l1, l1);
        let old_offset = std::mem::replace(&mut self.l1_offset, offset);
        self.disk.size.store(size, Ordering::Relaxed);

        let clusters = g.clusters(old.len() as u64 * ENTRY_SIZE);
        let references = self.references();
        references.remove(&old)?;
        references.remove_table(Field::L1Table, old_offset, clusters)?;
        self.finish()
    }

    /// Checks that an image can have `snapshots`, one more than now.
    fn check_room(&self, snapshots: &[Snapshot]) -> Result<()> {
        let reason = if snapshots.len() > MAX_SNAPSHOTS as usize {
            format!("an image can have {MAX_SNAPSHOTS} snapshots at most")
        } else if table::encode(snapshots).len() as u64 > MAX_TABLE_SIZE {
            format!("the snapshot table can have {MAX_TABLE_SIZE} bytes at most")
        } else if self.disk.refcounts()?.l2_tables() > MAX_SNAPSHOT_TABLES {
            format!("the snapshots of an image can have {MAX_SNAPSHOT_TABLES} L2 tables at most")
        } else {
            return Ok(());
        };
        Err(Error::Option(reason))
    }

    /// From now on the image changes.
    fn begin(&mut self) -> Result<()> {
        self.stage = Stage::Begun;
        self.set_dirty(true)
    }

    /// Writes a table that the new state needs, and returns its offset.
    fn make_table(&mut self, field: Field, table: &[u8]) -> Result<u64> {
        let offset = self.disk.add_table(field, table)?;
        let clusters = self.disk.geometry.clusters(table.len() as u64);
        self.made.tables.push((field, offset, clusters));
        Ok(offset)
    }

    /// Adds a reference for each one that the entries of `l1` lead to.
    fn add_references(&mut self, l1: Vec<u64>) -> Result<()> {
        self.references().add(&l1)?;
        self.made.added = l1;
        Ok(())
    }

    /// Makes the COPIED flags of the disk fit the refcounts.
    fn update_flags(&mut self) -> Result<()> {
        let mut l1 = self.l1.clone();
        self.references().set_copied(&mut l1)?;
        if l1 != self.l1 {
            let bytes = entries::encode(l1.iter().copied());
            self.disk.image.write_bytes_at(&bytes, self.l1_offset)?;
            self.l1 = l1;
        }
        Ok(())
    }

    /// After an error: takes back what was made for a state that the header does not lead to, and
    /// makes the COPIED flags fit the refcounts. What remains is a leak, and the dirty bit if there
    /// may be one.
    fn recover(&mut self) -> Result<()> {
        if self.stage == Stage::Checked {
            return Ok(());
        }
        self.disk.check_writable()?;
        self.disk.image.check_synced()?;
        let made = std::mem::take(&mut self.made);
        let references = self.references();
        let mut taken = references.take_back(&made.added, u64::MAX);
        for (field, offset, clusters) in made.tables {
            taken = taken.and(references.remove_table(field, offset, clusters));
        }
        self.disk.write_counts()?;
        self.update_flags()?;
        taken?;
        match self.stage {
            Stage::Switched => self.disk.image.sync(),
            Stage::Checked | Stage::Begun => self.set_dirty(false),
        }
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

    fn references(&self) -> References<'a> {
        References::new(self.disk)
    }

    /// Writes `fields` at `at` in the header, which lead to the new state, once that is on disk.
    fn switch(&mut self, fields: &[u8], at: u64) -> Result<()> {
        self.disk.image.sync()?;
        self.stage = Stage::Switched;
        self.made = Made::default();
        self.disk.image.write_bytes_at(fields, at)?;
        self.disk.image.sync()
    }

    /// Makes the header name the table of `count` snapshots at `offset`, once that is on disk, and
    /// gives back the old one.
    fn switch_table(&mut self, count: usize, offset: u64) -> Result<()> {
        let mut fields = (count as u32).to_be_bytes().to_vec();
        fields.extend(offset.to_be_bytes());
        self.switch(&fields, offset::SNAPSHOTS)?;
        let clusters = self.disk.geometry.clusters(self.table.len);
        let old = self.header.snapshots_offset;
        self.references()
            .remove_table(Field::SnapshotTable, old, clusters)
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
            .write_bytes_at(&features.to_be_bytes(), offset::INCOMPATIBLE_FEATURES)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VolatileSlice;
    use crate::qcow2::{CreateOptions, OpenOptions, create};

    #[test]
    fn a_snapshot_is_opened_read_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let options = CreateOptions {
            size: 1 << 20,
            ..CreateOptions::default()
        };
        create(&path, &options).unwrap();
        for (fill, name) in [(1, "first"), (2, "1")] {
            let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
            let bytes = &mut [fill; 4096][..];
            disk.write_at(&[VolatileSlice::from(bytes)], 65536).unwrap();
            disk.create_snapshot(name.as_bytes()).unwrap();
        }
        let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
        disk.resize(2 << 20).unwrap();
        drop(disk);
        let exact = |id: Option<&str>, name: Option<&str>| SnapshotName::Exact {
            id: id.map(|id| id.as_bytes().to_owned()),
            name: name.map(|name| name.as_bytes().to_owned()),
        };
        for (name, expected) in [
            (SnapshotName::IdOrName(b"first".to_vec()), Some(1)),
            (SnapshotName::IdOrName(b"1".to_vec()), Some(1)),
            (SnapshotName::IdOrName(b"2".to_vec()), Some(2)),
            (SnapshotName::IdOrName(b"3".to_vec()), None),
            (exact(None, Some("1")), Some(2)),
            (exact(Some("1"), None), Some(1)),
            (exact(Some("1"), Some("first")), Some(1)),
            (exact(Some("2"), Some("first")), None),
        ] {
            let options = OpenOptions {
                read_only: true,
                snapshot: Some(name.clone()),
                ..OpenOptions::default()
            };
            let disk = match (Qcow2::open(&path, &options), expected) {
                (Ok(disk), Some(_)) => disk,
                (Err(Error::NoSnapshot { .. }), None) => continue,
                (other, _) => panic!("{name:?}: {:?}", other.err()),
            };
            assert_eq!(disk.size(), 1 << 20);
            let mut byte = [0];
            let slice = VolatileSlice::from(&mut byte[..]);
            disk.read_at(&[slice], 65536).unwrap();
            assert_eq!(Some(byte[0]), expected, "{name:?}");
            drop(disk);
            let writable = OpenOptions {
                read_only: false,
                ..options
            };
            assert!(matches!(
                Qcow2::open(&path, &writable),
                Err(Error::Option(_))
            ));
        }
    }
}
