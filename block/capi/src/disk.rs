//! Opening and using disks.

use std::ffi::{c_char, c_void};

use tandem_block::qcow2::{Follow, OpenOptions, Qcow2};
use tandem_block::{CacheMode, Disk, FileOptions, ImageFormat, Locking, Raw, VolatileSlice};

use crate::error::{Failure, argument, report};
use crate::text::{check_bits, optional_path, required_path};
use crate::*;

/// An open disk.
pub struct tandem_disk {
    disk: Box<dyn Disk>,
    format: u32,
    cluster_size: u64,
}

/// How to open a disk. What is zero is as usual.
#[repr(C)]
pub struct tandem_open_options {
    /// TANDEM_FORMAT_QCOW2 or TANDEM_FORMAT_RAW. It is never guessed.
    pub format: u32,
    /// TANDEM_OPEN_..., or'ed together.
    pub flags: u32,
    /// The external data file, in place of the one that the image names, or NULL.
    pub data_file: *const c_char,
    /// Bytes of memory for the mapping of a qcow2 image, or 0 for 4 MiB.
    pub l2_cache_size: u64,
    /// Whether a backing file whose format the image does not tell is raw. Otherwise it is refused.
    pub untold_backing_is_raw: bool,
    /// Must be 0.
    pub reserved: [u64; 4],
}

/// What there is to know of a disk.
#[repr(C)]
pub struct tandem_info {
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
    /// Bytes in a cluster of a qcow2 image; 0 for a raw disk.
    pub cluster_size: u64,
    /// TANDEM_FORMAT_QCOW2 or TANDEM_FORMAT_RAW.
    pub format: u32,
    /// In bytes: what begins and ends at multiples of it is written without reading what lies around it.
    pub physical_block_size: u32,
    /// In bytes: requests of multiples of it are served best; 0 if that is not known.
    pub optimal_io_size: u32,
    /// In bytes: the smallest aligned unit of which a discard releases the space.
    pub discard_granularity: u32,
    /// Nothing can be written.
    pub read_only: bool,
    /// A write needs a flush to be durable.
    pub write_cache: bool,
}

/// Opens the disk at `path`, and stores it in `disk`; NULL if that fails. `options` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tandem_open(
    path: *const c_char,
    options: *const tandem_open_options,
    disk: *mut *mut tandem_disk,
    error: *mut tandem_error,
) -> tandem_status {
    let body = || {
        if disk.is_null() {
            return argument("disk is NULL");
        }
        // SAFETY: it is not null, and the header asks for the rest.
        let opened = unsafe {
            disk.write(std::ptr::null_mut());
            open(&required_path(path, "path")?, options.as_ref())?
        };
        // SAFETY: as above.
        unsafe { disk.write(Box::into_raw(Box::new(opened))) };
        Ok(())
    };
    // SAFETY: the header asks for what this function does.
    unsafe { report(error, body) }
}

/// # Safety
/// The texts in `options` are as [`optional_path`] wants them.
unsafe fn open(
    path: &std::path::Path,
    options: Option<&tandem_open_options>,
) -> Result<tandem_disk, Failure> {
    let (format, options) = match options {
        None => (TANDEM_FORMAT_QCOW2, OpenOptions::default()),
        // SAFETY: the caller promises it.
        Some(options) => (options.format, unsafe { open_options(options) }?),
    };
    match format {
        TANDEM_FORMAT_QCOW2 => {
            let disk = Qcow2::open(path, &options)?;
            Ok(tandem_disk {
                cluster_size: disk.cluster_size(),
                format,
                disk: Box::new(disk),
            })
        }
        TANDEM_FORMAT_RAW if options.data_file.is_some() => {
            argument("data_file is given, and format is raw, which has none")
        }
        TANDEM_FORMAT_RAW => Ok(tandem_disk {
            disk: Box::new(Raw::open_with(path, options.read_only, options.files)?),
            format,
            cluster_size: 0,
        }),
        other => argument(format!("format is {other}, which is no format")),
    }
}

