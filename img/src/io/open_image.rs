//! The image that is open, and requests to it.

use std::cell::Cell;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use tandem_block::qcow2::{CreateOptions, Info, OpenOptions, Qcow2, create};
use tandem_block::{
    Disk, ExtentKind, FileStorage, ImageFormat, Locking, VolatileSlice, extent_in_chain,
};

use super::fault::Fault;
use super::request::{Request, is_direct};
use crate::image::opened::Opened;
use crate::image::{Image, PROBED, format_of, guessed_raw};
use crate::output;

/// Bytes that are copied at once from a backing file.
const PIECE: u64 = 2 << 20;
/// Bytes at the start of a disk whose format was guessed that must not look like another format.
const GUARDED: usize = 512;

/// An open image.
pub struct OpenImage {
    top: Opened,
    /// What is written is compressed.
    compress: bool,
    /// A range is zeroed in units of so many bytes.
    zero_unit: Option<u64>,
    /// It may have been changed.
    touched: Cell<bool>,
    /// How it was opened.
    pub request: Request,
    /// What the header of a qcow2 image says.
    pub info: Option<Info>,
    /// It was taken for raw, without anybody having said so.
    is_guess: bool,
}

/// How a range is zeroed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zeroes {
    /// The space may be given back.
    pub unmap: bool,
    /// To write zeros is not allowed.
    pub no_fallback: bool,
}

impl OpenImage {
    /// Opens the image of `request`.
    ///
    /// # Errors
    /// The reason why it cannot be opened.
    pub fn open(request: Request) -> Result<Self, String> {
        let described = request.describe()?;
        let path = described.path.clone();
        let name = request.name.as_deref().unwrap_or(path.as_os_str());
        let writes = !request.is_read_only() && !request.snapshot;
        if writes && path.is_dir() {
            return Err(format!(
                "Could not open '{}': Is a directory",
                path.display()
            ));
        }
        let image = Image::look_described(name, described)?;
        check_options(&request)?;
        let is_guess = image.probed && image.format == ImageFormat::Raw;
        if is_guess && writes {
            output::complain(&guessed_raw(name));
        }
        let options = image.options(!writes, request.follow, request.files());
        let opened = options.and_then(|options| Opened::open_with_info(&image, &options));
        let (mut top, mut info) = opened.map_err(|e| e.reason())?;
        if request.snapshot {
            let (overlay, told) = overlay(top, &request)?;
            (top, info) = (Opened::Qcow2(Box::new(overlay)), Some(told));
        }
        Ok(Self {
            is_guess: is_guess && !request.snapshot,
            compress: image.with.compress,
            zero_unit: image.with.zero_unit,
            touched: Cell::new(false),
            top,
            info,
            request,
        })
    }

    /// The disk.
    pub fn disk(&self) -> &dyn Disk {
        self.top.disk()
    }

    /// The disk, to be changed.
    pub fn touched_disk(&self) -> &dyn Disk {
        self.touched.set(true);
        self.top.disk()
    }

    /// Ends its use, with what has been changed made durable, if anything may have been.
    ///
    /// # Errors
    /// Those of [`Disk::close`].
    pub fn close(self) -> tandem_block::Result<()> {
        match self.touched.get() {
            true => self.disk().close(),
            false => Ok(()),
        }
    }

