//! All that can be done with an image, and what must hold whatever it is like.
//!
//! * Nobody writes to an image that is open for reading only, or that is only checked.
//! * A disk whose image is clean holds what has been written to it, and nothing else changes.
//! * An image that was clean has no corruptions after any use. One that was as we make them has no leaks
//!   after a use without errors; others may have counted what lies behind their end, where a check does
//!   not look. Nor does any use of it find it invalid.
//! * An image of which a repair says that nothing is left to do is clean.

use std::path::Path;

use tandem_block::qcow2::{
    AmendOptions, BitmapEditor, CheckReport, Info, OpenOptions, Qcow2, Repair, SnapshotName,
    check_storage,
};
use tandem_block::{
    Disk, Error, Preallocation, Result, Storage, VolatileSlice, extent_in_chain,
    sparse_extent_in_chain,
};

use crate::feedback;
use crate::input::Input;
use crate::kinds::below;
use crate::memory::Memory;

const NAME: &str = "image";
/// Most bytes of a disk whose content is followed.
const MODEL: u64 = 256 << 10;
/// Most bytes that are read or written at once.
const TRANSFER: usize = 8 << 10;
/// Most extents that are looked at.
const EXTENTS: usize = 40;
/// Most things that are done to a disk.
const STEPS: usize = 10;
/// Most bytes of findings that are told.
const FINDINGS: usize = 1000;
const NAMES: [&[u8]; 5] = [b"snapshot", b"a", b"1", b"b", b""];

/// The files of an image.
pub struct Files {
    pub image: Memory,
    pub data: Option<Memory>,
}

impl Files {
    fn data(&self) -> Option<&dyn Storage> {
        self.data.as_ref().map(|data| data as _)
    }

    /// Opens the image with the other files that it names, if there are such.
    fn open(&self, options: &OpenOptions) -> Result<Qcow2> {
        let info = Info::read_storage(Path::new(NAME), &self.image)?;
        let data = self.data.clone().filter(|_| info.has_data_file);
        Qcow2::with_backing(
            Path::new(NAME),
            Box::new(self.image.clone()),
            data.map(|data| Box::new(data) as _),
            info.backing_file.map(|_| below()),
            options,
        )
    }

    /// Whether a call on one of them has failed; who drops a disk is not told.
    fn have_failed(&self) -> bool {
        self.image.has_failed() || self.data.as_ref().is_some_and(Memory::has_failed)
    }

    fn check(&self, repair: Repair) -> Result<Checked> {
        let mut findings = String::new();
        let report = check_storage(
            Path::new(NAME),
            &self.image,
            self.data(),
            repair,
            &mut |finding| {
                if findings.len() < FINDINGS {
                    findings += &finding.text;
                    findings.push('\n');
                }
            },
        )?;
        Ok(Checked { report, findings })
    }
}

/// What a check has found.
#[derive(Debug)]
struct Checked {
    report: CheckReport,
    /// For whoever looks into a failure.
    #[allow(dead_code, reason = "only `Debug` reads it")]
    findings: String,
}

impl Checked {
    fn is_sound(&self) -> bool {
        self.report.corruptions == 0 && self.report.check_errors == 0
    }

    fn is_clean(&self) -> bool {
        self.is_sound() && self.report.leaks == 0
    }
}

/// With so little memory that slices of tables are written back before others are read.
fn options() -> OpenOptions {
    OpenOptions {
        l2_cache_size: 0,
        ..OpenOptions::default()
    }
}

/// Does with an image what `input` says. `is_ours` tells that it is as we have made it.
pub fn exercise(files: &Files, is_ours: bool, input: &mut Input<'_>) {
    let repair = input.choose(&[Repair::All, Repair::Leaks]);
    let is_trusted = look(files);
    if let Some(mut session) = Session::new(files, is_trusted, is_ours) {
        for _ in 0..STEPS {
            if input.is_empty() || session.disk.is_none() {
                break;
            }
            session.step(input);
        }
        session.end();
    }
    let Ok(report) = files.check(repair) else {
        return;
    };
    if report.is_sound() {
        assert_clean(files, "after a repair");
        if let Some(session) = Session::new(files, true, false) {
            session.end();
        }
    }
}

/// Looks at an image without a change. Returns whether a check finds it clean.
fn look(files: &Files) -> bool {
    let before = files.image.bytes().clone();
    let report = files.check(Repair::Nothing);
    let options = OpenOptions {
        read_only: true,
        ..options()
    };
    if let Ok(disk) = files.open(&options) {
        survey(&disk);
        let _ = disk.close();
    }
    assert_eq!(*files.image.bytes(), before, "it was only to be read");
    report.is_ok_and(|report| report.is_clean())
}

