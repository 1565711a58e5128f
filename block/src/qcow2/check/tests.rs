use super::*;
use crate::qcow2::entry::{L1Entry, L2Entry};
use crate::qcow2::{CreateOptions, create};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

fn texts(path: &Path) -> (CheckReport, Vec<String>) {
    let mut texts = Vec::new();
    let report = check(path, &CheckOptions::default(), &mut |finding| {
        texts.push(finding.text)
    })
    .unwrap();
    (report, texts)
}

#[test]
fn data_must_be_at_its_guest_offset() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let options = CreateOptions {
        size: 1 << 20,
        data_file: Some(dir.path().join("data")),
        data_file_raw: true,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let image = OpenOptions::new().write(true).open(&path).unwrap();
    let second_entry = 0x4_0008;
    image
        .write_all_at(&L2Entry::normal(0x5_0000).0.to_be_bytes(), second_entry)
        .unwrap();
    let before = fs::read(&path).unwrap();
    let (report, texts) = texts(&path);
    assert_eq!(report.corruptions, 1);
    assert_eq!(
        texts,
        [
            "ERROR offset=50000: Cluster in the data file is not at its guest offset 10000; L2 \
          entry corrupted."
        ]
    );
    assert_eq!(fs::read(&path).unwrap(), before);
}

/// 2^18 references to one L2 table: 2^36 entries, if each were followed.
#[test]
fn a_small_image_cannot_ask_for_endless_work() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let cluster_size = 2 << 20;
    let repeats = 1 << 18;
    let options = CreateOptions {
        size: repeats * cluster_size * (cluster_size / 8),
        cluster_size,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let image = OpenOptions::new().write(true).open(&path).unwrap();
    let (l1_offset, l2_offset) = (3 * cluster_size, 4 * cluster_size);
    image.set_len(l2_offset + cluster_size).unwrap();
    let entries: Vec<u8> = (0..repeats)
        .flat_map(|_| L1Entry::new(l2_offset).0.to_be_bytes())
        .collect();
    image.write_all_at(&entries, l1_offset).unwrap();
    let report = check(&path, &CheckOptions::default(), &mut |_| ()).unwrap();
    // There are more references than a refcount can tell; the table has none; no entry may say COPIED.
    assert_eq!(report.corruptions, 1 + 1 + repeats);
}

/// Where all refcounts are right, most tables are not read a second time.
#[test]
fn a_flag_that_is_missing_among_right_refcounts_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let options = CreateOptions {
        size: 1 << 30,
        preallocation: crate::Preallocation::Metadata,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let (report, none) = texts(&path);
    assert_eq!((none.len(), report.allocated_clusters), (0, 1 << 14));
    assert_eq!(report.fragmented_clusters, 0);
    let image = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let read = |at| {
        let mut word = [0; 8];
        image.read_exact_at(&mut word, at).unwrap();
        u64::from_be_bytes(word)
    };
    // The second table, and its last entry.
    let table = L1Entry(read(read(40) + 8)).offset();
    let at = table + 0xfff8;
    let entry = L2Entry(read(at)).0 & !crate::qcow2::entry::COPIED;
    image.write_all_at(&entry.to_be_bytes(), at).unwrap();
    let expected = format!("ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount=1");
    assert_eq!(texts(&path).1, [expected]);
}
