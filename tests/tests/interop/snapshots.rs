//! Internal snapshots, taken, applied and deleted by us and by QEMU, among random writes.

use proptest::prelude::*;
use tandem_block::qcow2::Qcow2;
use tandem_block::{Disk, Error};

use crate::qemu::{Image, Kind, assert_same, read_all, write};

#[derive(Clone, Debug)]
enum Op {
    /// In 1024ths of the disk.
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Resize(u64),
    Reopen,
    Create(Who),
    /// One of the snapshots, counted round.
    Apply(usize, Who),
    Delete(usize, Who),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Tandem,
    Qemu,
}

fn ops(max_sectors: u64) -> impl Strategy<Value = Vec<Op>> {
    let range = (0..1024u64, 1..200u64);
    let who = prop_oneof![2 => Just(Who::Tandem), 1 => Just(Who::Qemu)];
    let op = prop_oneof![
        8 => (range.clone(), 1..255u8).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        2 => (range.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Op::Zero(at, len, unmap)),
        1 => range.prop_map(|(at, len)| Op::Discard(at, len)),
        1 => (1..max_sectors).prop_map(Op::Resize),
        1 => Just(Op::Reopen),
        4 => who.clone().prop_map(Op::Create),
        2 => (any::<usize>(), who.clone()).prop_map(|(which, who)| Op::Apply(which, who)),
        2 => (any::<usize>(), who).prop_map(|(which, who)| Op::Delete(which, who)),
    ];
    proptest::collection::vec(op, 1..30)
}

/// An image, and what it and its snapshots hold.
struct Test {
    image: Image,
    cluster: u64,
    disk: Option<Qcow2>,
    now: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    taken: usize,
}

impl Test {
    fn disk(&mut self) -> &Qcow2 {
        let image = &self.image;
        self.disk.get_or_insert_with(|| image.open().unwrap())
    }

    /// Closes the image, for others to use it.
    fn close(&mut self) {
        if let Some(disk) = self.disk.take() {
            disk.flush().unwrap();
        }
    }

    fn range(&self, at: u64, len: u64) -> (u64, u64) {
        let size = self.now.len() as u64;
        let start = size * at / 1024 / 512 * 512;
        let end = (start + size * len / 1024).next_multiple_of(512).min(size);
        (start, end - start)
    }

    fn fill(&mut self, at: u64, len: u64, byte: u8) {
        self.now[at as usize..][..len as usize].fill(byte);
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Write(at, len, byte) => {
                let (at, len) = self.range(at, len);
                write(self.disk(), at, len as usize, byte);
                self.fill(at, len, byte);
            }
            Op::Zero(at, len, unmap) => {
                let (at, len) = self.range(at, len);
                self.disk().write_zeroes(at, len, unmap).unwrap();
                self.fill(at, len, 0);
            }
            Op::Discard(at, len) => {
                let (at, len) = self.range(at, len);
                self.disk().discard(at, len).unwrap();
                let (start, end) = (at.next_multiple_of(self.cluster), at + len);
                let end = if end == self.now.len() as u64 {
                    end
                } else {
                    end / self.cluster * self.cluster
                };
                if start < end {
                    self.fill(start, end - start, 0);
                }
            }
            Op::Resize(sectors) => {
                let resized = self.disk().resize(sectors * 512);
                if self.image.kind == Kind::InternalV2 && !self.snapshots.is_empty() {
                    let error = resized.unwrap_err().to_string();
                    assert_eq!(error, "Can't resize a v2 image which has snapshots");
                } else {
                    resized.unwrap();
                    self.now.resize(sectors as usize * 512, 0);
                }
            }
            Op::Reopen => drop(self.disk.take()),
            Op::Create(who) => self.create(who),
            Op::Apply(which, who) => self.apply(which, who),
            Op::Delete(which, who) => self.delete(which, who),
        }
    }

    fn create(&mut self, who: Who) {
        self.taken += 1;
        let name = format!("snapshot {}", self.taken);
        match who {
            Who::Tandem => {
                self.disk();
                let disk = self.disk.take().unwrap();
                disk.create_snapshot(name.as_bytes()).unwrap();
            }
            Who::Qemu => {
                self.close();
                self.image.qemu_img(&["snapshot", "-c", &name], &[]);
            }
        }
        self.snapshots.push((name, self.now.clone()));
        self.image.check();
    }

    fn apply(&mut self, which: usize, who: Who) {
        if self.snapshots.is_empty() {
            return;
        }
        let (name, content) = self.snapshots[which % self.snapshots.len()].clone();
        match who {
            Who::Tandem => {
                self.disk();
                let disk = self.disk.take().unwrap();
                disk.apply_snapshot(name.as_bytes()).unwrap();
            }
            Who::Qemu => {
                self.close();
                self.image.qemu_img(&["snapshot", "-a", &name], &[]);
            }
        }
        self.now = content;
        self.image.check();
    }

    fn delete(&mut self, which: usize, who: Who) {
        if self.snapshots.is_empty() {
            return;
        }
        let (name, _) = self.snapshots.remove(which % self.snapshots.len());
        match who {
            Who::Tandem => {
                self.disk();
                let disk = self.disk.take().unwrap();
                disk.delete_snapshot(name.as_bytes()).unwrap();
            }
            Who::Qemu => {
                self.close();
                self.image.qemu_img(&["snapshot", "-d", &name], &[]);
            }
        }
        self.image.check();
    }

    /// QEMU sees the disk and every snapshot as they should be, and so do we.
    fn expect(&mut self) {
        assert_same(&read_all(self.disk()), &self.now, "the open disk");
        self.close();
        self.image.expect(&self.now);
        for (name, content) in &self.snapshots {
            let seen = self.image.snapshot_by_qemu(name);
            assert_same(&seen, content, name);
        }
        let disk = self.image.open().unwrap();
        let listed = disk.snapshots().unwrap();
        let names = listed.iter().map(|snapshot| &snapshot.name[..]);
        assert!(names.eq(self.snapshots.iter().map(|(name, _)| name.as_bytes())));
        let sizes = listed.iter().map(|snapshot| snapshot.disk_size);
        assert!(
            sizes.eq(self
                .snapshots
                .iter()
                .map(|(_, content)| content.len() as u64))
        );
    }
}

