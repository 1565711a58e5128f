//! Valid images of all kinds.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use tandem_block::qcow2::{
    AmendOptions, BitmapEditor, CompressionType, CreateOptions, DataFileLayout, OpenOptions, Qcow2,
    create,
};
use tandem_block::{Disk, ImageFormat, Raw, VolatileSlice};

use crate::memory::Memory;
use crate::places::{Place, places};

/// A valid image.
pub struct Kind {
    pub image: Vec<u8>,
    /// The content of its data file, if it has one.
    pub data: Option<Vec<u8>>,
    /// Where its structures are.
    pub places: Vec<Place>,
}

/// What the images show that have a backing file: less than their own size.
const BACKING_LEN: usize = 40 << 10;
const CLUSTER: u64 = 512;
/// Of a disk: a few L2 tables of the smallest clusters.
const SIZE: u64 = 64 << 10;

/// All kinds, made once. An input names them by number, so new ones come last.
pub static KINDS: LazyLock<Vec<Kind>> = LazyLock::new(|| {
    let plain = CreateOptions {
        size: SIZE,
        cluster_size: CLUSTER,
        ..CreateOptions::default()
    };
    let with = |change: &dyn Fn(&mut CreateOptions)| {
        let mut options = plain.clone();
        change(&mut options);
        options
    };
    let data_file = |options: &mut CreateOptions| options.data_file = Some("data".into());
    vec![
        make(&plain, &[compress, snapshot, bitmaps]),
        make(&with(&|o| o.version = 2), &[compress, snapshot]),
        make(&with(&|o| o.cluster_size = 2048), &[]),
        make(
            &with(&|o| {
                o.compression_type = CompressionType::Zstd;
                o.cluster_size = 4096;
            }),
            &[compress, snapshot],
        ),
        make(
            &with(&|o| {
                o.extended_l2 = true;
                o.cluster_size = 16 << 10;
            }),
            &[snapshot, bitmaps],
        ),
        make(&with(&data_file), &[bitmaps]),
        make(
            &with(&|o| {
                data_file(o);
                o.data_file_raw = true;
            }),
            &[bitmaps],
        ),
        make(
            &with(&|o| {
                data_file(o);
                o.data_file_layout = DataFileLayout::Packed;
            }),
            &[bitmaps],
        ),
        make(&with(&|o| o.refcount_bits = 1), &[bitmaps]),
        make(&with(&|o| o.refcount_bits = 64), &[compress, snapshot]),
        make(
            &with(&|o| {
                o.refcount_bits = 4;
                o.lazy_refcounts = true;
            }),
            &[snapshot, snapshot],
        ),
        make(
            &with(&|o| {
                o.backing_file = Some("below".into());
                o.backing_format = Some(ImageFormat::Raw);
            }),
            &[compress, snapshot],
        ),
        make(
            &with(&|o| {
                o.backing_file = Some("below".into());
                o.backing_format = Some(ImageFormat::Raw);
                o.extended_l2 = true;
                o.cluster_size = 16 << 10;
            }),
            &[],
        ),
    ]
});

/// The content of what the images lie on that have a backing file.
pub static BELOW: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..BACKING_LEN).map(|n| (n >> 9) as u8 | 1).collect());

/// What the images that have a backing file lie on.
pub fn below() -> Arc<dyn Disk> {
    let storage = Box::new(Memory::new(BELOW.clone()));
    Arc::new(Raw::with_storage(Path::new("below"), storage, true).unwrap())
}

/// An image in use.
struct Files {
    image: Memory,
    data: Option<Memory>,
    has_backing: bool,
}

impl Files {
    fn open(&self) -> Qcow2 {
        let data = self.data.clone();
        Qcow2::with_backing(
            Path::new("image"),
            Box::new(self.image.clone()),
            data.map(|data| Box::new(data) as _),
            self.has_backing.then(below),
            &OpenOptions::default(),
        )
        .unwrap()
    }
}

fn make(options: &CreateOptions, steps: &[fn(&Files)]) -> Kind {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let named = CreateOptions {
        data_file: options.data_file.as_ref().map(|_| path("data")),
        ..options.clone()
    };
    create(&path("image"), &named).unwrap();
    let read = |name| Memory::new(std::fs::read(path(name)).unwrap());
    let files = Files {
        image: read("image"),
        data: options.data_file.as_ref().map(|_| read("data")),
        has_backing: options.backing_file.is_some(),
    };
    if files.data.is_some() {
        // Its name is not to have this directory in it.
        let named = AmendOptions {
            data_file: Some("data".into()),
            ..AmendOptions::default()
        };
        files.open().amend(&named, &mut |_, _| {}).unwrap();
    }
    fill(&files);
    steps.iter().for_each(|step| step(&files));
    let image = files.image.bytes().clone();
    Kind {
        places: places(&image),
        image,
        data: files.data.map(|data| data.bytes().clone()),
    }
}

/// Writes, zeroes and discards a part.
fn fill(files: &Files) {
    let disk = files.open();
    let mut bytes: Vec<u8> = (0..5 << 10).map(|n| (n % 251) as u8).collect();
    for offset in [0, 36 << 10, SIZE - bytes.len() as u64] {
        disk.write_at(&[VolatileSlice::from(&mut bytes[..])], offset)
            .unwrap();
    }
    disk.write_zeroes(37 << 10, 2 << 10, false).unwrap();
    disk.discard(39 << 10, 1 << 10).unwrap();
    disk.close().unwrap();
}

fn compress(files: &Files) {
    let disk = files.open();
    let cluster = disk.cluster_size();
    for n in 12..16 {
        let data = vec![n as u8; cluster as usize];
        let packed = disk.compress(data).unwrap();
        disk.write_compressed(packed, n * cluster).unwrap();
    }
    disk.close().unwrap();
}

fn snapshot(files: &Files) {
    files.open().create_snapshot(b"snapshot").unwrap();
    let disk = files.open();
    let mut bytes = [9; 1000];
    disk.write_at(&[VolatileSlice::from(&mut bytes[..])], 3000)
        .unwrap();
    disk.close().unwrap();
}

fn bitmaps(files: &Files) {
    let mut editor = BitmapEditor::new(files.open()).unwrap();
    editor.add(b"a", Some(512)).unwrap();
    editor.add(b"b", Some(4096)).unwrap();
    editor.set_enabled(b"b", false).unwrap();
    editor.commit().unwrap();
    let disk = files.open();
    let mut bytes = [10; 1000];
    disk.write_at(&[VolatileSlice::from(&mut bytes[..])], 30 << 10)
        .unwrap();
    disk.close().unwrap();
}
