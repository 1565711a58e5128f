//! Changing options of an image that exists.
//!
//! All that is asked for is looked at first, and refused in whole if a part of it cannot be. The
//! header then changes at once. What it leads to then is on disk before: new refcounts, a new
//! snapshot table, clusters of zeros for an image of version 2. A size is changed before the version
//! becomes lower and after everything else.

mod downgrade;
mod refcounts;

use std::cmp::Ordering;
use std::path::{Path, PathBuf};

use std::os::unix::ffi::OsStrExt;

use super::backing::{self, Found};
use super::header::{Header, autoclear, compatible, incompatible};
use super::refcount_width::RefcountWidth;
use super::reserved::Field;
use super::snapshot::{self, read_table};
use super::{OpenOptions, Qcow2, open};
use crate::file::ImageFile;
use crate::lock::Access;
use crate::sync::Mutex;
use crate::{Disk, Error, Result};

use refcounts::NewRefcounts;

/// Width of the refcounts of version 2 as a power of two.
const ORDER_V2: u32 = 4;

/// What is to change. Nothing does by default.
#[derive(Clone, Debug, Default)]
pub struct AmendOptions {
    /// Version of the format: 2 or 3.
    pub version: Option<u32>,
    /// Size of the disk in bytes; it becomes smaller without a question.
    pub size: Option<u64>,
    /// The name of the external data file that is stored in the image; an empty one removes it. No
    /// such file is looked for, and the present one is left alone.
    pub data_file: Option<PathBuf>,
    /// Whether the data file must stay valid as a raw image. It can be set at creation only.
    pub data_file_raw: Option<bool>,
    /// Whether a writer may postpone refcount updates.
    pub lazy_refcounts: Option<bool>,
    /// Width of a refcount in bits: a power of two up to 64.
    pub refcount_bits: Option<u64>,
    /// The names of the backing file and of its format, which must be those that the image has if
    /// one is given; [`rebase`](Qcow2::rebase) changes them.
    pub backing_file: Option<Vec<u8>>,
    /// See `backing_file`.
    pub backing_format: Option<Vec<u8>>,
    /// How to open the image. The names in it are followed only if its tables change.
    pub open: OpenOptions,
}

/// Changes options of the image at `path`: all that are asked for or, after an error, none; but an
/// error of the file system can come after a size has changed, or before it has. `progress` is told
/// how much of how much is done.
///
/// # Errors
/// [`Error::Option`] for what the image cannot have, [`Error::HeaderFull`] for a name that is too
/// long for the cluster size; as [`Qcow2::open`](super::Qcow2::open) for an image that cannot be
/// written.
pub fn amend(
    path: &Path,
    options: &AmendOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let image = ImageFile::open(path, Access::Write, options.open.files)?;
    let Found { image, header } = Found::new(image, false)?;
    let amended = Amended::new(&image, &header, options)?;
    if amended.is_header_only() {
        return amended.header.write(&image);
    }
    let open_options = OpenOptions {
        read_only: false,
        ..options.open.clone()
    };
    let found = Found {
        image,
        header: amended.header.clone(),
    };
    let backing = backing::open(&found, &open_options)?;
    let disk = Qcow2::from_found(found, &open_options, backing)?;
    disk.carry_out(amended, options, progress)
}

impl AmendOptions {
    /// The width of refcounts that is asked for, or that of `header`.
    fn width(&self, header: &Header) -> Result<RefcountWidth> {
        let order = match self.refcount_bits {
            None => header.refcount_order,
            Some(bits) if bits.is_power_of_two() && bits <= 64 => bits.ilog2(),
            Some(_) => {
                return wrong("Refcount width must be a power of two and may not exceed 64 bits");
            }
        };
        Ok(RefcountWidth { order })
    }
}

/// What an image becomes.
struct Amended {
    /// Its header, but for what changes with tables, and in the old version if the new one is lower.
    header: Header,
    /// Whether the version becomes higher, or lower.
    version: Ordering,
    width: Option<RefcountWidth>,
    size: Option<u64>,
}