/// # Safety
/// The texts are as [`optional_path`] wants them.
unsafe fn open_options(from: &tandem_open_options) -> Result<OpenOptions, Failure> {
    let known = TANDEM_OPEN_READ_ONLY
        | TANDEM_OPEN_FOLLOW_ANYWHERE
        | TANDEM_OPEN_FOLLOW_NOTHING
        | TANDEM_OPEN_NO_LOCKS
        | TANDEM_OPEN_DIRECT
        | TANDEM_OPEN_WRITE_THROUGH;
    check_bits(from.flags, known, &from.reserved)?;
    let has = |flag| from.flags & flag != 0;
    let follow = match (
        has(TANDEM_OPEN_FOLLOW_ANYWHERE),
        has(TANDEM_OPEN_FOLLOW_NOTHING),
    ) {
        (false, false) => Follow::ImageDirectory,
        (true, false) => Follow::Anywhere,
        (false, true) => Follow::Nothing,
        (true, true) => return argument("flags say to follow anything, and to follow nothing"),
    };
    let cache = match (has(TANDEM_OPEN_DIRECT), has(TANDEM_OPEN_WRITE_THROUGH)) {
        (false, false) => CacheMode::Writeback,
        (true, false) => CacheMode::None,
        (false, true) => CacheMode::Writethrough,
        (true, true) => CacheMode::Directsync,
    };
    let locking = match has(TANDEM_OPEN_NO_LOCKS) {
        false => Locking::On,
        true => Locking::Off,
    };
    let mut options = OpenOptions {
        read_only: has(TANDEM_OPEN_READ_ONLY),
        // SAFETY: the caller promises it.
        data_file: unsafe { optional_path(from.data_file, "data_file") }?,
        follow,
        backing_format: from.untold_backing_is_raw.then_some(ImageFormat::Raw),
        files: FileOptions { locking, cache },
        ..OpenOptions::default()
    };
    match usize::try_from(from.l2_cache_size) {
        Ok(0) => {}
        Ok(size) => options.l2_cache_size = size,
        Err(_) => return argument(format!("l2_cache_size is {}", from.l2_cache_size)),
    }
    Ok(options)
}

/// Flushes `disk` and releases it, also if that fails. Nobody may use it meanwhile or later. `disk` may
/// be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tandem_close(
    disk: *mut tandem_disk,
    error: *mut tandem_error,
) -> tandem_status {
    let body = || {
        if disk.is_null() {
            return Ok(());
        }
        // SAFETY: it is from `tandem_open`, and nobody has it any more.
        let disk = unsafe { Box::from_raw(disk) };
        Ok(disk.disk.close()?)
    };
    // SAFETY: the header asks for what this function does.
    unsafe { report(error, body) }
}

/// Reads `len` bytes at `offset` of the disk into `buffer`, whose content is unspecified after an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tandem_read(
    disk: *const tandem_disk,
    buffer: *mut c_void,
    len: usize,
    offset: u64,
    error: *mut tandem_error,
) -> tandem_status {
    // SAFETY: the header asks for what these functions do.
    unsafe {
        with_disk(disk, error, |disk| {
            disk.read_at(&[slice(buffer, len)?], offset)
                .map_err(Failure::Disk)
        })
    }
}

/// Writes the `len` bytes of `buffer` at `offset` of the disk. If that fails, any part of the range may
/// have been written, and nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tandem_write(
    disk: *const tandem_disk,
    buffer: *const c_void,
    len: usize,
    offset: u64,
    error: *mut tandem_error,
) -> tandem_status {
    // SAFETY: the header asks for what these functions do. A write does not change its buffer.
    unsafe {
        with_disk(disk, error, |disk| {
            disk.write_at(&[slice(buffer.cast_mut(), len)?], offset)
                .map_err(Failure::Disk)
        })
    }
}

