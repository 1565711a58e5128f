//! Overlays that are made on a base that they share, and the stamps that they keep of it.
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use tandem_block::qcow2::{
    Backing, BackingName, Base, BitmapEditor, CheckOptions, Commit, CreateOptions, Info,
    NewBacking, OpenOptions, OverlayOptions, OverlayPlace, Qcow2, check, create, stamp_base,
};
use tandem_block::{
    CacheMode, Disk, Error, ImageFormat, Locking, Preallocation, Raw, Stamp, VolatileSlice,
};

const SIZE: u64 = 1 << 20;

fn write(disk: &dyn Disk, byte: u8, offset: u64) {
    disk.write_at(&[VolatileSlice::from(&mut [byte; 4096][..])], offset)
        .unwrap();
}

/// The first byte at `offset`.
fn byte(disk: &dyn Disk, offset: u64) -> u8 {
    let mut sector = [0; 512];
    disk.read_at(&[VolatileSlice::from(&mut sector[..])], offset)
        .unwrap();
    sector[0]
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn names(&self) -> usize {
        fs::read_dir(self.0.path()).unwrap().count()
    }

    /// A base of sevens in its first cluster.
    fn base(&self, format: ImageFormat, data_file: bool) -> PathBuf {
        let path = self.path("base");
        let disk: Box<dyn Disk> = match format {
            ImageFormat::Raw => {
                Raw::create(&path, SIZE, Preallocation::Off).unwrap();
                Box::new(Raw::open(&path, false).unwrap())
            }
            ImageFormat::Qcow2 => {
                let options = CreateOptions {
                    size: SIZE,
                    data_file: data_file.then(|| self.path("base.data")),
                    ..CreateOptions::default()
                };
                create(&path, &options).unwrap();
                Box::new(Qcow2::open(&path, &OpenOptions::default()).unwrap())
            }
        };
        (0..16).for_each(|block| write(&*disk, 7, block * 4096));
        disk.close().unwrap();
        path
    }

    fn kept(&self, name: &str, data_file: bool) -> OverlayOptions {
        OverlayOptions {
            place: OverlayPlace::Kept {
                path: self.path(name),
                data_file: data_file.then(|| self.path(&format!("{name}.data"))),
            },
            ..OverlayOptions::default()
        }
    }

    fn temporary(&self, data_file: bool) -> OverlayOptions {
        OverlayOptions {
            place: OverlayPlace::Temporary {
                directory: Some(self.0.path().to_owned()),
                data_file,
            },
            ..OverlayOptions::default()
        }
    }

    fn open_base(&self, format: ImageFormat) -> Base {
        Base::open(&self.path("base"), format, &OpenOptions::default()).unwrap()
    }

    /// A base, and a kept overlay `over` with an eight.
    fn with_overlay(&self, data_file: bool) -> PathBuf {
        self.base(ImageFormat::Qcow2, data_file);
        let base = self.open_base(ImageFormat::Qcow2);
        let disk = base.overlay(&self.kept("over", data_file)).unwrap();
        write(&disk, 8, 8192);
        disk.close().unwrap();
        self.path("over")
    }
}

fn open(path: &Path) -> tandem_block::Result<Qcow2> {
    Qcow2::open(path, &OpenOptions::default())
}

fn read_info(path: &Path) -> tandem_block::Result<Info> {
    Info::read_with(path, Locking::Off)
}

fn is_sound(path: &Path) {
    let report = check(path, &CheckOptions::default(), &mut |_| {}).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
}

/// A write that changes nothing but the time of the file.
fn touch(path: &Path, seconds: u64) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(UNIX_EPOCH + Duration::from_secs(seconds))
        .unwrap();
}

