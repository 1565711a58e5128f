//! The packed layout of data files, which QEMU does not know: it says so, and leaves all as it is.

use std::fs;
use std::process::Command;

use tandem_block::Disk;
use tandem_block::qcow2::{CreateOptions, DataFileLayout, OpenOptions, Qcow2, create};

use crate::qemu::write;

#[test]
fn qemu_refuses_it_by_name_and_changes_nothing() {
    for cluster_size in [512, 4096, 65536] {
        let dir = tempfile::tempdir().unwrap();
        let (path, data) = (dir.path().join("image"), dir.path().join("data"));
        let options = CreateOptions {
            size: 10 << 20,
            cluster_size,
            data_file: Some(data.clone()),
            data_file_layout: DataFileLayout::Packed,
            ..CreateOptions::default()
        };
        create(&path, &options).unwrap();
        let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
        write(&disk, 5 << 20, 1 << 20, 7);
        disk.flush().unwrap();
        drop(disk);

        let before = [&path, &data].map(|file| fs::read(file).unwrap());
        for (program, args) in [
            ("qemu-img", "info image"),
            ("qemu-img", "check -f qcow2 image"),
            ("qemu-img", "check -f qcow2 -r all image"),
            ("qemu-img", "resize -f qcow2 image 20M"),
            ("qemu-img", "resize -f qcow2 --shrink image 1M"),
            ("qemu-img", "amend -f qcow2 -o data_file=other image"),
            ("qemu-img", "convert -f qcow2 -O raw image converted"),
            ("qemu-img", "snapshot -c s image"),
            ("qemu-img", "rebase -f qcow2 -u -b other -F raw image"),
            ("qemu-io", "-f qcow2 -c write_0_1M image"),
        ] {
            let output = Command::new(program)
                .current_dir(&dir)
                .args(args.split(' ').map(|arg| arg.replace('_', " ")))
                .output()
                .unwrap();
            assert!(!output.status.success(), "{program} {args}");
            let said = String::from_utf8_lossy(&output.stderr);
            let expected = "Unsupported qcow2 feature(s): packed data file";
            assert!(said.contains(expected), "{program} {args}: {said}");
            let after = [&path, &data].map(|file| fs::read(file).unwrap());
            assert!(after == before, "{program} {args} has changed a file");
        }
    }
}
