//! The snapshot table (qcow2 specification, "Snapshots").

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::Path;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::qcow2::geometry::{ENTRY_SIZE, Geometry};
use crate::qcow2::header::{Header, MAX_L1_SIZE, MAX_OFFSET};
use crate::{Error, Result, Storage};

/// Most bytes that the table may have.
pub(super) const MAX_TABLE_SIZE: u64 = 64 << 20;
/// Most bytes of extra data that an entry may have.
const MAX_EXTRA: u32 = 1024;
/// Most snapshots whose L1 tables may lie in one place, where that is told rather than refused: a
/// small file must not be able to ask for endless work.
const MAX_OVERLAPS: usize = 16;
/// What entries begin at multiples of.
const ALIGNMENT: u64 = 8;
/// The instruction count of a guest that was not counted.
const NO_ICOUNT: u64 = u64::MAX;

/// An entry of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// Offset of its L1 table in the image file in bytes.
    pub l1_table_offset: u64,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Its ID, which no other has.
    pub id: Vec<u8>,
    /// Its name, which others may have.
    pub name: Vec<u8>,
    /// When it was taken, in seconds since 1970, and nanoseconds.
    pub date_sec: u32,
    /// See `date_sec`.
    pub date_nsec: u32,
    /// The guest's clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of the state of a running machine, which lies behind the end of the disk.
    pub vm_state_size: u64,
    /// Size of the disk in bytes.
    pub disk_size: u64,
    /// Instructions that the guest has executed, if they were counted.
    pub icount: Option<u64>,
    /// Extra data that is not known.
    pub unknown_extra: Vec<u8>,
    /// Whether the entry tells all that version 3 asks for.
    pub is_complete: bool,
}

/// What every entry begins with.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Fixed {
    l1_table_offset: U64,
    l1_size: U32,
    id_len: U16,
    name_len: U16,
    date_sec: U32,
    date_nsec: U32,
    vm_clock_nsec: U64,
    vm_state_size: U32,
    extra_len: U32,
}

/// Bytes of an entry without its variable parts.
pub(crate) const MIN_ENTRY_SIZE: u64 = size_of::<Fixed>() as u64;

/// The extra data that is known. An entry may have less.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Extra {
    vm_state_size: U64,
    disk_size: U64,
    icount: U64,
}

/// The snapshots of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SnapshotTable {
    pub snapshots: Vec<Snapshot>,
    /// Bytes of the table in the file.
    pub len: u64,
}

/// Reads the table that `header` names.
///
/// # Errors
/// [`Error::Invalid`] for a table or an entry that is larger than the format allows; [`Error::Io`].
pub(crate) fn read_table(
    image: &dyn Storage,
    file: &Path,
    header: &Header,
) -> Result<SnapshotTable> {
    let mut table = SnapshotTable::default();
    for index in 0..header.nb_snapshots {
        let (snapshot, len) = read_entry(
            image,
            file,
            header,
            header.snapshots_offset + table.len,
            index,
        )?;
        table.snapshots.push(snapshot);
        table.len += len.next_multiple_of(ALIGNMENT);
        if table.len > MAX_TABLE_SIZE {
            let reason = "Snapshot table is too big".to_owned();
            let offset = header.snapshots_offset;
            return Err(Error::invalid(file, "snapshots_offset", offset, reason));
        }
    }
    Ok(table)
}

