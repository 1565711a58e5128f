//! Cost of the engine, next to the same system calls made directly, and to the crate `imago`.
//!
//! `cargo bench -p tandem-tests --bench engine [FILTER]` prints, for each kind of work and image, the
//! processor time of a request of the bare system call on a plain file; and for each engine how many
//! nanoseconds a request takes above that, and what part of its time the bare call would take. All
//! three do the same in the same run, in turns of up to 20,000 requests; figures are medians of the
//! turns. The last column is Tandem's engine on storage that does nothing with data: what it takes
//! itself, without the noise of the system calls. imago drops the promise of raw data files
//! (`data_file_raw`) when it opens them.
//!
//! Rows with bitmaps are of images that have that many, with the default granularity, all of which
//! follow changes; imago's image has none.
//!
//! Work that is tried does not wait, where an engine can tell. The bare call of such a read is
//! `preadv2` with `RWF_NOWAIT`, and `pread` on file systems in memory, which do not have that.
//!
//! The files lie in `TANDEM_BENCH_DIR` (default `/dev/shm`), in the page cache.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use imago::{FormatAccess, FormatDriverBuilder};
use tandem_block::qcow2::{BitmapEditor, CreateOptions, OpenOptions, Qcow2, create};
use tandem_block::{Disk, FileStorage, Storage};
use vm_memory::VolatileSlice;

const SIZE: u64 = 1 << 30;
const TURNS: usize = 15;

type Imago = FormatAccess<imago::file::File>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Internal,
    External,
    Raw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Read,
    /// Without waiting.
    TryRead,
    TryOverwrite,
    Overwrite,
    Allocate,
}

fn main() {
    let filter = std::env::args()
        .skip(1)
        .find(|a| !a.starts_with("--"))
        .unwrap_or_default();
    let dir = std::env::var("TANDEM_BENCH_DIR").unwrap_or_else(|_| "/dev/shm".into());
    println!(
        "{:<34} {:>9} | {:>11} {:>6} | {:>11} {:>6} | {:>8}",
        "processor time per request",
        "bare ns",
        "tandem +ns",
        "ratio",
        "imago +ns",
        "ratio",
        "alone ns"
    );
    for (work, random, len) in [
        (Work::Read, true, 4096),
        (Work::Read, false, 4096),
        (Work::TryRead, true, 4096),
        (Work::TryOverwrite, true, 4096),
        (Work::Overwrite, true, 4096),
        (Work::Overwrite, false, 4096),
        (Work::Read, true, 1 << 20),
        (Work::Read, false, 1 << 20),
        (Work::Overwrite, true, 1 << 20),
        (Work::Overwrite, false, 1 << 20),
        (Work::Allocate, true, 4096),
        (Work::Allocate, false, 65536),
        (Work::Allocate, false, 1 << 20),
    ] {
        for kind in [Kind::Raw, Kind::External, Kind::Internal] {
            let order = if random { "random" } else { "sequential" };
            let name = format!("{work:?} {order} {}K {kind:?}", len >> 10).to_lowercase();
            let counts: &[usize] = match (work, random, len) {
                (Work::Overwrite | Work::TryOverwrite, true, 4096) => &[0, 1, 4],
                _ => &[0],
            };
            for bitmaps in counts {
                let with = match bitmaps {
                    0 => String::new(),
                    n => format!(" +{n} bitmaps"),
                };
                let name = format!("{name}{with}");
                if name.contains(&filter.to_lowercase()) {
                    let dir = tempfile::tempdir_in(&dir).unwrap();
                    measure(&name, dir.path(), kind, work, random, len, *bitmaps);
                }
            }
        }
    }
}

/// Something that requests are sent to.
trait Target {
    fn read(&self, buffer: &mut [u8], at: u64);
    fn write(&self, buffer: &mut [u8], at: u64);
    fn flush(&self);
    /// [`read`](Self::read), without waiting, if the target knows that.
    fn try_read(&self, buffer: &mut [u8], at: u64) {
        self.read(buffer, at);
    }
    /// [`write`](Self::write), without waiting, if the target knows that.
    fn try_write(&self, buffer: &mut [u8], at: u64) {
        self.write(buffer, at);
    }
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
            assert_eq!(
                io::Error::last_os_error().raw_os_error(),
                Some(libc::EOPNOTSUPP)
            );
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
        if !self
            .try_read_at(&[VolatileSlice::from(&mut *buffer)], at)
            .unwrap()
        {
            self.read(buffer, at);
        }
    }
    fn try_write(&self, buffer: &mut [u8], at: u64) {
        if !self
            .try_write_at(&[VolatileSlice::from(&mut *buffer)], at)
            .unwrap()
        {
            self.write(buffer, at);
        }
    }
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