impl Amended {
    /// What becomes of `image`, whose header is `old`; refused as far as the header tells that it
    /// cannot be.
    fn new(image: &ImageFile, old: &Header, options: &AmendOptions) -> Result<Self> {
        let mut header = old.clone();
        apply(&mut header, options)?;
        let width = options.width(old)?;
        let amended = Self {
            version: options.version.unwrap_or(old.version).cmp(&old.version),
            width: (width.order != old.refcount_order).then_some(width),
            size: options.size.filter(|size| *size != old.disk_size()),
            header,
        };
        if amended.version == Ordering::Less {
            check_lowered(&amended.header, width)?;
            amended.header.lowered().plan(image)?;
        } else {
            amended.header.plan(image)?;
        }
        Ok(amended)
    }

    fn is_header_only(&self) -> bool {
        self.width.is_none() && self.size.is_none() && self.version == Ordering::Equal
    }
}

/// Refuses a lower version that `header` tells to be impossible.
fn check_lowered(header: &Header, width: RefcountWidth) -> Result<()> {
    if width.order != ORDER_V2 {
        return wrong("compat=0.10 requires refcount_bits=16");
    }
    if header.has_data_file() {
        return wrong("Cannot downgrade an image with a data file");
    }
    let features = header.incompatible_features & !incompatible::COMPRESSION;
    if features != 0 {
        return wrong(&format!(
            "Cannot downgrade an image with incompatible features {features:#x} set"
        ));
    }
    if header.extensions.bitmaps.is_some() {
        return wrong("Cannot downgrade an image with bitmaps");
    }
    Ok(())
}

fn wrong<T>(reason: &str) -> Result<T> {
    Err(Error::Option(reason.to_owned()))
}

/// Changes in `header` what is of no meaning to tables, and a version that becomes higher.
fn apply(header: &mut Header, options: &AmendOptions) -> Result<()> {
    let version = options.version.unwrap_or(header.version);
    if !(2..=3).contains(&version) {
        return wrong(&format!("Unknown compatibility level {version}"));
    }
    if options.data_file.is_some() && !header.has_data_file() {
        return wrong("data-file can only be set for images that use an external data file");
    }
    if options.data_file_raw == Some(true) && !header.data_file_is_raw() {
        return wrong("data-file-raw cannot be set on existing images");
    }
    let width = options.width(header)?;
    if width.order != header.refcount_order && version < 3 && width.order != ORDER_V2 {
        return wrong(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use \
             compat=1.1 or greater)",
        );
    }
    let (file, format) = (&options.backing_file, &options.backing_format);
    if (file.is_some() || format.is_some())
        && (*file != header.backing_file || *format != header.extensions.backing_format)
    {
        return wrong("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.");
    }
    let is_lazy = header.compatible_features & compatible::LAZY_REFCOUNTS != 0;
    match options.lazy_refcounts {
        Some(true) if version < 3 && !is_lazy => {
            return wrong(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use compat=1.1 or greater)",
            );
        }
        Some(true) => header.compatible_features |= compatible::LAZY_REFCOUNTS,
        Some(false) => header.compatible_features &= !compatible::LAZY_REFCOUNTS,
        None => {}
    }
    if let Some(name) = &options.data_file {
        let name = name.as_os_str().as_bytes();
        header.extensions.data_file = (!name.is_empty()).then(|| name.to_vec());
    }
    if options.data_file_raw == Some(false) {
        header.autoclear_features &= !autoclear::DATA_FILE_RAW;
    }
    header.version = header.version.max(version);
    header.forget_unknown_autoclear();
    Ok(())
}

impl Qcow2 {
    /// Changes options of the image as [`amend`](super::amend) does, and closes it; how to open it is
    /// not asked for.
    ///
    /// # Errors
    /// As [`amend`](super::amend); [`Error::ReadOnly`].
    pub fn amend(self, options: &AmendOptions, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        self.check_writable()?;
        self.flush()?;
        let header = Header::read(&*self.image.storage, &self.image.path)?;
        let amended = Amended::new(&self.image, &header, options)?;
        self.carry_out(amended, options, progress)
    }