fn read_entry(
    image: &dyn Storage,
    file: &Path,
    header: &Header,
    at: u64,
    index: u32,
) -> Result<(Snapshot, u64)> {
    let read = |buf: &mut [u8], at| {
        image
            .read_bytes_at(buf, at)
            .map_err(|e| Error::io_at(file, "read", at, e))
    };
    let mut fixed = Fixed::new_zeroed();
    read(fixed.as_mut_bytes(), at)?;
    let extra_len = fixed.extra_len.get();
    if extra_len > MAX_EXTRA {
        let reason = format!("Too much extra metadata in snapshot table entry {index}");
        let len = extra_len.into();
        return Err(Error::invalid(file, "extra_data_size", len, reason));
    }
    let id_len = usize::from(fixed.id_len.get());
    let name_len = usize::from(fixed.name_len.get());
    let mut rest = vec![0; extra_len as usize + id_len + name_len];
    read(&mut rest, at + size_of::<Fixed>() as u64)?;
    let len = (size_of::<Fixed>() + rest.len()) as u64;
    let name = rest.split_off(extra_len as usize + id_len);
    let id = rest.split_off(extra_len as usize);

    let mut extra = Extra {
        vm_state_size: u64::from(fixed.vm_state_size.get()).into(),
        disk_size: header.size.into(),
        icount: NO_ICOUNT.into(),
    };
    let known = extra.as_mut_bytes();
    // A field that is there in part is not there.
    let known_len = rest.len().min(known.len()) / 8 * 8;
    known[..known_len].copy_from_slice(&rest[..known_len]);
    let unknown_extra = rest.get(size_of::<Extra>()..).unwrap_or_default().to_vec();
    let icount = extra.icount.get();
    let snapshot = Snapshot {
        l1_table_offset: fixed.l1_table_offset.get(),
        l1_entries: fixed.l1_size.get(),
        id,
        name,
        date_sec: fixed.date_sec.get(),
        date_nsec: fixed.date_nsec.get(),
        vm_clock_nsec: fixed.vm_clock_nsec.get(),
        vm_state_size: extra.vm_state_size.get(),
        disk_size: extra.disk_size.get(),
        icount: (icount != NO_ICOUNT).then_some(icount),
        unknown_extra,
        is_complete: known_len >= 16,
    };
    Ok((snapshot, len))
}

impl SnapshotTable {
    /// Checks where the L1 tables of the snapshots are.
    ///
    /// # Errors
    /// [`Error::Invalid`] for one that is too large, unaligned, or cannot be in the file.
    pub fn check_l1_tables(&self, file: &Path, geometry: Geometry) -> Result<()> {
        for (index, snapshot) in self.snapshots.iter().enumerate() {
            let entries = u64::from(snapshot.l1_entries);
            let offset = snapshot.l1_table_offset;
            if entries > MAX_L1_SIZE / ENTRY_SIZE {
                let reason = format!("Snapshot L1 table too large (snapshot table entry {index})");
                return Err(Error::invalid(file, "l1_size", entries, reason));
            }
            if geometry.in_cluster(offset) != 0 || offset >= MAX_OFFSET {
                let reason =
                    format!("Snapshot L1 table offset invalid (snapshot table entry {index})");
                return Err(Error::invalid(file, "l1_table_offset", offset, reason));
            }
        }
        Ok(())
    }

    /// Checks that no place in the file belongs to the L1 tables of many snapshots, so that reading
    /// all of them takes little longer than reading the file.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one does.
    pub fn check_overlaps(&self, file: &Path) -> Result<()> {
        let range = |snapshot: &Snapshot| {
            let start = snapshot.l1_table_offset;
            let size = u64::from(snapshot.l1_entries) * ENTRY_SIZE;
            (start, start.saturating_add(size))
        };
        let mut tables: Vec<_> = self.snapshots.iter().map(range).collect();
        tables.sort_unstable();
        // Ends of those that have begun.
        let mut ends = BinaryHeap::new();
        for (start, end) in tables {
            while ends.peek().is_some_and(|Reverse(end)| *end <= start) {
                ends.pop();
            }
            ends.push(Reverse(end));
            if ends.len() > MAX_OVERLAPS {
                let reason =
                    format!("the L1 tables of more than {MAX_OVERLAPS} snapshots overlap here");
                return Err(Error::invalid(file, "l1_table_offset", start, reason));
            }
        }
        Ok(())
    }
}

