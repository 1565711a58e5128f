//! Changing persistent bitmaps: what does not fit, and what is not known.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use common::{Memory, assert_clean, new_image, open, open_with, write};
use tandem_block::Error;
use tandem_block::qcow2::{BitmapEditor, CreateOptions, OpenOptions};

const CLUSTER: u64 = 4096;

fn image() -> Memory {
    new_image(&CreateOptions {
        size: 64 << 20,
        cluster_size: CLUSTER,
        ..CreateOptions::default()
    })
}

fn edit(image: &Memory) -> BitmapEditor {
    BitmapEditor::new(open(image, None).unwrap()).unwrap()
}

/// Offset of the bitmap directory.
fn directory(image: &Memory) -> u64 {
    let mut at = 112;
    while image.word(at) >> 32 != 0x2385_2875 {
        at += 8;
    }
    image.word(at + 24)
}

fn reason(error: &Error) -> String {
    assert!(matches!(error, Error::Bitmap { .. }), "{error:?}");
    error.reason()
}

/// Whatever write finds no room, the bitmaps are what they were, and nothing is leaked.
#[test]
fn without_room() {
    let start = image();
    let mut editor = edit(&start);
    editor.add(b"a", Some(512)).unwrap();
    editor.commit().unwrap();
    let disk = open(&start, None).unwrap();
    for i in 0..16 {
        write(&disk, i << 22, 512, 1).unwrap();
    }
    drop(disk);
    let mut failed = 0;
    for more in 0..30 {
        let device = Memory::device(start.len() + more * CLUSTER);
        device.overwrite(&start.content());
        let mut editor = edit(&device);
        editor.add(b"b", Some(512)).unwrap();
        editor.merge(b"b", b"a").unwrap();
        editor.clear(b"a").unwrap();
        match editor.commit() {
            Ok(()) => assert!(edit(&device).clear(b"b").is_ok()),
            Err(error) => {
                let Error::Io { source, .. } = &error else {
                    panic!("{error:?}");
                };
                assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
                assert!(edit(&device).clear(b"b").is_err());
                failed += 1;
            }
        }
        assert_clean(&device);
    }
    assert!((1..30).contains(&failed), "{failed}");
}

/// An entry that says something unknown can be removed, and stays as it is otherwise.
#[test]
fn an_unknown_entry() {
    let image = image();
    let mut editor = edit(&image);
    editor.add(b"strange", None).unwrap();
    editor.add(b"known", None).unwrap();
    editor.commit().unwrap();
    let flags = directory(&image) + 8;
    let entry = image.word(flags);
    image.put_word(flags, entry | 1 << 20);
    let mut editor = edit(&image);
    let unsupported = "Bitmap 'strange' has extra data or flags that are not supported";
    for error in [
        editor.clear(b"strange").unwrap_err(),
        editor.set_enabled(b"strange", false).unwrap_err(),
        editor.merge(b"known", b"strange").unwrap_err(),
        editor.merge(b"strange", b"known").unwrap_err(),
    ] {
        assert_eq!(reason(&error), unsupported);
    }
    editor.set_enabled(b"known", false).unwrap();
    editor.commit().unwrap();
    assert_eq!(image.word(directory(&image) + 8), entry | 1 << 20);
    assert_clean(&image);
    let mut editor = edit(&image);
    editor.remove(b"strange").unwrap();
    editor.commit().unwrap();
    assert!(edit(&image).set_enabled(b"strange", true).is_err());
    assert_clean(&image);
}

/// Bits that are set while the disk is open are not lost to a change of the bitmaps.
#[test]
fn what_was_followed_so_far() {
    let image = image();
    let mut editor = edit(&image);
    editor.add(b"a", Some(64 << 10)).unwrap();
    editor.commit().unwrap();
    let disk = open(&image, None).unwrap();
    write(&disk, 3 << 20, 1, 1).unwrap();
    let mut editor = BitmapEditor::new(disk).unwrap();
    editor.add(b"b", Some(1 << 20)).unwrap();
    editor.merge(b"b", b"a").unwrap();
    editor.commit().unwrap();
    let table = image.word(directory(&image) + 32);
    let bits = image.word(table);
    assert_eq!(image.word(bits) >> 56, 1 << 3);
    assert_clean(&image);
}

#[test]
fn there_cannot_be_too_many() {
    let image = image();
    let mut editor = edit(&image);
    let mut last = Ok(());
    let mut count = 0;
    while last.is_ok() {
        last = editor.add(format!("bitmap {count}").as_bytes(), None);
        count += 1;
    }
    let error = reason(&last.unwrap_err());
    assert!(error.ends_with("Maximum number of persistent bitmaps is already reached"));
    assert_eq!(count, 4097);
    editor.commit().unwrap();
    assert_clean(&image);
    let mut editor = edit(&image);
    for i in 0..4096 {
        editor.remove(format!("bitmap {i}").as_bytes()).unwrap();
    }
    editor.commit().unwrap();
    assert_clean(&image);
}

#[test]
fn a_disk_that_is_only_read() {
    let image = image();
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let before = image.content();
    let mut editor = BitmapEditor::new(open_with(&image, None, &options).unwrap()).unwrap();
    editor.add(b"a", None).unwrap();
    assert!(matches!(editor.commit(), Err(Error::ReadOnly)));
    assert_eq!(image.content(), before);
}