    fn carry_out(
        mut self,
        amended: Amended,
        options: &AmendOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        if amended.version == Ordering::Less {
            return self.downgrade(options, &amended, progress);
        }
        let mut header = amended.header;
        self.version = header.version;
        if let Some(size) = amended.size {
            self.check_size(size)?;
            self.check_bitmaps(size)?;
        }
        if let Some(width) = amended.width {
            self.refcounts()?.check_width(&self.image, width)?;
        }
        let old_table = match amended.version {
            Ordering::Greater => self.complete_snapshots(&mut header)?,
            _ => None,
        };
        let new_counts = match amended.width {
            Some(width) => Some(self.renew_refcounts(&mut header, width, progress)?),
            None => None,
        };
        self.switch_header(&header, new_counts)?;
        if let Some(table) = old_table {
            self.release_clusters(Some(Field::SnapshotTable), table)?;
            self.write_counts()?;
        }
        if let Some(size) = amended.size {
            self.resize(size)?;
        }
        self.close()
    }

    /// Makes `header` that of the image, with the refcounts that it leads to if they are new.
    fn switch_header(&mut self, header: &Header, new: Option<NewRefcounts>) -> Result<()> {
        header.write(&self.image)?;
        if let Some(new) = new {
            let counts = open::open_refcounts(&self.image, self.geometry, header, &self.l1)?;
            self.refcounts = Some(Mutex::new(counts));
            // It is that of the old ones, and would not learn of what they reserve.
            drop(self.metadata.take());
            // An error only leaves space in use.
            drop(new.discard_old(&self.image));
        }
        Ok(())
    }

    /// Writes a snapshot table whose entries tell all that version 3 asks for, if they do not, and
    /// enters it into `header`. Returns where the old one is.
    fn complete_snapshots(&self, header: &mut Header) -> Result<Option<std::ops::Range<u64>>> {
        let table = read_table(&*self.image.storage, &self.image.path, header)?;
        if table.snapshots.iter().all(|snapshot| snapshot.is_complete) {
            return Ok(None);
        }
        let old = header.snapshots_offset..header.snapshots_offset + table.len;
        let bytes = snapshot::encode(&table.snapshots);
        header.snapshots_offset = self.add_table(Field::SnapshotTable, &bytes)?;
        self.write_counts()?;
        // Whose table may have moved for that.
        let now = Header::read(&*self.image.storage, &self.image.path)?;
        header.refcount_table_offset = now.refcount_table_offset;
        header.refcount_table_clusters = now.refcount_table_clusters;
        Ok(Some(old))
    }