/// The bytes of a table of `snapshots`.
pub(crate) fn encode(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut table = Vec::new();
    for snapshot in snapshots {
        let extra = Extra {
            vm_state_size: snapshot.vm_state_size.into(),
            disk_size: snapshot.disk_size.into(),
            icount: snapshot.icount.unwrap_or(NO_ICOUNT).into(),
        };
        let extra_len = size_of::<Extra>() + snapshot.unknown_extra.len();
        let fixed = Fixed {
            l1_table_offset: snapshot.l1_table_offset.into(),
            l1_size: snapshot.l1_entries.into(),
            id_len: (snapshot.id.len() as u16).into(),
            name_len: (snapshot.name.len() as u16).into(),
            date_sec: snapshot.date_sec.into(),
            date_nsec: snapshot.date_nsec.into(),
            vm_clock_nsec: snapshot.vm_clock_nsec.into(),
            vm_state_size: u32::try_from(snapshot.vm_state_size).unwrap_or(0).into(),
            extra_len: (extra_len as u32).into(),
        };
        table.extend_from_slice(fixed.as_bytes());
        table.extend_from_slice(extra.as_bytes());
        table.extend_from_slice(&snapshot.unknown_extra);
        table.extend_from_slice(&snapshot.id);
        table.extend_from_slice(&snapshot.name);
        table.resize(table.len().next_multiple_of(ALIGNMENT as usize), 0);
    }
    table
}

impl Snapshot {
    /// Clusters of its L1 table.
    pub fn l1_clusters(&self, geometry: Geometry) -> u64 {
        geometry.clusters(u64::from(self.l1_entries) * ENTRY_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FileStorage;
    use crate::qcow2::header::tests::sample;

    fn snapshot(id: &str, l1_entries: u32) -> Snapshot {
        Snapshot {
            l1_table_offset: 0x1000,
            l1_entries,
            id: id.into(),
            name: b"a name".to_vec(),
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
            vm_state_size: 1 << 33,
            disk_size: 1 << 20,
            icount: Some(5),
            unknown_extra: b"extra".to_vec(),
            is_complete: true,
        }
    }

    fn read(snapshots: &[Snapshot]) -> Result<SnapshotTable> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), encode(snapshots)).unwrap();
        let storage = FileStorage::open(file.path(), true).unwrap();
        let header = Header {
            nb_snapshots: snapshots.len() as u32,
            snapshots_offset: 0,
            ..sample()
        };
        read_table(&storage, file.path(), &header)
    }

    #[test]
    fn what_is_encoded_is_read_back() {
        let without = Snapshot {
            icount: None,
            unknown_extra: Vec::new(),
            ..snapshot("22", 0)
        };
        let snapshots = [snapshot("1", 7), without, snapshot("", 1)];
        let table = read(&snapshots).unwrap();
        assert_eq!(table.snapshots, snapshots);
        assert_eq!(table.len, encode(&snapshots).len() as u64);
    }

    #[test]
    fn tables_cannot_ask_for_endless_work() {
        let largest = (MAX_L1_SIZE / ENTRY_SIZE) as u32;
        let check = |count, distance| {
            let at = |i: u64| Snapshot {
                l1_table_offset: 0x1000 + i * distance,
                ..snapshot("1", largest)
            };
            let snapshots: Vec<_> = (0..count).rev().map(at).collect();
            read(&snapshots).unwrap().check_overlaps(Path::new("image"))
        };
        check(MAX_OVERLAPS as u64, 0).unwrap();
        check(1000, MAX_L1_SIZE).unwrap();
        for distance in [0, 4096] {
            let error = check(MAX_OVERLAPS as u64 + 1, distance).unwrap_err();
            assert!(error.to_string().contains("overlap here"), "{error}");
        }
        let mut huge = snapshot("1", 1);
        huge.unknown_extra = vec![0; 1001];
        let error = read(&[huge]).unwrap_err().to_string();
        assert!(error.contains("Too much extra metadata"), "{error}");
    }
}