fn run(kind: Kind, cluster: u64, more: &str, size: u64, ops: &[Op]) {
    let mut test = Test {
        image: Image::with_options(kind, cluster, size, more),
        cluster,
        disk: None,
        now: vec![0; size as usize],
        snapshots: Vec::new(),
        taken: 0,
    };
    for op in ops {
        test.run(op);
    }
    test.expect();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn small_clusters(ops in ops(4096)) {
        run(Kind::Internal, 512, "", 1 << 20, &ops);
    }

    #[test]
    fn usual_clusters(ops in ops(8192)) {
        run(Kind::Internal, 65536, "", 3 << 20, &ops);
    }

    #[test]
    fn version_2(ops in ops(4096)) {
        run(Kind::InternalV2, 4096, "", 1 << 20, &ops);
    }

    #[test]
    fn subclusters(ops in ops(8192)) {
        run(Kind::Internal, 65536, ",extended_l2=on", 3 << 20, &ops);
    }

    #[test]
    fn narrow_refcounts(ops in ops(4096)) {
        run(Kind::Internal, 512, ",refcount_bits=8", 1 << 20, &ops);
    }
}

/// Refcounts of one bit cannot tell that there is a second user: nothing has changed then.
#[test]
fn refcounts_that_are_too_narrow() {
    for (bits, most) in [(1, 0), (2, 2)] {
        let more = format!(",refcount_bits={bits}");
        let image = Image::with_options(Kind::Internal, 65536, 4 << 20, &more);
        image.qemu_io(&["write -P 7 100k 500k".to_owned()]);
        for i in 0..=most {
            let before = std::fs::read(image.path()).unwrap();
            let taken = image.open().unwrap().create_snapshot(b"one more");
            if i < most {
                taken.unwrap();
            } else {
                assert!(matches!(
                    taken,
                    Err(Error::Invalid {
                        field: "refcount",
                        ..
                    })
                ));
                assert!(before == std::fs::read(image.path()).unwrap());
            }
            image.check();
        }
    }
}

/// A write to what a snapshot has too goes elsewhere in one piece, with what surrounds it.
#[test]
fn what_snapshots_share_is_copied_once() {
    let image = Image::create(Kind::Internal, 65536, 4 << 20);
    image.qemu_io(&["write -P 1 0 4M".to_owned()]);
    image.open().unwrap().create_snapshot(b"s").unwrap();
    let disk = image.open().unwrap();
    let mut model = vec![1; 4 << 20];
    for byte in [2, 3] {
        write(&disk, 70_000 / 512 * 512, 512, byte);
        model[70_000 / 512 * 512..][..512].fill(byte);
    }
    disk.flush().unwrap();
    drop(disk);
    image.expect(&model);
    assert_same(&image.snapshot_by_qemu("s"), &vec![1; 4 << 20], "snapshot");
    // The header and four tables for each of the two, 64 clusters, and the one that was copied.
    let clusters = std::fs::metadata(image.path()).unwrap().len() / 65536;
    assert!(clusters <= 64 + 1 + 9, "{clusters}");
}

#[test]
fn no_snapshots_with_a_data_file() {
    let image = Image::create(Kind::External, 65536, 1 << 20);
    let error = image.open().unwrap().create_snapshot(b"s").unwrap_err();
    assert!(error.to_string().contains("external data file"), "{error}");
    let missing = Image::create(Kind::Internal, 65536, 1 << 20);
    for delete in [true, false] {
        let disk = missing.open().unwrap();
        let result = if delete {
            disk.delete_snapshot(b"s")
        } else {
            disk.apply_snapshot(b"s")
        };
        assert!(matches!(result, Err(Error::NoSnapshot { .. })));
    }
    missing.check();
}