/// Makes what was written before durable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tandem_flush(
    disk: *const tandem_disk,
    error: *mut tandem_error,
) -> tandem_status {
    // SAFETY: the header asks for what this function does.
    unsafe { with_disk(disk, error, |disk| Ok(disk.flush()?)) }
}

/// Tells that the content of `len` bytes at `offset` is not needed any more, so that their space can be
/// released. Each part of them keeps its content, or reads as zero from then on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tandem_discard(
    disk: *const tandem_disk,
    offset: u64,
    len: u64,
    error: *mut tandem_error,
) -> tandem_status {
    // SAFETY: the header asks for what this function does.
    unsafe { with_disk(disk, error, |disk| Ok(disk.discard(offset, len)?)) }
}

/// Makes `len` bytes at `offset` read as zero. With `unmap` their space may be released.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tandem_write_zeroes(
    disk: *const tandem_disk,
    offset: u64,
    len: u64,
    unmap: bool,
    error: *mut tandem_error,
) -> tandem_status {
    // SAFETY: the header asks for what this function does.
    unsafe {
        with_disk(disk, error, |disk| {
            Ok(disk.write_zeroes(offset, len, unmap)?)
        })
    }
}

/// Changes the size of the disk to `size` bytes, while others may use it. What it gains reads as zero,
/// but for what a raw data file holds there already; what it loses is lost.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tandem_resize(
    disk: *const tandem_disk,
    size: u64,
    error: *mut tandem_error,
) -> tandem_status {
    // SAFETY: the header asks for what this function does.
    unsafe { with_disk(disk, error, |disk| Ok(disk.resize(size)?)) }
}

/// Stores what there is to know of the disk in `info`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tandem_get_info(
    disk: *const tandem_disk,
    info: *mut tandem_info,
    error: *mut tandem_error,
) -> tandem_status {
    let body = || {
        // SAFETY: the header asks for what `as_ref` does.
        let Some(disk) = (unsafe { disk.as_ref() }) else {
            return argument("disk is NULL");
        };
        if info.is_null() {
            return argument("info is NULL");
        }
        let limits = disk.disk.limits();
        let told = tandem_info {
            size: disk.disk.size(),
            cluster_size: disk.cluster_size,
            format: disk.format,
            physical_block_size: limits.physical_block_size,
            optimal_io_size: limits.optimal_io_size,
            discard_granularity: limits.discard_granularity,
            read_only: limits.read_only,
            write_cache: limits.write_cache,
        };
        // SAFETY: it is not null, and the header asks for the rest.
        unsafe { info.write(told) };
        Ok(())
    };
    // SAFETY: the header asks for what this function does.
    unsafe { report(error, body) }
}

/// Carries out `body` with what `disk` is.
///
/// # Safety
/// `disk` is null, or from [`tandem_open`] and not closed meanwhile; and that of [`report`].
unsafe fn with_disk(
    disk: *const tandem_disk,
    error: *mut tandem_error,
    body: impl FnOnce(&dyn Disk) -> Result<(), Failure>,
) -> tandem_status {
    let body = || {
        // SAFETY: the caller promises it.
        match unsafe { disk.as_ref() } {
            Some(disk) => body(&*disk.disk),
            None => argument("disk is NULL"),
        }
    };
    // SAFETY: the caller promises it.
    unsafe { report(error, body) }
}

/// The caller's buffer.
///
/// # Safety
/// There are `len` bytes at `buffer` for as long as the slice is used.
unsafe fn slice<'a>(buffer: *mut c_void, len: usize) -> Result<VolatileSlice<'a>, Failure> {
    if isize::try_from(len).is_err() {
        return argument(format!("len is {len}, which is more than memory can have"));
    }
    if buffer.is_null() && len > 0 {
        return argument("buffer is NULL");
    }
    // SAFETY: the caller promises it; of an empty slice no byte is touched.
    Ok(unsafe { VolatileSlice::new(buffer.cast(), len) })
}