    /// Writes refcounts of another width, and enters them into `header`.
    fn renew_refcounts(
        &self,
        header: &mut Header,
        width: RefcountWidth,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<NewRefcounts> {
        self.write_counts()?;
        let new = self.refcounts()?.renew(&self.image, width, progress)?;
        header.refcount_order = width.order;
        header.refcount_table_offset = new.table_offset;
        header.refcount_table_clusters = new.table_clusters;
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::tests::sample;
    use crate::qcow2::{CreateOptions, create};
    use std::fs;

    fn image(cluster_size: u64) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let options = CreateOptions {
            size: 1 << 20,
            cluster_size,
            data_file: Some(dir.path().join("data")),
            data_file_raw: true,
            ..CreateOptions::default()
        };
        create(&path, &options).unwrap();
        (dir, path)
    }

    #[test]
    fn all_or_nothing() {
        for cluster_size in [512, 65536] {
            let (_dir, path) = image(cluster_size);
            let before = fs::read(&path).unwrap();
            let name = |len| Some("x".repeat(len).into());
            let too_long = if cluster_size == 512 { 480 } else { 70_000 };
            for options in [
                AmendOptions {
                    data_file: name(too_long),
                    data_file_raw: Some(false),
                    ..AmendOptions::default()
                },
                AmendOptions::default(),
                AmendOptions {
                    data_file_raw: Some(true),
                    ..AmendOptions::default()
                },
            ] {
                let is_change = options.data_file.is_some();
                assert_eq!(amend(&path, &options, &mut |_, _| {}).is_err(), is_change);
                assert!(fs::read(&path).unwrap() == before);
            }
            let options = AmendOptions {
                data_file: name(300),
                data_file_raw: Some(false),
                lazy_refcounts: Some(true),
                ..AmendOptions::default()
            };
            amend(&path, &options, &mut |_, _| {}).unwrap();
            let header = Header::read(
                &*ImageFile::open(&path, Access::Read, crate::FileOptions::default())
                    .unwrap()
                    .storage,
                &path,
            );
            let header = header.unwrap();
            assert_eq!(header.extensions.data_file, Some(vec![b'x'; 300]));
            assert!(!header.data_file_is_raw());
            // Behind the header nothing has changed.
            let cluster = cluster_size as usize;
            assert!(fs::read(&path).unwrap()[cluster..] == before[cluster..]);
            let error = amend(
                &path,
                &AmendOptions {
                    data_file_raw: Some(true),
                    ..options
                },
                &mut |_, _| {},
            );
            assert!(error.unwrap_err().to_string().contains("existing images"));
        }
    }

    /// The header that is written names the refcount table that has been moved for what it leads to.
    #[test]
    fn a_snapshot_table_for_which_the_refcount_table_grows() {
        const FULL: u64 = 64 * 256 * 512;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let options = CreateOptions {
            size: 2 * FULL,
            cluster_size: 512,
            version: 2,
            ..CreateOptions::default()
        };
        create(&path, &options).unwrap();
        let open = || Qcow2::open(&path, &OpenOptions::default()).unwrap();
        open().create_snapshot(b"name").unwrap();
        let disk = open();
        let mut data = vec![1; (FULL - 360 * 512) as usize];
        let mut at = 0;
        while fs::metadata(&path).unwrap().len() < FULL {
            let piece = vm_memory::VolatileSlice::from(&mut data[..]);
            disk.write_at(&[piece], at).unwrap();
            disk.flush().unwrap();
            at += data.len() as u64;
            data.truncate(512);
        }
        drop(disk);

        let read = || {
            let file = ImageFile::open(&path, Access::Read, crate::FileOptions::default());
            Header::read(&*file.unwrap().storage, &path).unwrap()
        };
        let before = read();
        // An entry without the data that version 3 asks for.
        let mut image = fs::read(&path).unwrap();
        let entry = before.snapshots_offset as usize;
        image[entry + 36..entry + 40].fill(0);
        image.copy_within(entry + 64..entry + 72, entry + 40);
        fs::write(&path, &image).unwrap();

        let options = AmendOptions {
            version: Some(3),
            ..AmendOptions::default()
        };
        amend(&path, &options, &mut |_, _| {}).unwrap();
        assert!(read().refcount_table_clusters > before.refcount_table_clusters);
        let check = crate::qcow2::check(&path, &crate::qcow2::CheckOptions::default(), &mut |_| {});
        let report = check.unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0));
    }

    #[test]
    fn what_is_not_known_is_kept() {
        let mut header = sample();
        header.unknown_fields = vec![7; 24];
        header.compatible_features = 1 << 9;
        header.extensions.unknown = vec![(77, b"seven".to_vec())];
        let before = header.clone();
        apply(
            &mut header,
            &AmendOptions {
                data_file: Some("other".into()),
                ..AmendOptions::default()
            },
        )
        .unwrap();
        assert_eq!(header.unknown_fields, before.unknown_fields);
        assert_eq!(header.compatible_features, before.compatible_features);
        assert_eq!(header.extensions.unknown, before.extensions.unknown);
        assert_eq!(header.extensions.data_file, Some(b"other".to_vec()));
    }
}