fn assert_changed(path: &Path, what: &str) {
    let error = open(path).map(drop).unwrap_err();
    assert!(matches!(error, Error::BaseChanged { .. }), "{error}");
    let text = error.to_string();
    for part in [what, "tandem-img rebase -u -b base -F qcow2", "over"] {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn overlays_share_a_base_and_leave_it_alone() {
    for (format, base_data) in [
        (ImageFormat::Raw, false),
        (ImageFormat::Qcow2, false),
        (ImageFormat::Qcow2, true),
    ] {
        for data_file in [false, true] {
            let place = Place::new();
            let path = place.base(format, base_data);
            let before = fs::read(&path).unwrap();
            let files = place.names();
            let base = place.open_base(format);
            let mut overlays = vec![
                base.overlay(&place.temporary(data_file)).unwrap(),
                base.overlay(&place.temporary(data_file)).unwrap(),
            ];
            assert_eq!(place.names(), files);
            overlays.push(base.overlay(&place.kept("over", data_file)).unwrap());
            // The base goes with the last of them.
            drop(base);
            for (number, disk) in (1..).zip(&overlays) {
                assert_eq!(disk.size(), SIZE);
                write(disk, number, 4096);
            }
            for (number, disk) in (1..).zip(&overlays) {
                assert_eq!([0, 4096, 8192].map(|at| byte(disk, at)), [7, number, 7]);
                disk.close().unwrap();
            }
            drop(overlays);
            assert_eq!(place.names(), files + 1 + usize::from(data_file));
            assert!(fs::read(&path).unwrap() == before);
            is_sound(&place.path("over"));
            let disk = open(&place.path("over")).unwrap();
            assert_eq!([0, 4096].map(|at| byte(&disk, at)), [7, 3]);
            drop(disk);
            Raw::open(&path, false).unwrap();
        }
    }
}

#[test]
fn one_that_is_kept_is_opened_on_its_own_base_only() {
    let place = Place::new();
    let over = place.with_overlay(false);
    let base = place.open_base(ImageFormat::Qcow2);
    let disk = base.open_overlay(&over, &OpenOptions::default()).unwrap();
    assert_eq!([0, 8192].map(|at| byte(&disk, at)), [7, 8]);
    drop(disk);
    let refused = |base: &Base, path: &Path| {
        let opened = base.open_overlay(path, &OpenOptions::default());
        opened.map(drop).unwrap_err().to_string()
    };
    let text = refused(&base, &place.path("base"));
    assert!(text.contains("lock"), "{text}");
    fs::copy(place.path("base"), place.path("copy")).unwrap();
    let text = refused(&base, &place.path("copy"));
    assert!(text.contains("it has none, and is no overlay of"), "{text}");
    let copy = Base::open(
        &place.path("copy"),
        ImageFormat::Qcow2,
        &OpenOptions::default(),
    );
    let text = refused(&copy.unwrap(), &over);
    assert!(text.contains("/base' and not '"), "{text}");
    drop(base);
    let text = refused(&place.open_base(ImageFormat::Raw), &over);
    assert!(text.contains("for raw"), "{text}");
}

#[test]
fn what_cannot_be_leaves_nothing() {
    let place = Place::new();
    place.base(ImageFormat::Qcow2, false);
    fs::write(place.path("there"), "there").unwrap();
    let base = place.open_base(ImageFormat::Qcow2);
    let refused = |options: &OverlayOptions, text: &str| {
        let error = base.overlay(options).map(drop).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        assert_eq!(place.names(), 2);
    };
    refused(&place.kept("there", false), "there' exists already");
    let mut with_data = place.kept("over", false);
    with_data.place = OverlayPlace::Kept {
        path: place.path("over"),
        data_file: Some(place.path("there")),
    };
    refused(&with_data, "there' exists already");
    with_data.place = OverlayPlace::Kept {
        path: place.path("over"),
        data_file: Some(place.path("over")),
    };
    refused(&with_data, "over");
    refused(&place.kept("none/over", true), "No such file");
    let smaller = OverlayOptions {
        size: Some(SIZE - 512),
        ..place.temporary(true)
    };
    refused(&smaller, "cannot be smaller than '");
    let odd = OverlayOptions {
        cluster_size: 1000,
        ..place.kept("over", true)
    };
    refused(&odd, "Cluster size");
    let mut nowhere = place.temporary(false);
    nowhere.place = OverlayPlace::Temporary {
        directory: Some(place.path("none")),
        data_file: false,
    };
    refused(&nowhere, "could not create '");
    assert_eq!(fs::read(place.path("there")).unwrap(), b"there");
}

#[test]
fn sizes_and_kinds() {
    let place = Place::new();
    place.base(ImageFormat::Qcow2, false);
    let base = place.open_base(ImageFormat::Qcow2);
    for (cluster_size, extended_l2) in [(512, false), (4096, false), (2 << 20, true)] {
        for cache in [CacheMode::Writeback, CacheMode::None] {
            for data_file in [false, true] {
                let mut options = OverlayOptions {
                    size: Some(SIZE + 1000),
                    cluster_size,
                    extended_l2,
                    ..place.kept("over", data_file)
                };
                options.open.files.cache = cache;
                let disk = base.overlay(&options).unwrap();
                assert_eq!(disk.size(), SIZE + 1024);
                assert_eq!([0, SIZE].map(|at| byte(&disk, at)), [7, 0]);
                write(&disk, 9, 4096);
                disk.close().unwrap();
                drop(disk);
                is_sound(&place.path("over"));
                assert_eq!(byte(&open(&place.path("over")).unwrap(), 4096), 9);
                fs::remove_file(place.path("over")).unwrap();
                let _ = fs::remove_file(place.path("over.data"));
            }
        }
    }
}

#[test]
fn a_changed_base_is_refused() {
    let place = Place::new();
    let over = place.with_overlay(true);
    let info = read_info(&over).unwrap();
    let stamp = info.base_stamp.unwrap();
    assert_eq!((stamp.size, stamp.files.len()), (SIZE, 2));
    let [image, data] = ["base", "base.data"].map(|name| place.path(name));
    let time = |path: &Path| path.metadata().unwrap().modified().unwrap();
    let times = [&image, &data].map(|path| time(path));

    // To look changes nothing.
    let base = place.open_base(ImageFormat::Qcow2);
    assert_eq!(byte(&**base.disk(), 0), 7);
    base.disk().flush().unwrap();
    drop(base);
    is_sound(&image);
    Info::read(&image).unwrap();
    assert_eq!([&image, &data].map(|path| time(path)), times);
    open(&over).unwrap();

    let renew = || stamp_base(&over, &OpenOptions::default()).unwrap();
    let mut last = stamp;
    for (path, name) in [(&data, "base.data"), (&image, "base")] {
        touch(path, 1000);
        assert_changed(
            &over,
            &format!("{name}' was written at 1000.000000000, and"),
        );
        // The tools that do not need it still look at the image.
        is_sound(&over);
        assert_eq!(read_info(&over).unwrap().base_stamp.as_ref(), Some(&last));
        let mut editor = BitmapEditor::open(&over, &OpenOptions::default()).unwrap();
        editor.add(b"map", None).unwrap();
        editor.remove(b"map").unwrap();
        editor.commit().unwrap();
        assert_eq!(read_info(&over).unwrap().base_stamp.as_ref(), Some(&last));
        // So does who says what is below it.
        for backing in [
            Backing::Nothing,
            Backing::File {
                path: image.clone(),
                format: None,
            },
        ] {
            let options = OpenOptions {
                backing,
                ..OpenOptions::default()
            };
            drop(Qcow2::open(&over, &options).unwrap());
        }
        renew();
        open(&over).unwrap();
        last = read_info(&over).unwrap().base_stamp.unwrap();
    }
    let disk = open(&image).unwrap();
    disk.resize(2 * SIZE).unwrap();
    disk.close().unwrap();
    drop(disk);
    assert_changed(&over, "its size is 2097152 bytes, and was 1048576");
}

/// What a program that knows no stamps does when it writes to an image.
fn clear_autoclear(path: &Path) {
    let mut image = fs::read(path).unwrap();
    image[88..96].fill(0);
    fs::write(path, image).unwrap();
}

#[test]
fn who_does_not_know_stamps_ends_them() {
    let place = Place::new();
    let over = place.with_overlay(false);
    clear_autoclear(&over);
    touch(&place.path("base"), 1000);
    let disk = open(&over).unwrap();
    assert_eq!(read_info(&over).unwrap().base_stamp, None);
    assert_eq!(byte(&disk, 8192), 8);
}

#[test]
fn a_damaged_stamp_is_one_clear_error() {
    let place = Place::new();
    let over = place.with_overlay(false);
    let mut image = fs::read(&over).unwrap();
    let at = image.windows(4).position(|word| word == b"BSTM").unwrap();
    // The number of files.
    image[at + 8 + 11] = 9;
    fs::write(&over, image).unwrap();
    let error = open(&over).map(drop).unwrap_err().to_string();
    assert!(error.contains("wrong stamp of the backing file"), "{error}");
}

#[test]
fn the_files_further_down_count() {
    let place = Place::new();
    let middle = place.with_overlay(false);
    let base = Base::open(&middle, ImageFormat::Qcow2, &OpenOptions::default()).unwrap();
    let top = place.path("over.top");
    let disk = base.overlay(&place.kept("over.top", false)).unwrap();
    assert_eq!([0, 8192].map(|at| byte(&disk, at)), [7, 8]);
    drop((disk, base));
    open(&top).unwrap();
    // One that has no stamp itself.
    clear_autoclear(&middle);
    stamp_base(&top, &OpenOptions::default()).unwrap();
    touch(&place.path("base"), 1000);
    open(&middle).unwrap();
    let error = open(&top).map(drop).unwrap_err();
    assert!(matches!(error, Error::BaseChanged { .. }), "{error}");
}

#[test]
fn rebase_and_amend_keep_stamps_right() {
    let place = Place::new();
    let over = place.with_overlay(false);
    fs::copy(place.path("base"), place.path("copy")).unwrap();
    let name = |file: &str| BackingName {
        file: file.into(),
        format: b"qcow2".to_vec(),
    };
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let copy = Qcow2::open(&place.path("copy"), &options).unwrap();
    let disk = open(&over).unwrap();
    let new = NewBacking::Other(&copy);
    disk.rebase(Some(&name("copy")), new, false, &mut |_, _| {})
        .unwrap();
    drop(copy);
    let stamp = || read_info(&over).unwrap().base_stamp;
    let of_copy = stamp().unwrap();
    let disk = open(&over).unwrap();
    assert_eq!([0, 8192].map(|at| byte(&disk, at)), [7, 8]);
    drop(disk);
    touch(&place.path("base"), 1000);
    open(&over).unwrap();

    let amend = tandem_block::qcow2::AmendOptions {
        lazy_refcounts: Some(true),
        refcount_bits: Some(32),
        size: Some(2 * SIZE),
        ..Default::default()
    };
    tandem_block::qcow2::amend(&over, &amend, &mut |_, _| {}).unwrap();
    assert_eq!(stamp(), Some(of_copy));
    let back = tandem_block::qcow2::AmendOptions {
        lazy_refcounts: Some(false),
        refcount_bits: Some(16),
        version: Some(2),
        ..Default::default()
    };
    tandem_block::qcow2::amend(&over, &back, &mut |_, _| {}).unwrap();
    assert_eq!(stamp(), None);
    assert_eq!(byte(&open(&over).unwrap(), 8192), 8);
    is_sound(&over);
}

#[test]
fn commit_keeps_stamps_right() {
    for between in [0, 1] {
        let place = Place::new();
        let middle = place.with_overlay(true);
        let base = Base::open(&middle, ImageFormat::Qcow2, &OpenOptions::default()).unwrap();
        let top = place.path("top");
        let disk = base.overlay(&place.kept("top", false)).unwrap();
        write(&disk, 9, 16384);
        disk.close().unwrap();
        drop((disk, base));
        let stamp = |path: &Path| read_info(path).unwrap().base_stamp;
        let before = [&middle, &top].map(|path| stamp(path));
        let commit = Commit::open(&top, between, &OpenOptions::default()).unwrap();
        commit.copy(&mut |_, _| {}).unwrap();
        // Killed here, the images would be as good as before.
        assert_eq!(stamp(&top), None);
        assert_eq!(stamp(&middle).is_none(), between == 1);
        commit.finish(between == 0).unwrap();
        assert_ne!(stamp(&top), before[1]);
        assert_eq!(stamp(&middle) == before[0], between == 0);
        // The one between stays as it is.
        let shown = if between == 0 { 9 } else { 7 };
        for (path, shown) in [(&top, 9), (&middle, shown)] {
            let disk = open(path).unwrap();
            assert_eq!([0, 8192, 16384].map(|at| byte(&disk, at)), [7, 8, shown]);
            drop(disk);
            is_sound(path);
        }
        // They are stamps of what the images below are now.
        touch(&place.path("base.data"), 1000);
        assert!(open(&top).is_err());
        assert!(open(&middle).is_err());
    }
}

/// A base that is touched while it is open: only somebody who looks at no locks does that.
#[test]
fn a_base_that_changes_under_its_user_gets_no_overlays() {
    let place = Place::new();
    let path = place.base(ImageFormat::Raw, false);
    let base = place.open_base(ImageFormat::Raw);
    base.overlay(&place.temporary(false)).unwrap();
    touch(&path, 1000);
    let error = base.overlay(&place.kept("over", true)).map(drop);
    assert!(matches!(error, Err(Error::BaseChanged { .. })));
    assert_eq!(place.names(), 1);
}

#[test]
fn many_share_one() {
    let place = Place::new();
    place.base(ImageFormat::Qcow2, false);
    let base = place.open_base(ImageFormat::Qcow2);
    let disks: Vec<_> = (0..50)
        .map(|_| base.overlay(&place.temporary(false)).unwrap())
        .collect();
    // Each has the base, and this, and nobody has another one.
    assert_eq!(Arc::strong_count(base.disk()), 51);
    std::thread::scope(|scope| {
        for (number, disk) in (0u8..).zip(&disks) {
            scope.spawn(move || {
                write(disk, number, 4096);
                assert_eq!([0, 4096].map(|at| byte(disk, at)), [7, number]);
            });
        }
    });
}

#[test]
fn the_base_is_locked_while_an_overlay_is_open() {
    let place = Place::new();
    place.base(ImageFormat::Qcow2, true);
    let base = place.open_base(ImageFormat::Qcow2);
    let disk = base.overlay(&place.temporary(false)).unwrap();
    drop(base);
    let is_locked = |result: tandem_block::Result<()>| matches!(result, Err(Error::Locked { .. }));
    for name in ["base", "base.data"] {
        let path = place.path(name);
        assert!(is_locked(Raw::open(&path, false).map(drop)), "{name}");
        assert!(is_locked(Raw::create(&path, SIZE, Preallocation::Off)));
        Raw::open(&path, true).unwrap();
    }
    // Another user of the base, and of its overlays.
    let other = place.open_base(ImageFormat::Qcow2);
    assert_eq!(byte(&other.overlay(&place.temporary(true)).unwrap(), 0), 7);
    drop((disk, other));
    open(&place.path("base")).unwrap();
}

#[test]
fn a_block_device_has_no_time() {
    let stamp = Stamp {
        size: SIZE,
        files: vec![tandem_block::FileStamp {
            path: PathBuf::new(),
            len: SIZE,
            modified: None,
        }],
    };
    let place = Place::new();
    let path = place.path("over");
    let options = CreateOptions {
        size: SIZE,
        backing_file: Some("base".into()),
        backing_format: Some(ImageFormat::Raw),
        base_stamp: Some(stamp.clone()),
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    assert_eq!(read_info(&path).unwrap().base_stamp, Some(stamp.clone()));
    assert_eq!(stamp.difference(&stamp), None);
    let wrong = |options: &CreateOptions| create(&path, options).unwrap_err().to_string();
    let no_base = CreateOptions {
        backing_file: None,
        backing_format: None,
        ..options.clone()
    };
    assert!(wrong(&no_base).contains("cannot be kept without one"));
    let old = CreateOptions {
        version: 2,
        ..options
    };
    assert!(wrong(&old).contains("compatibility level 1.1"));
}
