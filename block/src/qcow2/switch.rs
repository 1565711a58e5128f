//! Changing the header as a whole, whatever moment the power fails at.
//!
//! A sector is written in whole or not at all, several may be written in any order. Everything in the
//! first cluster is found by way of its first sector. So what the new header leads to is written where
//! the old one leads to nothing, then the first sector, and then what nothing leads to any more is
//! cleared: each of these steps leaves the old header or the new one, however much of it is done.
//!
//! The extensions begin right behind the fields, so the new ones mostly lie where the old ones do. Then
//! it takes two such changes: to a header whose extensions are further behind, with a gap before them,
//! and from that to the one without a gap.

use zerocopy::FromBytes;

use super::extension;
use super::header::Header;
use super::parse::Layout;
use crate::Result;
use crate::file::ImageFile;

/// What is written in whole or not at all.
const SECTOR: usize = 512;

/// States of the first cluster, from the one on disk to another.
pub(super) struct Steps(Vec<Vec<u8>>);

impl Header {
    /// Makes this the header of `image`, unless it is already. A failure or a crash leaves the old one
    /// or this one.
    ///
    /// # Errors
    /// [`Error::HeaderFull`](crate::Error::HeaderFull) before anything is written;
    /// [`Error::Io`](crate::Error::Io).
    pub fn write(&self, image: &ImageFile) -> Result<()> {
        self.plan(image)?.run(image)
    }

    /// Tells how to make this the header of `image`.
    ///
    /// # Errors
    /// [`Error::HeaderFull`](crate::Error::HeaderFull) if there is no room for it, or not beside what
    /// must stay until it is there; [`Error::Io`](crate::Error::Io).
    pub fn plan(&self, image: &ImageFile) -> Result<Steps> {
        let mut old = vec![0; self.cluster_size() as usize];
        image.read_bytes_at(&mut old, 0)?;
        Steps::new(old, self).ok_or_else(|| self.full(&image.path))
    }
}