/// A new image in `dir`.
fn image(dir: &Path, kind: Kind) -> PathBuf {
    std::fs::create_dir(dir).unwrap();
    let path = dir.join("image");
    let options = CreateOptions {
        size: SIZE,
        data_file: (kind != Kind::Internal).then(|| dir.join("data")),
        data_file_raw: kind == Kind::Raw,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    path
}

/// As [`image`], with persistent bitmaps.
fn image_with(dir: &Path, kind: Kind, bitmaps: usize) -> PathBuf {
    let path = image(dir, kind);
    let mut editor = BitmapEditor::open(&path, &OpenOptions::default()).unwrap();
    for i in 0..bitmaps {
        editor.add(i.to_string().as_bytes(), None).unwrap();
    }
    editor.commit().unwrap();
    path
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
        Ok(self.0.size()?.max(2 * SIZE))
    }
}

fn open_without_data(image: &Path, kind: Kind) -> Qcow2 {
    let storage = |path: &Path| -> Box<dyn Storage> {
        Box::new(NoData(FileStorage::open(path, false).unwrap()))
    };
    let data = (kind != Kind::Internal).then(|| storage(&image.with_file_name("data")));
    Qcow2::with_storage(image, storage(image), data, &OpenOptions::default()).unwrap()
}

fn measure(
    name: &str,
    dir: &Path,
    kind: Kind,
    work: Work,
    random: bool,
    len: usize,
    bitmaps: usize,
) {
    let bare = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.join("bare"))
        .unwrap();
    bare.set_len(SIZE).unwrap();
    let image_of = |name| image_with(&dir.join(name), kind, bitmaps);
    let tandem = Qcow2::open(&image_of("tandem"), &OpenOptions::default()).unwrap();
    let imago =
        imago::qcow2::Qcow2::<imago::file::File>::builder_path(image(&dir.join("imago"), kind))
            .write(true)
            .open(imago::PermissiveImplicitOpenGate::default())
            .unwrap();
    let imago = FormatAccess::new(imago);
    let alone = open_without_data(&image_of("alone"), kind);
    let targets: [&dyn Target; 4] = [&bare, &tandem, &imago, &alone];
    let mut buffer = vec![0x5a; len.max(1 << 20)];
    if work != Work::Allocate {
        for target in targets {
            for at in (0..SIZE).step_by(1 << 20) {
                target.write(&mut buffer[..1 << 20], at);
            }
            target.flush();
        }
    }

    let offsets = offsets(work, random, len);
    let per_turn = (offsets.len() / TURNS).min(20_000);
    let mut times = [const { Vec::new() }; 4];
    for (number, turn) in offsets.chunks_exact(per_turn).take(TURNS).enumerate() {
        for i in 0..targets.len() {
            // Who comes first finds the buffer elsewhere.
            let i = (i + number) % targets.len();
            let target = targets[i];
            times[i].push(time(turn, |at| {
                let buffer = &mut buffer[..len];
                match work {
                    Work::Read => target.read(buffer, at),
                    Work::TryRead => target.try_read(buffer, at),
                    Work::TryOverwrite => target.try_write(buffer, at),
                    _ => target.write(buffer, at),
                }
            }));
        }
    }
    if work == Work::Allocate {
        // What an engine puts off until the flush belongs to its writes.
        for (target, times) in targets.iter().zip(&mut times) {
            let requests = (per_turn * times.len()) as f64;
            let flush = time(&[0], |_| target.flush()) / requests;
            times.iter_mut().for_each(|ns| *ns += flush);
        }
    }
    let [bare, tandem, imago, alone] = times;
    let above = |times: &[f64]| median(times.iter().zip(&bare).map(|(t, b)| t - b).collect());
    let ratio = |times: &[f64]| median(times.iter().zip(&bare).map(|(t, b)| b / t).collect());
    println!(
        "{name:<34} {:>9.0} | {:>11.0} {:>6.2} | {:>11.0} {:>6.2} | {:>8.0}",
        median(bare.clone()),
        above(&tandem),
        ratio(&tandem),
        above(&imago),
        ratio(&imago),
        median(alone)
    );
}

/// Where the requests go. Allocating ones touch each cluster of 64 KiB once.
fn offsets(work: Work, random: bool, len: usize) -> Vec<u64> {
    let step = if work == Work::Allocate {
        65536.max(len as u64)
    } else {
        len as u64
    };
    let mut offsets: Vec<u64> = (0..SIZE / step).map(|i| i * step).collect();
    let mut state = 1u64;
    if random {
        for i in (1..offsets.len()).rev() {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            offsets.swap(i, (state >> 33) as usize % (i + 1));
        }
    }
    offsets
}

/// Processor time per request in nanoseconds.
fn time(offsets: &[u64], mut request: impl FnMut(u64)) -> f64 {
    let before = cpu_time();
    offsets.iter().for_each(|at| request(*at));
    (cpu_time() - before).as_nanos() as f64 / offsets.len() as f64
}

fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid for the kernel to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
