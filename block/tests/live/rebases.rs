//! Rebases.

use super::*;

#[test]
fn a_rebase_changes_nothing_that_is_read() {
    use Kind::*;
    let chains = [
        vec![(Raw, SIZE), (Internal, SIZE)],
        vec![(Internal, SIZE), (Subclusters, SIZE)],
        vec![(Packed, SIZE / 2), (External, SIZE)],
        vec![(Internal, SIZE), (Packed, SIZE / 2), (Version2, SIZE)],
        vec![(Internal, 2 * SIZE), (Internal, SIZE / 2), (Internal, SIZE)],
    ];
    for (seed, images) in (1..).zip(chains) {
        for to in [if seed % 2 == 0 { "" } else { "other" }, "base"] {
            let mut chain = Chain::new(&images, seed);
            let other = CreateOptions {
                size: SIZE + 4096,
                ..CreateOptions::default()
            };
            create(&chain.path("other"), &other).unwrap();
            let mut content = vec![0; SIZE as usize];
            let disk = open(&chain.path("other"));
            fill(&*disk, &mut content, 99);
            disk.close().unwrap();
            drop(disk);
            let disk = chain.live();
            let options = RebaseOptions {
                open: unsynced(),
                backing: (!to.is_empty()).then(|| BackingName {
                    file: to.into(),
                    format: match is_qcow2(&chain.path(to)) {
                        true => b"qcow2".to_vec(),
                        false => b"raw".to_vec(),
                    },
                }),
                max_last: None,
            };
            chain.during(&disk, seed, || {
                disk.rebase(&options, &mut |_, _| ControlFlow::Continue(()))
                    .unwrap()
            });
            disk.close().unwrap();
            drop(disk);
            let info = tandem_block::qcow2::Info::read(&chain.path("top")).unwrap();
            let backing = options.backing.map(|name| name.file);
            assert_eq!(info.backing_file, backing, "{images:?}");
            if to != "base" {
                // Nothing of them is needed any more.
                std::fs::remove_file(chain.path("base")).unwrap();
                if images.len() == 3 {
                    std::fs::remove_file(chain.path("middle")).unwrap();
                }
            }
            chain.verify("top");
        }
    }
}

fn backing(file: &str, format: &str) -> BackingName {
    BackingName {
        file: file.into(),
        format: format.into(),
    }
}

/// Rebases `disk`, the top of `chain`, onto `backing` while threads use it, and verifies what it reads then.
fn rebased(mut chain: Chain, disk: LiveDisk, backing: BackingName) {
    let options = RebaseOptions {
        open: unsynced(),
        backing: Some(backing),
        max_last: None,
    };
    chain.during(&disk, 1, || {
        disk.rebase(&options, &mut |_, _| ControlFlow::Continue(()))
            .unwrap()
    });
    disk.close().unwrap();
    drop(disk);
    chain.verify("top");
}

/// What the disk is on shows something else when it is taken for raw.
#[test]
fn a_rebase_onto_the_same_file_in_another_format() {
    let chain = Chain::new(&[(Kind::Internal, SIZE), (Kind::Internal, SIZE)], 1);
    let disk = chain.live();
    rebased(chain, disk, backing("base", "raw"));
}

/// Somebody who does not look at locks has put an image below the disk on another one.
#[test]
fn a_rebase_onto_the_same_file_that_is_on_another() {
    let images = [Kind::Raw, Kind::Internal, Kind::Internal].map(|kind| (kind, SIZE));
    let chain = Chain::new(&images, 1);
    let disk = chain.live();
    let mut unlocked = unsynced();
    unlocked.files.locking = Locking::Off;
    std::fs::write(chain.path("other"), vec![0x55; SIZE as usize]).unwrap();
    let middle = Qcow2::open(&chain.path("middle"), &unlocked).unwrap();
    middle
        .set_backing_name(Some(&backing("other", "raw")))
        .unwrap();
    rebased(chain, disk, backing("middle", "qcow2"));
}