/// Looks at all of a disk that can be looked at in short time.
fn survey(disk: &Qcow2) {
    let (mut at, size) = (0, disk.size());
    for _ in 0..EXTENTS {
        let Ok((_, extent)) = extent_in_chain(disk, at, size - at) else {
            break;
        };
        assert!(extent.len <= size - at, "{extent:?} at {at}");
        let _ = sparse_extent_in_chain(disk, at, extent.len);
        let _ = read(disk, at, (extent.len as usize).min(1024));
        assert!(extent.len > 0 || at == size, "no progress at {at}");
        at += extent.len;
        if at == size {
            break;
        }
    }
    let _ = read(disk, size.saturating_sub(512), 512);
    let _ = disk.bitmaps();
    let _ = read_vm_state(disk, 0);
}

fn assert_clean(files: &Files, when: &str) {
    match files.check(Repair::Nothing) {
        Ok(report) => assert!(report.is_clean(), "{when}: {report:?}"),
        Err(error) => panic!("{when}: {error}"),
    }
}

fn read(disk: &dyn Disk, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    disk.read_at(&[VolatileSlice::from(&mut bytes[..])], offset)?;
    Ok(bytes)
}

fn read_vm_state(disk: &Qcow2, position: u64) -> Result<()> {
    let mut bytes = [0; 700];
    disk.read_vm_state(&[VolatileSlice::from(&mut bytes[..])], position)
}

/// An image in use.
struct Session<'f> {
    files: &'f Files,
    /// `None` if it could not be opened again.
    disk: Option<Qcow2>,
    /// What the disk holds, as far as that is certain.
    model: Option<Vec<u8>>,
    is_trusted: bool,
    /// It was as we make them, and the host has not failed since.
    is_sane: bool,
    /// What was done last, as a number.
    last: usize,
}

impl<'f> Session<'f> {
    fn new(files: &'f Files, is_trusted: bool, is_sane: bool) -> Option<Self> {
        let disk = files.open(&options()).ok()?;
        let mut session = Self {
            files,
            disk: Some(disk),
            model: None,
            is_trusted,
            is_sane,
            last: 0,
        };
        session.learn();
        Some(session)
    }

    /// Takes what the disk reads for what it holds.
    fn learn(&mut self) {
        self.model = match &self.disk {
            Some(disk) if self.is_trusted && disk.size() <= MODEL => {
                read(disk, 0, disk.size() as usize).ok()
            }
            _ => None,
        };
    }

    fn end(mut self) {
        if let Some(disk) = self.disk.take() {
            self.note(disk.close());
        }
        if !self.is_trusted {
            return;
        }
        self.is_sane &= !self.files.have_failed();
        match self.files.check(Repair::Nothing) {
            Ok(report) if !self.is_sane => assert!(report.is_sound(), "{report:?}"),
            Ok(report) => assert!(report.is_clean(), "{report:?}"),
            Err(error) => panic!("it could be checked before: {error}"),
        }
    }

    /// Notes whether the host has failed, and passes on whether anything has.
    fn note<T>(&mut self, result: Result<T>) -> bool {
        feedback::note(&[self.last, usize::from(result.is_ok())]);
        match &result {
            _ if self.files.have_failed() => self.is_sane = false,
            Err(Error::Io { .. }) => self.is_sane = false,
            // There may be more references than can be counted.
            Err(Error::Invalid { reason, .. }) if reason.contains("cannot become larger") => {
                self.is_sane = false;
            }
            Err(error @ (Error::Invalid { .. } | Error::Corrupt { .. })) => {
                assert!(!self.is_sane, "it was valid: {error}");
            }
            _ => {}
        }
        result.is_ok()
    }

    fn range(&self, input: &mut Input<'_>) -> (u64, usize) {
        let size = self.disk.as_ref().map_or(0, |disk| disk.size());
        let offset = match input.byte() {
            0..32 => input.value(),
            32..160 => (u64::from(input.u16()) << 9) % size.max(1),
            _ => u64::from(input.u32()) % size.max(1),
        };
        let len = match input.byte() {
            0..128 => 512 << input.below(5),
            _ => usize::from(input.u16()) % TRANSFER,
        };
        (offset, len)
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let step = input.byte() % 20;
        feedback::note(&[self.last, usize::from(step)]);
        self.last = step.into();
        match step {
            0..3 => self.write(input),
            3..5 => self.read(input),
            5..7 => self.zero(input),
            7 | 8 => self.discard(input),
            9 => self.compress(input),
            10 => self.resize(input),
            11 => self.flush(),
            12 => self.reopen(|disk, _| disk.close(), input),
            13 => self.reopen(change_snapshots, input),
            14 => self.reopen(change_bitmaps, input),
            15 => self.reopen(amend, input),
            16 => self.vm_state(input),
            17 => self.view_snapshot(input),
            18 => self.try_transfer(input),
            _ => self.reopen(|disk, _| disk.set_backing_name(None), input),
        }
    }