impl Steps {
    /// Takes them, each durable before the next one.
    pub fn run(&self, image: &ImageFile) -> Result<()> {
        #[cfg(mutate)]
        if let [_, .., new] = &self.0[..]
            && crate::mutate::is(crate::mutate::ONE_WRITE)
        {
            image.write_bytes_at(new, 0)?;
            return image.sync();
        }
        for pair in self.0.windows(2) {
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
    fn new(old: Vec<u8>, header: &Header) -> Option<Self> {
        let new = header.encode_at(0)?;
        let mut steps = Self(vec![old]);
        if steps.add(&new).is_none() {
            let old = steps.0.last()?;
            let behind = end(old)?.max(end(&new)?);
            steps.add(&header.encode_at(behind)?)?;
            steps.add(&new)?;
        }
        steps.0.push(new);
        Some(steps)
    }

    /// Adds those to a state that leads to the same as `new`; `None` if a sector that the state before it
    /// leads to would have to change for that.
    fn add(&mut self, new: &[u8]) -> Option<()> {
        let old = self.0.last()?;
        if changed_sectors(old, new).len() <= 1 {
            self.0.push(new.to_vec());
            return Some(());
        }
        let (kept, needed) = (sectors_in_use(old)?, sectors_in_use(new)?);
        let mut beside = old.clone();
        for sector in changed_sectors(old, new) {
            if !kept[sector] {
                copy_sector(&mut beside, new, sector);
            }
        }
        let mut switched = beside.clone();
        copy_sector(&mut switched, new, 0);
        let missing = changed_sectors(&switched, new);
        if missing.into_iter().any(|sector| needed[sector]) {
            return None;
        }
        self.0.extend([beside, switched]);
        Some(())
    }
}

fn copy_sector(to: &mut [u8], from: &[u8], sector: usize) {
    let bytes = sector * SECTOR..(sector + 1) * SECTOR;
    to[bytes.clone()].copy_from_slice(&from[bytes]);
}

/// The sectors in which two states of a cluster differ.
fn changed_sectors(old: &[u8], new: &[u8]) -> Vec<usize> {
    let pairs = old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate();
    let changed = pairs.filter(|(_, (old, new))| old != new);
    changed.map(|(sector, _)| sector).collect()
}

/// Whether each sector of a first cluster is one that a reader of the header looks at.
fn sectors_in_use(cluster: &[u8]) -> Option<Vec<bool>> {
    let (layout, _) = Layout::read_from_prefix(cluster).ok()?;
    let extensions = layout.extensions(cluster.len());
    let start = extensions.start;
    let places = extension::places(cluster.get(extensions)?);
    let places = places.iter().map(|at| start + at.start..start + at.end);
    let mut used = vec![false; cluster.len() / SECTOR];
    for place in places.chain([0..start, layout.backing_name()]) {
        // The end marker may be missing at the end of the cluster.
        let end = place.end.min(cluster.len()).div_ceil(SECTOR);
        used.get_mut(place.start / SECTOR..end)?.fill(true);
    }
    Some(used)
}

/// The end of the last sector in use.
fn end(cluster: &[u8]) -> Option<usize> {
    let last = sectors_in_use(cluster)?.iter().rposition(|used| *used)?;
    Some((last + 1) * SECTOR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::extension::Bitmaps;
    use crate::qcow2::header::tests::sample;
    use crate::qcow2::parse::Purpose;
    use proptest::prelude::*;
    use std::path::Path;

    /// A header whose extensions are of the lengths in `shape`.
    fn header(cluster_bits: u32, shape: &Shape) -> Header {
        let mut header = sample();
        header.cluster_bits = cluster_bits;
        header.l1_table_offset = 3 << cluster_bits;
        header.refcount_table_offset = 1 << cluster_bits;
        header.l1_size = 1 << 16;
        header.autoclear_features = 0;
        header.extensions.data_file = None;
        header.incompatible_features = 0;
        let text = |(len, byte): (usize, u8)| vec![byte; len];
        header.backing_file = shape.backing.map(text);
        header.extensions.backing_format = shape.format.map(text);
        header.extensions.unknown = Vec::from_iter(shape.unknown.map(|text_of| (7, text(text_of))));
        if shape.version == 2 {
            header.version = 2;
            header.header_length = 72;
            return header;
        }
        if let Some(name) = shape.data {
            header.incompatible_features = crate::qcow2::header::incompatible::DATA_FILE;
            header.extensions.data_file = Some(text(name));
        }
        header.unknown_fields = vec![1; shape.fields];
        header.header_length = 112 + shape.fields as u32;
        header.set_bitmaps((shape.bitmaps > 0).then(|| Bitmaps {
            count: shape.bitmaps,
            directory_size: u64::from(shape.bitmaps) * 32,
            directory_offset: u64::from(shape.bitmaps) << cluster_bits,
        }));
        header
    }

    #[derive(Clone, Debug)]
    struct Shape {
        version: u32,
        fields: usize,
        backing: Option<(usize, u8)>,
        format: Option<(usize, u8)>,
        data: Option<(usize, u8)>,
        bitmaps: u32,
        unknown: Option<(usize, u8)>,
    }

    fn shape() -> impl Strategy<Value = Shape> {
        let text = |max: usize| proptest::option::of((1..max, any::<u8>()));
        let fields = prop_oneof![3 => Just(0), 1 => (0usize..60).prop_map(|words| words * 8)];
        let unknown = proptest::option::weighted(0.2, (0usize..700, any::<u8>()));
        (
            2u32..4,
            fields,
            text(1023),
            text(15),
            text(1500),
            0u32..3,
            unknown,
        )
            .prop_map(
                |(version, fields, backing, format, data, bitmaps, unknown)| Shape {
                    version,
                    fields,
                    backing,
                    format,
                    data,
                    bitmaps,
                    unknown,
                },
            )
    }

    fn parse(cluster: &[u8]) -> Header {
        let mut header = Header::parse(cluster, Path::new("image"), Purpose::Use).unwrap();
        // Which say nothing of the image, nor do bitmaps that are not valid.
        header.extensions.feature_names.clear();
        header.extensions.stale_bitmaps = false;
        header.header_length = 0;
        header
    }

    /// Goes through what a failure of power can leave of `steps`: old headers, then new ones.
    fn check(steps: &Steps, old: &Header, new: &Header) {
        let mut switched = false;
        for pair in steps.0.windows(2) {
            let sectors = changed_sectors(&pair[0], &pair[1]);
            // All subsets of some, and each by itself of many.
            let subsets = 1u32 << sectors.len().min(6);
            for subset in (0..subsets).chain(0..sectors.len() as u32) {
                let mut torn = pair[0].clone();
                for (i, sector) in sectors.iter().enumerate() {
                    if subset >> (i % 6) & 1 != 0 || subset as usize == i {
                        copy_sector(&mut torn, &pair[1], *sector);
                    }
                }
                let found = parse(&torn);
                assert!(found == *new || found == *old && !switched);
            }
            switched |= parse(&pair[1]) == *new;
        }
        assert!(switched);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]

        /// Whatever sectors of a step have been written, the header is the old one or the new one; also
        /// if the old one has been left in the middle of another change.
        #[test]
        fn any_part_of_any_step_is_a_header(
            cluster_bits in 9u32..15,
            from in shape(),
            to in shape(),
            then in shape(),
        ) {
            let [old, new, next] = [from, to, then].map(|shape| header(cluster_bits, &shape));
            let (Some(cluster), Some(encoded)) = (old.encode_at(0), new.encode_at(0)) else {
                return Ok(());
            };
            let Some(steps) = Steps::new(cluster.clone(), &new) else {
                // There is room for both, unless the extensions begin behind the first sector.
                let fields = old.unknown_fields.len().max(new.unknown_fields.len());
                prop_assert!(cluster_bits < 14 || fields > 384);
                return Ok(());
            };
            check(&steps, &parse(&cluster), &parse(&encoded));
            prop_assert_eq!(steps.0.last(), Some(&encoded));
            let Some(encoded) = next.encode_at(0) else {
                return Ok(());
            };
            for left in steps.0 {
                if let Some(steps) = Steps::new(left.clone(), &next) {
                    check(&steps, &parse(&left), &parse(&encoded));
                }
            }
        }
    }

    fn count(old: &Header, new: &Header) -> Option<usize> {
        let steps = Steps::new(old.encode_at(0).unwrap(), new)?;
        let changes = steps.0.windows(2).filter(|pair| pair[0] != pair[1]);
        Some(changes.count())
    }

    #[test]
    fn there_are_no_more_steps_than_it_takes() {
        let named = |len: usize, byte| {
            let mut header = sample();
            header.cluster_bits = 16;
            header.l1_table_offset = 3 << 16;
            header.refcount_table_offset = 1 << 16;
            header.extensions.data_file = Some(vec![byte; len]);
            header
        };
        let mut lazy = named(1000, b'a');
        lazy.compatible_features = 1;
        assert_eq!(count(&lazy, &lazy), Some(0));
        assert_eq!(count(&named(1000, b'a'), &lazy), Some(1));
        assert_eq!(count(&sample(), &sample()), Some(0));
        assert_eq!(count(&named(300, b'a'), &named(300, b'b')), Some(1));
        // Behind, the first sector, before, the first sector, behind.
        assert_eq!(count(&named(1000, b'a'), &named(1000, b'b')), Some(5));
    }

    #[test]
    fn what_has_no_room_beside_the_old_header_is_refused() {
        let named = |len: usize, byte| {
            let mut header = sample();
            header.cluster_bits = 10;
            header.l1_table_offset = 0xc00;
            header.refcount_table_offset = 0x400;
            header.extensions.data_file = Some(vec![byte; len]);
            header
        };
        let (long, other) = (named(500, b'a'), named(500, b'b'));
        assert_eq!(count(&long, &other), None);
        // By way of a short one there is.
        assert!(count(&long, &named(8, b'c')).is_some());
        assert!(count(&named(8, b'c'), &other).is_some());
    }
}