    /// What the format is called.
    pub fn format(&self) -> &'static str {
        self.top.format().name()
    }

    /// Fails unless `len` bytes at `offset` lie within the disk: before memory is taken for them.
    pub fn check_range(&self, offset: u64, len: u64) -> Result<(), Fault> {
        match offset.checked_add(len) {
            Some(end) if end <= self.disk().size() => Ok(()),
            _ => Err(Errno::IO.into()),
        }
    }

    /// Fills `data` with what is at `offset`; each of `pieces` is the length of a buffer.
    pub fn read(&self, data: &mut [u8], pieces: &[usize], offset: u64) -> Result<(), Fault> {
        if self.request.copy_on_read {
            self.populate(offset, data.len() as u64)?;
        }
        Ok(self.disk().read_at(&slices(data, pieces), offset)?)
    }

    /// Writes `data` at `offset`; each of `pieces` is the length of a buffer.
    pub fn write(&self, data: &mut [u8], pieces: &[usize], offset: u64) -> Result<(), Fault> {
        if self.is_guess && offset < GUARDED as u64 && !data.is_empty() {
            self.check_start(data, offset as usize)?;
        }
        if self.compress {
            return self.write_padded(data, offset);
        }
        Ok(self
            .touched_disk()
            .write_at(&slices(data, pieces), offset)?)
    }

    /// Where the state of a virtual machine begins.
    pub fn vm_state_start(&self) -> u64 {
        self.with_vm_state().map_or(0, Qcow2::vm_state_start)
    }

    /// Fills `data` with the state of the virtual machine from `position` on.
    pub fn read_vm_state(&self, data: &mut [u8], position: u64) -> Result<(), Fault> {
        let slice = VolatileSlice::from(data);
        Ok(self.with_vm_state()?.read_vm_state(&[slice], position)?)
    }

    /// Writes `data` to the state of the virtual machine at `position`.
    pub fn write_vm_state(&self, data: &mut [u8], position: u64) -> Result<(), Fault> {
        let qcow2 = self.with_vm_state()?;
        self.touched.set(true);
        let slice = VolatileSlice::from(data);
        Ok(qcow2.write_vm_state(&[slice], position)?)
    }

    /// The image, if it can have the state of a virtual machine.
    fn with_vm_state(&self) -> Result<&Qcow2, Fault> {
        match &self.top {
            Opened::Qcow2(qcow2) => Ok(qcow2),
            _ => Err(Errno::OPNOTSUPP.into()),
        }
    }

    /// Fails if the disk, taken for raw, would look like something else with `data` at `offset`: who
    /// opens it next would take it for that.
    fn check_start(&self, data: &[u8], offset: usize) -> Result<(), Fault> {
        let mut start = [0; GUARDED];
        let slice = VolatileSlice::from(&mut start[..]);
        self.disk().read_at(&[slice], 0)?;
        let len = data.len().min(GUARDED - offset);
        start[offset..offset + len].copy_from_slice(&data[..len]);
        let mut probed = [0; PROBED];
        probed.copy_from_slice(&start[..PROBED]);
        match format_of(&probed) {
            Ok(ImageFormat::Raw) => Ok(()),
            _ => Err(Errno::PERM.into()),
        }
    }

    /// Compresses `data` and writes it at `offset`.
    pub fn write_compressed(&self, data: &[u8], offset: u64) -> Result<(), Fault> {
        let qcow2 = self.compressible()?;
        let cluster_size = qcow2.cluster_size();
        let end = offset + data.len() as u64;
        let ends_whole = end.is_multiple_of(cluster_size) || end == qcow2.size();
        let is_whole = offset.is_multiple_of(cluster_size) && ends_whole;
        if !is_whole && !data.is_empty() {
            return Err(Errno::INVAL.into());
        }
        let clusters = data.chunks(usize::try_from(cluster_size).unwrap_or(usize::MAX));
        for (cluster, at) in clusters.zip((offset..).step_by(cluster_size as usize)) {
            self.touched.set(true);
            qcow2.write_compressed(qcow2.compress(cluster.to_vec())?, at)?;
        }
        Ok(())
    }

    /// As [`write_compressed`](Self::write_compressed), with what the clusters hold besides `data`.
    fn write_padded(&self, data: &[u8], offset: u64) -> Result<(), Fault> {
        let unit = self.compressible()?.cluster_size();
        let mut start = offset - offset % unit;
        let end = offset + data.len() as u64;
        while start < end {
            let len = unit.min(self.disk().size() - start) as usize;
            let mut cluster = vec![0; len];
            let slice = VolatileSlice::from(&mut cluster[..]);
            self.disk().read_at(&[slice], start)?;
            let (from, to) = (offset.max(start), end.min(start + len as u64));
            let new = &data[(from - offset) as usize..(to - offset) as usize];
            cluster[(from - start) as usize..(to - start) as usize].copy_from_slice(new);
            self.write_compressed(&cluster, start)?;
            start += unit;
        }
        Ok(())
    }

    /// The image, if it can have compressed clusters.
    fn compressible(&self) -> Result<&Qcow2, Fault> {
        match (&self.top, &self.info) {
            (Opened::Qcow2(qcow2), Some(info)) if !info.has_data_file => Ok(qcow2),
            _ => Err(Errno::OPNOTSUPP.into()),
        }
    }

    /// Makes a range read as zero.
    pub fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> Result<(), Fault> {
        self.check_range(offset, len)?;
        if how.no_fallback && len > 0 {
            self.check_zeroable(offset, len)?;
        }
        let unmap = how.unmap && self.request.unmap;
        let (mut offset, mut len) = (offset, len);
        if let Some(unit) = self.zero_unit {
            let head = (offset.next_multiple_of(unit) - offset).min(len);
            self.write_zero_bytes(offset, head)?;
            (offset, len) = (offset + head, len - head);
            let tail = len % unit;
            self.write_zero_bytes(offset + len - tail, tail)?;
            len -= tail;
        }
        Ok(self.touched_disk().write_zeroes(offset, len, unmap)?)
    }

    /// Writes zeros as data.
    fn write_zero_bytes(&self, offset: u64, len: u64) -> Result<(), Fault> {
        let mut zeros = vec![0; len.min(PIECE) as usize];
        let end = offset + len;
        for at in (offset..end).step_by(PIECE as usize) {
            let piece = &mut zeros[..(end - at).min(PIECE) as usize];
            let slice = VolatileSlice::from(piece);
            self.touched_disk().write_at(&[slice], at)?;
        }
        Ok(())
    }

    /// Fails if zeros would have to be written: whole clusters are zeroed by their mapping, and
    /// a part of one only if it has no data, and the rest of it reads as zero.
    fn check_zeroable(&self, offset: u64, len: u64) -> Result<(), Fault> {
        let Some(info) = &self.info else {
            return Ok(());
        };
        if info.version < 3 {
            return Err(Errno::OPNOTSUPP.into());
        }
        let unit = info.cluster_size / if info.extended_l2 { 32 } else { 1 };
        let end = offset + len;
        let size = self.disk().size();
        let first = offset - offset % unit;
        let last = end - end % unit;
        if offset > first {
            self.check_part_zeroable(first, offset..end, unit)?;
        }
        if end > last && end < size && (last > first || offset == first) {
            self.check_part_zeroable(last, offset.max(last)..end, unit)?;
        }
        Ok(())
    }

    /// [`check_zeroable`](Self::check_zeroable) of `part` of the cluster at `start`, `unit` bytes.
    fn check_part_zeroable(
        &self,
        start: u64,
        part: std::ops::Range<u64>,
        unit: u64,
    ) -> Result<(), Fault> {
        let end = (start + unit).min(self.disk().size());
        let kind = self.disk().extent(start, end - start)?.kind;
        let has_data = matches!(kind, ExtentKind::Data | ExtentKind::Compressed);
        let rest = [start..part.start, part.end.min(end)..end];
        for range in rest {
            if has_data || !self.reads_zero(range.start, range.end)? {
                return Err(Errno::OPNOTSUPP.into());
            }
        }
        Ok(())
    }

    /// Whether the mapping says that a range reads as zero, in the disks below, too.
    fn reads_zero(&self, mut at: u64, end: u64) -> Result<bool, Fault> {
        while at < end {
            let (_, extent) = extent_in_chain(self.disk(), at, end - at)?;
            if matches!(extent.kind, ExtentKind::Data | ExtentKind::Compressed) {
                return Ok(false);
            }
            at += extent.len;
        }
        Ok(true)
    }

    /// Gives up the content of a range, if that is asked for.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), Fault> {
        self.check_range(offset, len)?;
        if self.request.unmap {
            let disk = self.touched_disk();
            disk.discard(offset, len)?;
            // What is written next finds the clusters free, as in QEMU.
            disk.flush()?;
        }
        Ok(())
    }

    /// Keeps what of a range, rounded to clusters, is still to be had from below.
    fn populate(&self, offset: u64, len: u64) -> Result<(), Fault> {
        let Opened::Qcow2(qcow2) = &self.top else {
            return Ok(());
        };
        self.check_range(offset, len)?;
        let unit = qcow2.cluster_size();
        let end = (offset + len).next_multiple_of(unit).min(qcow2.size());
        let mut at = offset - offset % unit;
        while at < end {
            let extent = qcow2.extent(at, (end - at).min(PIECE))?;
            if extent.kind == ExtentKind::Unallocated {
                self.touched.set(true);
                let mut data = vec![0; extent.len as usize];
                qcow2.read_at(&[VolatileSlice::from(&mut data[..])], at)?;
                if data.iter().all(|byte| *byte == 0) {
                    qcow2.write_zeroes(at, extent.len, false)?;
                } else {
                    qcow2.write_at(&[VolatileSlice::from(&mut data[..])], at)?;
                }
            }
            at += extent.len;
        }
        Ok(())
    }
}

