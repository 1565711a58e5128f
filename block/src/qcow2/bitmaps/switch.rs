//! Making the header name another bitmap directory, whatever moment the power fails at.
//!
//! A sector is written in whole or not at all, several may be written in any order. Mostly the header
//! extension and the autoclear bit that goes with it are in one sector; or only the extension changes,
//! and is in one. Otherwise there is more than one step: the bit is off while the extension is not
//! whole, and a backing file's name that must make room is copied before anything leads to the copy.
//! In between the image may be without its bitmaps, and is what it was in every other respect.

use zerocopy::FromBytes;

use crate::file::ImageFile;
use crate::qcow2::extension::{self, Bitmaps as Extension};
use crate::qcow2::header::{Header, autoclear};
use crate::qcow2::parse::{Layout, offset};
use crate::{Error, Result};

/// What is written in whole or not at all.
const SECTOR: usize = 512;

/// States of the first cluster, from the one on disk to one that names `bitmaps`.
pub(super) type Steps = Vec<Vec<u8>>;

/// Tells how to get from the header on disk, which has been read as `header`, to one with `bitmaps`.
///
/// # Errors
/// [`Error::HeaderFull`] if there is no room for them; [`Error::Io`].
pub(super) fn plan(
    image: &ImageFile,
    header: &Header,
    bitmaps: Option<Extension>,
) -> Result<Steps> {
    let mut cluster = vec![0; header.cluster_size() as usize];
    image.read_bytes_at(&mut cluster, 0)?;
    steps(cluster, header.header_length as usize, bitmaps).ok_or_else(|| Error::HeaderFull {
        file: image.path.clone(),
        cluster_size: header.cluster_size(),
    })
}

/// Takes the steps, each of them durable before the next one.
pub(super) fn run(image: &ImageFile, steps: &Steps) -> Result<()> {
    for pair in steps.windows(2) {
        let changed = changed_sectors(&pair[0], &pair[1]);
        if let (Some(first), Some(last)) = (changed.first(), changed.last()) {
            let (start, end) = (first * SECTOR, (last + 1) * SECTOR);
            image.write_bytes_at(&pair[1][start..end], start as u64)?;
            image.sync()?;
        }
    }
    Ok(())
}

/// `None` if there is no room.
fn steps(old: Vec<u8>, start: usize, bitmaps: Option<Extension>) -> Option<Steps> {
    let (layout, _) = Layout::read_from_prefix(&old).ok()?;
    let name = layout.backing_file_offset.get() as usize;
    let name = name..name + layout.backing_file_size.get() as usize;
    let limit = if name.start == 0 {
        old.len()
    } else {
        name.start
    };
    let (used, extensions) = extension::replace_bitmaps(old.get(start..limit)?, bitmaps);
    let end = start + extensions.len();

    let mut steps = Steps::new();
    let mut next = old.clone();
    if end > limit {
        // A copy that lay partly where the name is would not be a copy all the time.
        let place = if old.len() > SECTOR {
            end.max(name.end)
        } else {
            end
        };
        let copy = next.get_mut(place..place + name.len())?;
        copy.copy_from_slice(&old[name]);
        steps.push(next.clone());
        let field = (place as u64).to_be_bytes();
        next[offset::BACKING_FILE as usize..][..field.len()].copy_from_slice(&field);
        steps.push(next.clone());
    }
    let was_on = layout.autoclear_features.get() & autoclear::BITMAPS != 0;
    let mut whole = next.clone();
    whole.get_mut(start..end)?.copy_from_slice(&extensions);
    if used > extensions.len() {
        whole[end..start + used].fill(0);
    }
    let sectors = changed_sectors(&next, &whole);
    if was_on && (bitmaps.is_none() || sectors.len() > 1) {
        set_valid(&mut next, false);
        set_valid(&mut whole, false);
        steps.push(next.clone());
    }
    // The first sector hides what is behind it as long as the list of extensions ends there.
    for sector in sectors.iter().skip(1) {
        let place = sector * SECTOR..(sector + 1) * SECTOR;
        next[place.clone()].copy_from_slice(&whole[place]);
    }
    steps.push(next);
    steps.push(whole.clone());
    set_valid(&mut whole, bitmaps.is_some());
    if changed_sectors(&old, &whole).len() <= 1 {
        steps.clear();
    }
    steps.push(whole);
    steps.insert(0, old);
    Some(steps)
}

