//! Whether a state that a power failure left keeps the promises.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tandem_block::qcow2::{Finding, FindingKind, OpenOptions, Qcow2, Repair, check_storage};
use tandem_block::{BackupKind, BackupOptions, Disk, LiveDisk};
use vm_memory::VolatileSlice;

use crate::bitmap;
use crate::model::{Model, note};
use crate::power::Files;
use crate::random::Random;
use crate::setup::{BITMAP, Kind, Setup};
use crate::storage::{Memory, SECTOR, Which, sector_bytes, stamp_of};
use crate::workload::{Maker, request, restore, snapshot_name};

/// Stamps of what is written after the failure begin here.
const AFTERWARDS: u64 = 1 << 32;
/// Requests after the failure.
const MORE: usize = 4;

/// Judges states of images of `setup`.
pub struct Judge<'a> {
    pub setup: &'a Setup,
    pub options: &'a OpenOptions,
}

/// A state, as it is being used.
struct State {
    image: Arc<Mutex<Vec<u8>>>,
    data: Arc<Mutex<Vec<u8>>>,
}

impl State {
    fn new(files: Files) -> Self {
        let [image, data] = files.shared();
        Self { image, data }
    }

    fn copy(&self) -> Self {
        Self::new(Files::of(&self.image, &self.data))
    }

    fn image(&self) -> Memory {
        Memory::plain(Which::Image, &self.image)
    }

    fn data(&self) -> Memory {
        Memory::plain(Which::Data, &self.data)
    }

    /// Whether it says itself that it may have to be repaired.
    fn is_dirty(&self) -> bool {
        let image = self.image.lock().unwrap();
        image[7] == 3 && image[79] & 1 != 0
    }
}

impl Judge<'_> {
    /// Opens a state of which `model` tells what it may be, and checks the promises, before and after
    /// more requests. Returns what the disk showed.
    pub fn judge(
        &self,
        files: Files,
        model: &Model<'_>,
        random: &mut Random,
    ) -> Result<Vec<u64>, String> {
        let state = State::new(files);
        if !state.is_dirty() {
            self.check(&state)?;
        }
        let disk = self
            .open(&state)
            .map_err(|e| format!("does not open: {e}"))?;
        let shown = read_stamps(&disk)?;
        model.check(&shown)?;
        self.compare_raw(&state, &shown)?;
        let is_marked = self.check_bitmaps(&state, &shown, model)?;
        let known = self.check_snapshots(&state, model)?;

        let mut stamps = shown.clone();
        let disk = LiveDisk::new(disk);
        let mut maker = Maker::new(self.setup);
        maker.sectors = stamps.len() as u64;
        maker.stamp = AFTERWARDS;
        maker.operates = false;
        // A raw disk that grows shows what the data file holds, and a shrink may have been cut off; a
        // bitmap that is lost cannot follow.
        maker.resizes = !matches!(self.setup.kind, Kind::Raw | Kind::RawIncomplete)
            && !is_marked
            && (known.is_empty() || !self.is_old(&state));
        for op in maker.make(random, MORE) {
            request(&disk, &op).map_err(|e| format!("{op:?} afterwards: {e}"))?;
            note(&mut stamps, &op);
        }
        disk.close().map_err(|e| format!("does not close: {e}"))?;
        drop(disk);
        self.check(&state)?;
        let disk = self
            .open(&state)
            .map_err(|e| format!("does not open again: {e}"))?;
        if read_stamps(&disk)? != stamps {
            return Err("content is wrong after the crash and more requests".into());
        }
        drop(disk);
        for snapshot in known {
            self.check_snapshot(&state, snapshot, model)?;
        }
        self.compare_raw(&state, &stamps)?;
        Ok(shown)
    }

    fn is_old(&self, state: &State) -> bool {
        state.image.lock().unwrap()[7] == 2
    }

    fn open(&self, state: &State) -> tandem_block::Result<Qcow2> {
        self.setup.open(state.image(), state.data(), self.options)
    }

    /// `check` finds leaks at most.
    fn check(&self, state: &State) -> Result<(), String> {
        // What is written where there is no mapping yet is in a raw data file before it is in the disk.
        let with_data = self.setup.has_data_file() && self.setup.kind != Kind::RawIncomplete;
        check_with(&state.image(), with_data.then(|| state.data()).as_ref())
    }

    /// A bitmap that is not marked as in use tells what has changed. Returns whether one is marked.
    fn check_bitmaps(
        &self,
        state: &State,
        shown: &[u64],
        model: &Model<'_>,
    ) -> Result<bool, String> {
        if !self.setup.bitmap {
            return Ok(false);
        }
        let all = bitmap::stored(&state.image.lock().unwrap());
        let Some(stored) = all.iter().find(|stored| stored.name == BITMAP) else {
            return Err(format!("there are bitmaps {all:?}"));
        };
        if all.iter().any(|stored| stored.bits.is_none()) {
            return Ok(true);
        }
        let has = |sector: usize| stored.has((sector * SECTOR) as u64) == Some(true);
        model.check_bitmap(shown, has)?;
        self.check_restored(state, shown, model).map(|()| false)
    }

    /// What has been restored of the disk is whole again with what the bitmap tells.
    fn check_restored(
        &self,
        state: &State,
        shown: &[u64],
        model: &Model<'_>,
    ) -> Result<(), String> {
        let wrong = |e: tandem_block::Error| format!("backup: {e}");
        let disk = self.open(&state.copy()).map_err(wrong)?;
        let options = BackupOptions {
            kind: BackupKind::Since {
                bitmap: BITMAP.to_vec(),
                keep: true,
            },
            scratch_dir: Some(std::env::temp_dir()),
            ..BackupOptions::default()
        };
        let disk = Arc::new(LiveDisk::new(disk));
        let bytes = |stamps: &[u64]| -> Vec<u8> {
            stamps
                .iter()
                .flat_map(|stamp| sector_bytes(*stamp))
                .collect()
        };
        let shown = bytes(shown);
        for base in model.restored() {
            let mut restored = bytes(base);
            let backup = LiveDisk::begin_backup(&disk, &options).map_err(wrong)?;
            restore(&backup, &mut restored).map_err(wrong)?;
            if restored == shown {
                return Ok(());
            }
        }
        Err("the backups do not restore the disk".to_owned())
    }

    /// The snapshots that should be there are, and hold what they should. Returns their numbers.
    fn check_snapshots(&self, state: &State, model: &Model<'_>) -> Result<BTreeSet<u64>, String> {
        let nothing = |e| format!("snapshots: {e}");
        let listed = self.open(&state.copy()).and_then(|disk| disk.snapshots());
        let names = listed.map_err(nothing)?;
        let number = |name: &[u8]| (0..1000).find(|number| snapshot_name(*number) == name);
        let found: BTreeSet<u64> = names.iter().filter_map(|s| number(&s.name)).collect();
        if found.len() != names.len() {
            return Err(format!("{} snapshots, not {found:?}", names.len()));
        }
        model.check_snapshots(&found)?;
        for snapshot in &found {
            self.check_snapshot(state, *snapshot, model)?;
        }
        Ok(found)
    }

    /// The snapshot holds what the disk held when it was taken.
    fn check_snapshot(
        &self,
        state: &State,
        snapshot: u64,
        model: &Model<'_>,
    ) -> Result<(), String> {
        let copy = state.copy();
        let wrong = |e: tandem_block::Error| format!("snapshot {snapshot}: {e}");
        let disk = self.open(&copy).map_err(wrong)?;
        let applied = disk.apply_snapshot(&snapshot_name(snapshot));
        applied.map_err(wrong)?;
        let shown = read_stamps(&self.open(&copy).map_err(wrong)?)?;
        if Some(&shown) != model.snapshot(snapshot) {
            return Err(format!("snapshot {snapshot} has changed"));
        }
        self.check(&copy)
            .map_err(|e| format!("snapshot {snapshot}: {e}"))
    }

    /// A raw data file shows what the disk shows.
    fn compare_raw(&self, state: &State, stamps: &[u64]) -> Result<(), String> {
        if self.setup.kind != Kind::Raw {
            return Ok(());
        }
        let data = state.data.lock().unwrap();
        for (sector, (bytes, stamp)) in data.chunks_exact(SECTOR).zip(stamps).enumerate() {
            if stamp_of(bytes) != Ok(*stamp) {
                return Err(format!("raw file: sector {sector} is not {stamp:#x}"));
            }
        }
        Ok(())
    }
}

