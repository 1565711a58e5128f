//! Tandem's engine, its peers and the bare system calls, behind one trait.

use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::utils::qcow2_setup_dev_sync;
use tandem_block::qcow2::{OpenOptions, Qcow2};
use tandem_block::{Disk, FileStorage, Storage};
use vm_memory::VolatileSlice;

use crate::image::Kind;
use crate::work::fill;

/// Something that requests are sent to. Failures panic.
pub trait Target {
    fn read(&self, buffer: &mut [u8], at: u64);
    fn write(&self, buffer: &mut [u8], at: u64);
    fn flush(&self);
    /// [`read`](Self::read), without waiting where the target can tell.
    fn try_read(&self, buffer: &mut [u8], at: u64) {
        self.read(buffer, at);
    }
    /// [`write`](Self::write), without waiting where the target can tell.
    fn try_write(&self, buffer: &mut [u8], at: u64) {
        self.write(buffer, at);
    }
}

/// Who can be a [`Target`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// A raw file and system calls.
    Bare,
    Tandem,
    Imago,
    Qcow2Rs,
    /// Tandem's engine on storage that does nothing with data: what it takes itself.
    Alone,
}

impl Who {
    pub const ALL: [Self; 5] = [
        Self::Bare,
        Self::Tandem,
        Self::Imago,
        Self::Qcow2Rs,
        Self::Alone,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Tandem => "Tandem",
            Self::Imago => "imago",
            Self::Qcow2Rs => "qcow2-rs",
            Self::Alone => "engine alone",
        }
    }

    /// Whether it knows such images. qcow2-rs has no data files, and only Tandem the packed layout.
    pub fn knows(self, kind: Kind) -> bool {
        match self {
            Self::Bare | Self::Tandem => true,
            Self::Imago => kind != Kind::Packed,
            Self::Qcow2Rs => !kind.has_data_file() && kind != Kind::OverHole,
            // What an overlay has below it is opened by name.
            Self::Alone => !matches!(kind, Kind::Overlay | Kind::OverHole),
        }
    }

    /// Opens the image, or the file `bare` beside it.
    pub fn open(self, image: &Path, kind: Kind) -> Box<dyn Target> {
        match self {
            Self::Bare => Box::new(open_file(&image.with_file_name("bare"))),
            Self::Tandem => Box::new(tandem(image)),
            Self::Imago => Box::new(imago(image)),
            Self::Qcow2Rs => Box::new(qcow2_rs(image)),
            Self::Alone => Box::new(without_data(image, kind)),
        }
    }
}