/// Sets or clears the bit that says that the bitmaps are up to date.
fn set_valid(cluster: &mut [u8], valid: bool) {
    // Bits are numbered from the end of a big-endian field.
    let byte = &mut cluster[offset::AUTOCLEAR_FEATURES as usize + 7];
    if valid {
        *byte |= autoclear::BITMAPS as u8;
    } else {
        *byte &= !(autoclear::BITMAPS as u8);
    }
}

/// The sectors in which two states of a cluster differ.
fn changed_sectors(old: &[u8], new: &[u8]) -> Vec<usize> {
    let pairs = old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate();
    let changed = pairs.filter(|(_, (old, new))| old != new);
    changed.map(|(sector, _)| sector).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::tests::sample;
    use crate::qcow2::parse::Purpose;
    use std::path::Path;

    fn bitmaps(count: u32) -> Extension {
        Extension {
            count,
            directory_size: u64::from(count) * 32,
            directory_offset: u64::from(count) << 16,
        }
    }

    /// A header in clusters of 64 KiB with a backing file or a data file whose names have `len` bytes.
    fn header(len: usize, backing: bool, count: u32) -> Header {
        let mut header = sample();
        header.cluster_bits = 16;
        header.l1_table_offset = 3 << 16;
        header.refcount_table_offset = 1 << 16;
        header.autoclear_features = 0;
        if backing {
            header.incompatible_features = 0;
            header.backing_file = Some(vec![b'b'; len]);
            header.extensions.data_file = None;
        } else {
            header.extensions.data_file = Some(vec![b'd'; len]);
        }
        if count > 0 {
            header.autoclear_features = autoclear::BITMAPS;
            header.extensions.bitmaps = Some(bitmaps(count));
        }
        header
    }

    /// Whatever sectors of a step have been written, the header is the old one or the new one, or
    /// has no bitmaps for the moment.
    #[test]
    fn any_part_of_any_step_is_a_header() {
        let file = Path::new("image");
        let parse = |cluster: &[u8]| Header::parse(cluster, file, Purpose::Use).unwrap();
        for backing in [false, true] {
            for len in (1..1023).step_by(7) {
                for (from, to) in [(0, 1), (1, 2), (2, 1), (1, 0)] {
                    let old = header(len, backing, from);
                    let cluster = old.encode(file).unwrap();
                    let old = parse(&cluster);
                    let to = (to > 0).then(|| bitmaps(to));
                    let steps = steps(cluster, old.header_length as usize, to).unwrap();
                    for pair in steps.windows(2) {
                        let sectors = changed_sectors(&pair[0], &pair[1]);
                        for subset in 0..1u32 << sectors.len() {
                            let mut torn = pair[0].clone();
                            for (i, sector) in sectors.iter().enumerate() {
                                if subset >> i & 1 != 0 {
                                    let place = sector * SECTOR..(sector + 1) * SECTOR;
                                    torn[place.clone()].copy_from_slice(&pair[1][place]);
                                }
                            }
                            let found = parse(&torn);
                            assert_eq!(found.backing_file, old.backing_file);
                            assert_eq!(found.extensions.data_file, old.extensions.data_file);
                            assert_eq!(found.extensions.unknown, []);
                            let found = found.extensions.bitmaps;
                            assert!(
                                [None, to, old.extensions.bitmaps].contains(&found),
                                "{len} {from}: {found:?}"
                            );
                        }
                    }
                    let last = parse(steps.last().unwrap());
                    assert_eq!(last.extensions.bitmaps, to);
                    assert!(!last.extensions.stale_bitmaps);
                    let bit = last.autoclear_features & autoclear::BITMAPS != 0;
                    assert_eq!(bit, to.is_some());
                }
            }
        }
    }

    #[test]
    fn what_is_in_one_sector_takes_one_write() {
        let file = Path::new("image");
        let count = |header: Header, to| {
            let cluster = header.encode(file).unwrap();
            let steps = steps(cluster, 112, to).unwrap();
            let changes = steps.windows(2).filter(|pair| pair[0] != pair[1]);
            changes.count()
        };
        let mut small = sample();
        assert_eq!(count(small.clone(), Some(bitmaps(1))), 1);
        small.extensions.data_file = Some(vec![b'd'; 370]);
        assert!(steps(small.encode(file).unwrap(), 112, Some(bitmaps(1))).is_none());
        assert_eq!(count(header(8, false, 1), Some(bitmaps(2))), 1);
        assert!(count(header(8, false, 0), Some(bitmaps(1))) > 1);
    }
}