/// The stamps of all sectors of `disk`.
pub fn read_stamps(disk: &dyn Disk) -> Result<Vec<u64>, String> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&[VolatileSlice::from(&mut bytes[..])], 0)
        .map_err(|e| e.to_string())?;
    let stamp = |(i, s)| stamp_of(s).map_err(|e| format!("sector {i} {e}"));
    bytes.chunks_exact(SECTOR).enumerate().map(stamp).collect()
}

/// `check` finds leaks at most.
pub fn check(image: &Memory) -> Result<(), String> {
    check_with(image, None)
}

/// `check` finds nothing.
pub fn check_clean(image: &Memory) -> Result<(), String> {
    let mut found = None;
    let note = &mut |finding: Finding| found = Some(finding.text);
    let checked = check_storage(Path::new("image"), image, None, Repair::Nothing, note);
    checked.map_err(|e| format!("check fails: {e}"))?;
    found.map_or(Ok(()), |text| Err(format!("check finds: {text}")))
}

/// As [`check`], in the data file too if there is one.
pub fn check_with(image: &Memory, data: Option<&Memory>) -> Result<(), String> {
    let mut worst = None;
    let report = check_storage(
        Path::new("image"),
        image,
        data.map(|data| data as _),
        Repair::Nothing,
        &mut |finding| {
            if finding.kind != FindingKind::Leak {
                worst = Some(finding.text);
            }
        },
    );
    match (report, worst) {
        (Err(e), _) => Err(format!("check fails: {e}")),
        (Ok(_), Some(text)) => Err(format!("check finds: {text}")),
        (Ok(report), None) if report.corruptions > 0 => Err("check finds corruptions".into()),
        (Ok(_), None) => Ok(()),
    }
}
