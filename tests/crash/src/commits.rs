//! Power failures while the data of an image goes to the one below, and while the image is emptied.

use std::path::Path;
use std::sync::{Arc, Mutex};

use tandem_block::qcow2::{Commit, CreateOptions, OpenOptions, Qcow2, create};
use tandem_block::{Disk, ImageFormat, Raw};

use crate::operations::{content, fill};
use crate::power::{Files, Run};
use crate::rewrites::{SIZE, check, expect_content, image, memory, raw};
use crate::setup::{Setup, scratch};
use crate::storage::{Memory, Which};

/// A base that is smaller than the image on it, as a qcow2 image or not.
fn base(cluster_size: Option<u64>) -> Vec<u8> {
    let Some(cluster_size) = cluster_size else {
        return vec![7; SIZE - 5120];
    };
    let dir = scratch();
    let path = dir.path().join("base");
    let options = CreateOptions {
        size: SIZE as u64 - 5120,
        cluster_size,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    fill(&disk, 0, 13_000, 7);
    fill(&disk, 30_000, 20_000, 6);
    drop(disk);
    std::fs::read(&path).unwrap()
}

fn open_base(storage: Memory, is_image: bool, read_only: bool) -> Box<dyn Disk> {
    let (name, storage) = (Path::new("base"), Box::new(storage));
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    if is_image {
        Box::new(Qcow2::with_storage(name, storage, None, &options).unwrap())
    } else {
        Box::new(Raw::with_storage(name, storage, read_only).unwrap())
    }
}

fn open_top(image: Memory, base: Box<dyn Disk>) -> Qcow2 {
    let options = OpenOptions::default();
    let (name, image) = (Path::new("image"), Box::new(image));
    Qcow2::with_backing(name, image, None, Some(base.into()), &options).unwrap()
}

/// The disk on top reads the same at any time.
pub fn committing(run: &mut Run) {
    let cases = [
        (512, Some(512)),
        (4096, Some(1024)),
        (1024, None),
        (512, Some(4096)),
    ];
    for (seed, (cluster_size, base_cluster_size)) in run.rounds(cases) {
        let is_image = base_cluster_size.is_some();
        let start = Files {
            image: image(3, cluster_size, Some(8)).image,
            data: base(base_cluster_size),
        };
        let shown = |files: &Files| {
            let base = open_base(memory(Which::Data, &files.data), is_image, true);
            content(&open_top(memory(Which::Image, &files.image), base))
        };
        let before = shown(&start);
        for empties in [false, true] {
            let mut after = before.clone();
            after[5000..14_000].fill(0xee);
            let commit = |image: Memory, data: Memory| {
                let top = open_top(image, open_base(data.again(), is_image, true));
                fill(&top, 5000, 9000, 0xee);
                let commit = Commit::with_disks(top, open_base(data, is_image, false), 0);
                commit.copy(&mut |_, _| {}).unwrap();
                commit.finish(empties).unwrap();
            };
            let judge = |state: Files, what: &str| {
                let what = &format!("commit {cluster_size} {base_cluster_size:?}, {what}");
                check(
                    &Files {
                        data: Vec::new(),
                        ..state.clone()
                    },
                    what,
                );
                if is_image {
                    let image = state.data.clone();
                    check(
                        &Files {
                            image,
                            data: Vec::new(),
                        },
                        what,
                    );
                }
                expect_content(&shown(&state), &before, &after, what);
            };
            let synced = run.explore(&start, seed, commit, judge);
            assert!(shown(&synced) == after);
            let base = open_base(memory(Which::Data, &synced.data), is_image, true);
            let mut bytes = vec![0; SIZE];
            base.read_at(&[vm_memory::VolatileSlice::from(&mut bytes[..])], 0)
                .unwrap();
            assert!(bytes == after);
        }
    }
}

/// As [`committing`], of an image with a data file, which gives back its space only when nothing leads
/// there any more. What the base takes up is on disk at once.
pub fn emptying_a_data_file(run: &mut Run) {
    for (seed, cluster_size) in run.rounds([512, 4096]) {
        let start = image_with_data_file(cluster_size);
        let open = |image: Memory, data: Memory, base: Box<dyn Disk>| {
            let options = OpenOptions::default();
            let (name, image, data) = (Path::new("image"), Box::new(image), Box::new(data));
            Qcow2::with_backing(name, image, Some(data), Some(base.into()), &options).unwrap()
        };
        let shown = |files: &Files, base| {
            let data = memory(Which::Data, &files.data);
            content(&open(memory(Which::Image, &files.image), data, base))
        };
        let before = shown(&start, raw(7));
        let base = Arc::new(Mutex::new(vec![7; SIZE]));
        let base_disk = || open_base(Memory::plain(Which::Data, &base), false, false);
        let commit = |image: Memory, data: Memory| {
            let commit = Commit::with_disks(open(image, data, base_disk()), base_disk(), 0);
            commit.copy(&mut |_, _| {}).unwrap();
            commit.finish(true).unwrap();
        };
        run.explore(&start, seed, commit, |state, what| {
            let what = &format!("emptying {cluster_size}, {what}");
            check(&state, what);
            assert!(shown(&state, base_disk()) == before, "{what}: the disk");
        });
        assert!(*base.lock().unwrap() == before);
    }
}

/// An image with a data file that has data in some places, on a disk of sevens.
fn image_with_data_file(cluster_size: u64) -> Files {
    let dir = scratch();
    let [path, data, base] = ["image", Setup::DATA, Setup::BASE].map(|name| dir.path().join(name));
    std::fs::write(base, vec![7; SIZE]).unwrap();
    let options = CreateOptions {
        size: SIZE as u64,
        cluster_size,
        data_file: Some(data.clone()),
        backing_file: Some(Setup::BASE.into()),
        backing_format: Some(ImageFormat::Raw),
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    fill(&disk, 10_000, 12_000, 9);
    disk.close().unwrap();
    drop(disk);
    Files {
        image: std::fs::read(&path).unwrap(),
        data: std::fs::read(&data).unwrap(),
    }
}
