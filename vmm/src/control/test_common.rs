//! A VM to operate, for tests.

use super::*;
use crate::config::DiskConfig;
use crate::disk;
use tandem_devices::virtio::block::Block;
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
    let operated = [(raw, ",format=raw"), (qcow2, ",queues=3")].map(|(path, keys)| {
        let config = DiskConfig::parse(format!("{}{keys}", path.display()).as_ref()).unwrap();
        let image = disk::open(&config).unwrap();
        let handle = Block::new(
            image.disk.clone(),
            disk::options(&config, config.queue_count(2)),
        )
        .handle();
        Operated::new(image, handle)
    });
    let machine = MachineInfo {
        cpus: 2,
        memory: 8 << 20,
        started: Instant::now(),
        seccomp: false,
    };
    let exit = Arc::new(Exit::new().unwrap());
    let gate = Arc::new(Gate::new(exit.clone()));
    (Control::new(machine, operated.into(), exit, gate), dir)
}
