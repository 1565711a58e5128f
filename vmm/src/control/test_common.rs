//! A VM to operate, for tests.

use super::*;
use crate::config::DiskConfig;
use tempfile::TempDir;

/// Size of the disks.
pub const SIZE: u64 = 1 << 20;

/// What operates a VM of no CPUs, with a raw disk `a` and a qcow2 disk `b` in the directory.
pub fn control() -> (Control, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let (raw, qcow2) = (dir.path().join("a"), dir.path().join("b"));
    std::fs::write(&raw, vec![0; SIZE as usize]).unwrap();
    let options = tandem_block::qcow2::CreateOptions {
        size: SIZE,
        data_file: Some(dir.path().join("b.data")),
        data_file_raw: true,
        ..Default::default()
    };
    tandem_block::qcow2::create(&qcow2, &options).unwrap();
    let configs = [(raw, ",format=raw"), (qcow2, ",queues=3")].map(|(path, keys)| {
        DiskConfig::parse(format!("{}{keys}", path.display()).as_ref()).unwrap()
    });
    (without_vm::control(&configs).unwrap(), dir)
}