/// A file for reading and writing, made if there is none.
pub fn open_file(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

pub fn tandem(image: &Path) -> Qcow2 {
    Qcow2::open(image, &OpenOptions::default()).unwrap()
}

/// Fills the disk and closes it.
pub fn fill_image(image: &Path, size: u64) {
    let disk = tandem(image);
    fill(&disk, size);
    disk.close().unwrap();
}

impl Target for File {
    fn read(&self, buffer: &mut [u8], at: u64) {
        self.read_exact_at(buffer, at).unwrap();
    }
    fn write(&self, buffer: &mut [u8], at: u64) {
        self.write_all_at(buffer, at).unwrap();
    }
    fn flush(&self) {
        self.sync_data().unwrap();
    }
    fn try_read(&self, buffer: &mut [u8], at: u64) {
        let iov = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // SAFETY: the one buffer that `iov` describes is valid for the kernel to write to.
        let n = unsafe { libc::preadv2(self.as_raw_fd(), &iov, 1, at as i64, libc::RWF_NOWAIT) };
        if n != buffer.len() as isize {
            // File systems in memory do not have it.
            let error = io::Error::last_os_error().raw_os_error();
            assert_eq!(error, Some(libc::EOPNOTSUPP));
            self.read(buffer, at);
        }
    }
}

impl Target for Qcow2 {
    fn read(&self, buffer: &mut [u8], at: u64) {
        self.read_at(&[VolatileSlice::from(buffer)], at).unwrap();
    }
    fn write(&self, buffer: &mut [u8], at: u64) {
        self.write_at(&[VolatileSlice::from(buffer)], at).unwrap();
    }
    fn flush(&self) {
        Disk::flush(self).unwrap();
    }
    fn try_read(&self, buffer: &mut [u8], at: u64) {
        let slice = [VolatileSlice::from(&mut *buffer)];
        if !self.try_read_at(&slice, at).unwrap() {
            self.read(buffer, at);
        }
    }
    fn try_write(&self, buffer: &mut [u8], at: u64) {
        let slice = [VolatileSlice::from(&mut *buffer)];
        if !self.try_write_at(&slice, at).unwrap() {
            self.write(buffer, at);
        }
    }
}

pub type Imago = FormatAccess<imago::file::File>;

pub fn imago(image: &Path) -> Imago {
    let builder = imago::qcow2::Qcow2::<imago::file::File>::builder_path(image);
    let gate = PermissiveImplicitOpenGate::default();
    FormatAccess::new(builder.write(true).open(gate).unwrap())
}

impl Target for Imago {
    fn read(&self, buffer: &mut [u8], at: u64) {
        FormatAccess::read(self, buffer, at).unwrap();
    }
    fn write(&self, buffer: &mut [u8], at: u64) {
        FormatAccess::write(self, &*buffer, at).unwrap();
    }
    fn flush(&self) {
        FormatAccess::flush(self).unwrap();
        self.sync().unwrap();
    }
}

pub fn qcow2_rs(image: &Path) -> Qcow2Dev<Qcow2IoSync> {
    // It complains of tables that the file ends with, instead of with a whole cluster.
    for path in [image.to_owned(), image.with_file_name("base")] {
        if let Ok(file) = File::options().write(true).open(path) {
            let length = file.metadata().unwrap().len();
            file.set_len(length.next_multiple_of(1 << 16)).unwrap();
        }
    }
    let params = Qcow2DevParams::new(9, None, None, false, false);
    let device = qcow2_setup_dev_sync(image, &params).unwrap();
    now(device.qcow2_prep_io()).unwrap();
    device
}

impl Target for Qcow2Dev<Qcow2IoSync> {
    fn read(&self, buffer: &mut [u8], at: u64) {
        let length = buffer.len();
        assert_eq!(now(self.read_at(buffer, at)).unwrap(), length);
    }
    fn write(&self, buffer: &mut [u8], at: u64) {
        now(self.write_at(buffer, at)).unwrap();
    }
    fn flush(&self) {
        now(self.flush_meta()).unwrap();
        now(self.fsync_range(0, usize::MAX)).unwrap();
    }
}

/// The result of a future that waits for nothing, as its I/O is synchronous.
fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
            return result;
        }
    }
}

/// Storage that does nothing with data.
#[derive(Debug)]
struct NoData(FileStorage);

impl Storage for NoData {
    fn read_at(&self, _: &[VolatileSlice<'_>], _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_at(&self, _: &[VolatileSlice<'_>], _: u64) -> io::Result<()> {
        Ok(())
    }
    fn try_read_at(&self, _: &[VolatileSlice<'_>], _: u64) -> io::Result<bool> {
        Ok(true)
    }
    fn try_write_at(&self, _: &[VolatileSlice<'_>], _: u64) -> io::Result<bool> {
        Ok(true)
    }
    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_bytes_at(buf, offset)
    }
    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_bytes_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.0.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.0.next_data(offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
    fn size(&self) -> io::Result<u64> {
        // Data that was not written lies in the file all the same.
        Ok(self.0.size()?.max(1 << 42))
    }
}

fn without_data(image: &Path, kind: Kind) -> Qcow2 {
    let storage = |path: &Path| -> Box<dyn Storage> {
        Box::new(NoData(FileStorage::open(path, false).unwrap()))
    };
    let data = kind
        .has_data_file()
        .then(|| storage(&image.with_file_name("data")));
    Qcow2::with_storage(image, storage(image), data, &OpenOptions::default()).unwrap()
}