    fn disk(&self) -> &Qcow2 {
        self.disk
            .as_ref()
            .expect("it is open while there are steps")
    }

    fn write(&mut self, input: &mut Input<'_>) {
        let (offset, len) = self.range(input);
        let mut bytes = vec![input.byte(); len];
        let result = self
            .disk()
            .write_at(&[VolatileSlice::from(&mut bytes[..])], offset);
        self.has_written(result, offset, &bytes);
    }

    fn has_written(&mut self, result: Result<()>, offset: u64, bytes: &[u8]) {
        if self.note(result) {
            self.set(offset, bytes);
            self.compare(offset, bytes.len());
        } else {
            self.relearn(offset, bytes.len() as u64);
        }
    }

    fn set(&mut self, offset: u64, bytes: &[u8]) {
        if let Some(model) = &mut self.model {
            model[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
    }

    fn read(&mut self, input: &mut Input<'_>) {
        let (offset, len) = self.range(input);
        self.compare(offset, len);
    }

    /// Asserts that the disk reads as it should.
    fn compare(&mut self, offset: u64, len: usize) {
        let result = read(self.disk(), offset, len);
        let (Some(model), Ok(bytes)) = (&self.model, &result) else {
            // What could be read at first can be read later.
            let is_in_range = !matches!(result, Err(Error::OutOfRange { .. }));
            assert!(self.model.is_none() || !is_in_range, "{result:?}");
            return;
        };
        let expected = &model[offset as usize..][..len];
        if let Some(n) = (0..len).find(|&n| bytes[n] != expected[n]) {
            let (found, wanted, at) = (bytes[n], expected[n], offset + n as u64);
            panic!("{found} in place of {wanted} at {at} of the {len} bytes at {offset}");
        }
    }

    /// Takes what a range reads for what it holds, where an error may have changed it.
    fn relearn(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let (Some(model), Some(disk)) = (&mut self.model, &self.disk) else {
            return;
        };
        if end > model.len() as u64 {
            return;
        }
        match read(disk, offset, len as usize) {
            Ok(bytes) => model[offset as usize..end as usize].copy_from_slice(&bytes),
            Err(_) => self.model = None,
        }
    }

    fn long_range(&self, input: &mut Input<'_>) -> (u64, u64) {
        let (offset, len) = self.range(input);
        let len = match input.byte() {
            0..192 => len as u64,
            192..224 => (u64::from(input.u16()) << 9) % (128 << 10),
            _ => input.value(),
        };
        (offset, len)
    }

    fn zero(&mut self, input: &mut Input<'_>) {
        let (offset, len) = self.long_range(input);
        let result = self.disk().write_zeroes(offset, len, input.bool());
        if !self.note(result) {
            self.relearn(offset, len);
        } else if self.model.is_some() {
            self.set(offset, &vec![0; len as usize]);
            self.compare(offset, len as usize);
        }
    }

    fn discard(&mut self, input: &mut Input<'_>) {
        let (offset, len) = self.long_range(input);
        let result = self.disk().discard(offset, len);
        if self.note(result)
            && let Some(model) = &self.model
            && let Ok(bytes) = read(self.disk(), offset, len as usize)
        {
            let old = &model[offset as usize..][..bytes.len()];
            let is_possible = |(new, old): (&u8, &u8)| *new == 0 || new == old;
            assert!(bytes.iter().zip(old).all(is_possible), "{len} at {offset}");
        }
        self.relearn(offset, len);
    }

    fn compress(&mut self, input: &mut Input<'_>) {
        let disk = self.disk();
        let (cluster, size) = (disk.cluster_size(), disk.size());
        let n = u64::from(input.u16()) % size.div_ceil(cluster).max(1);
        let offset = n * cluster;
        let len = cluster.min(size.saturating_sub(offset)) as usize;
        if len > MODEL as usize {
            return;
        }
        let mut bytes = vec![input.byte(); len];
        for n in (0..len).step_by(1 + input.below(64)) {
            bytes[n] = n as u8 ^ (n >> 7) as u8;
        }
        let result = disk
            .compress(bytes.clone())
            .and_then(|packed| disk.write_compressed(packed, offset));
        self.has_written(result, offset, &bytes);
    }

    fn resize(&mut self, input: &mut Input<'_>) {
        let old = self.disk().size();
        let size = match input.byte() {
            0..224 => u64::from(input.u16() % 512) << 9,
            _ => input.value(),
        };
        let how = input.choose(&[
            Preallocation::Off,
            Preallocation::Off,
            Preallocation::Metadata,
            Preallocation::Falloc,
        ]);
        let result = self.disk().resize_preallocated(size, how);
        let is_done = self.note(result);
        let new = self.disk().size();
        assert!(!is_done || new == size, "{new} in place of {size}");
        match &mut self.model {
            // A raw data file may hold something behind the disk.
            Some(model) if new <= MODEL && self.files.data.is_none() => {
                model.resize(new as usize, 0);
                self.compare(old.min(new), (new - old.min(new)) as usize);
            }
            _ => self.learn(),
        }
    }

    fn flush(&mut self) {
        let result = self.disk().flush();
        self.note(result);
    }

    fn vm_state(&mut self, input: &mut Input<'_>) {
        let position = input.value();
        let _ = read_vm_state(self.disk(), position);
        let mut bytes = [input.byte(); 600];
        let bytes = [VolatileSlice::from(&mut bytes[..])];
        // Others would make the test slow, as a table grows for it.
        if position < MODEL {
            let result = self.disk().write_vm_state(&bytes, position);
            self.note(result);
        }
    }

    fn try_transfer(&mut self, input: &mut Input<'_>) {
        let (offset, len) = self.range(input);
        let mut bytes = vec![input.byte(); len];
        let bufs = [VolatileSlice::from(&mut bytes[..])];
        let _ = self.disk().try_read_at(&bufs, offset);
        let mut bytes = vec![input.byte(); len];
        let result = self
            .disk()
            .try_write_at(&[VolatileSlice::from(&mut bytes[..])], offset);
        match result {
            Ok(true) => self.has_written(Ok(()), offset, &bytes),
            _ => {
                self.note(result);
                self.relearn(offset, len as u64);
            }
        }
    }

    /// Reads what a snapshot holds, by way of another use of the image.
    fn view_snapshot(&mut self, input: &mut Input<'_>) {
        self.flush();
        let options = OpenOptions {
            read_only: true,
            snapshot: Some(SnapshotName::IdOrName(input.choose(&NAMES).to_vec())),
            ..options()
        };
        if let Ok(disk) = self.files.open(&options) {
            survey(&disk);
        }
    }

    /// Ends the use of the disk by `last`, and opens it again.
    fn reopen(
        &mut self,
        last: impl FnOnce(Qcow2, &mut Input<'_>) -> Result<()>,
        input: &mut Input<'_>,
    ) {
        let Some(disk) = self.disk.take() else { return };
        let result = last(disk, input);
        self.note(result);
        match self.files.open(&options()) {
            Ok(disk) => self.disk = Some(disk),
            Err(error) => assert!(!self.is_trusted, "it could be opened before: {error}"),
        }
        // The disk may show something else now.
        self.learn();
    }
}

fn change_snapshots(disk: Qcow2, input: &mut Input<'_>) -> Result<()> {
    let name = input.choose(&NAMES);
    match input.byte() % 4 {
        0 => disk.create_snapshot(name),
        1 => disk.apply_snapshot(name),
        2 => disk.delete_snapshot(name),
        _ => disk.snapshots().map(drop),
    }
}

fn change_bitmaps(disk: Qcow2, input: &mut Input<'_>) -> Result<()> {
    let mut editor = BitmapEditor::new(disk)?;
    for _ in 0..1 + input.below(3) {
        let name = input.choose(&NAMES);
        let _ = match input.byte() % 5 {
            0 => editor.add(name, Some(1 << input.below(64))),
            1 => editor.remove(name),
            2 => editor.clear(name),
            3 => editor.set_enabled(name, input.bool()),
            _ => editor.merge(name, input.choose(&NAMES)),
        };
    }
    editor.commit()
}

fn amend(disk: Qcow2, input: &mut Input<'_>) -> Result<()> {
    let mut options = AmendOptions::default();
    match input.byte() % 5 {
        0 => options.version = Some(2 + u32::from(input.bool())),
        1 => options.refcount_bits = Some(1 << input.below(8)),
        2 => options.lazy_refcounts = Some(input.bool()),
        3 => options.data_file_raw = Some(input.bool()),
        _ => options.size = Some(u64::from(input.u16() % 512) << 9),
    }
    disk.amend(&options, &mut |_, _| {})
}