/// Refuses what does not go together.
fn check_options(request: &Request) -> Result<(), String> {
    let refused = |reason: &str| Err(reason.to_owned());
    if request.node_read_only == Some(true) && !request.read_only {
        return refused("Block node is read-only");
    }
    if request.copy_on_read && request.is_read_only() {
        return refused("Can't use copy-on-read on read-only device");
    }
    if request.native_aio && !is_direct(request.cache) {
        return refused(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        );
    }
    Ok(())
}

fn read_info(path: &Path) -> Result<Info, String> {
    Info::read_with(path, Locking::Off).map_err(|e| e.reason())
}

/// An image on top of `base` that takes the writes, in a file that goes when it is closed.
fn overlay(base: Opened, request: &Request) -> Result<(Qcow2, Info), String> {
    let directory = Temporary::new().map_err(|e| format!("Could not get temporary file: {e}"))?;
    let path = directory.0.join("snapshot.qcow2");
    let options = CreateOptions {
        size: base.disk().size(),
        backing_file: Some(PathBuf::from("base")),
        backing_format: Some(base.format()),
        ..CreateOptions::default()
    };
    create(&path, &options).map_err(|e| e.reason())?;
    let storage = FileStorage::open(&path, request.is_read_only());
    let storage = storage.map_err(|e| format!("Could not open temporary file: {e}"))?;
    let options = OpenOptions {
        read_only: request.is_read_only(),
        files: request.files(),
        mark_zeroes: true,
        ..OpenOptions::default()
    };
    let opened = Qcow2::with_backing(
        &path,
        Box::new(storage),
        None,
        Some(base.into_disk().into()),
        &options,
    );
    Ok((opened.map_err(|e| e.reason())?, read_info(&path)?))
}

/// A directory of our own, which is removed with all that is in it.
struct Temporary(PathBuf);

impl Temporary {
    fn new() -> std::io::Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let unique = now.unwrap_or_default().as_nanos();
        let name = format!("tandem-io-{}-{unique}", std::process::id());
        let path = std::env::temp_dir().join(name);
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `data` in buffers of the lengths `pieces`.
fn slices<'a>(mut data: &'a mut [u8], pieces: &[usize]) -> Vec<VolatileSlice<'a>> {
    let mut slices = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let (first, rest) = data.split_at_mut((*piece).min(data.len()));
        slices.push(VolatileSlice::from(first));
        data = rest;
    }
    slices
}
