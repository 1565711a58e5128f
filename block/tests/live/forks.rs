//! Forks.

use super::*;

#[test]
fn both_sides_of_a_fork_have_what_the_disk_had() {
    use Kind::*;
    for (seed, kind) in (1..).zip([
        Raw,
        Internal,
        Subclusters,
        Version2,
        External,
        RawData,
        Packed,
    ]) {
        let mut chain = Chain::new(&[(kind, SIZE)], seed);
        let disk = chain.live();
        chain.during(&disk, seed, || {
            for i in 0..3 {
                let options = ForkOptions {
                    open: unsynced(),
                    overlay: chain_path(&disk, &format!("overlay{i}")),
                    fork: chain_path(&disk, &format!("fork{i}")),
                };
                disk.fork(&options).unwrap();
                // The other side is used at once, and each has its own.
                let fork = open(&options.fork);
                write(&*fork, 0, &[i; 4096]);
                fork.close().unwrap();
                disk.with_image(|image| assert_eq!(image.path(), options.overlay));
            }
        });
        // A side that nothing has happened to, and so the disk at that instant.
        let options = ForkOptions {
            open: unsynced(),
            overlay: chain.path("overlay3"),
            fork: chain.path("fork3"),
        };
        disk.fork(&options).unwrap();
        let at_the_fork = chain.model.clone();
        chain.during(&disk, seed, || ());
        for i in 0..3 {
            let fork = open(&chain.path(&format!("fork{i}")));
            assert!(read(&*fork, 0, 4096) == [i; 4096]);
        }
        let fork = open(&options.fork);
        assert!(read(&*fork, 0, SIZE) == at_the_fork);
        let refused = Qcow2::open(&chain.path("overlay2"), &unsynced());
        assert!(matches!(refused, Err(Error::Locked { .. })));
        disk.flush().unwrap();
        disk.close().unwrap();
        drop((disk, fork));
        chain.verify("overlay3");
        chain.model = at_the_fork;
        chain.verify("fork3");
    }
}

/// A fork is made of the disk as large as it is at the instant of the fork, or not at all.
#[test]
fn a_fork_while_the_size_changes() {
    let chain = Chain::new(&[(Kind::Internal, SIZE)], 21);
    let disk = chain.live();
    for i in 1..=8 {
        let options = ForkOptions {
            open: unsynced(),
            overlay: chain.path(&format!("overlay{i}")),
            fork: chain.path(&format!("fork{i}")),
        };
        let size = SIZE + i * 512;
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                // The first of the two has been made.
                while !options.overlay.exists() && !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
                disk.resize(size).unwrap();
            });
            let _over = Stop(&over);
            if disk.fork(&options).is_err() {
                assert!(!options.overlay.exists() && !options.fork.exists());
            }
        });
        assert_eq!(disk.size(), size);
    }
}

#[test]
fn stamps_stay_right() {
    let mut chain = Chain::new(&[(Kind::Internal, SIZE)], 5);
    let disk = chain.live();
    let fork = ForkOptions {
        open: unsynced(),
        overlay: chain.path("overlay"),
        fork: chain.path("fork"),
    };
    disk.fork(&fork).unwrap();
    chain.during(&disk, 2, || commit(&disk, 0, false).unwrap());
    disk.close().unwrap();
    drop(disk);
    chain.verify("overlay");
    // The other side stands on what has changed, and says so.
    let changed = Qcow2::open(&fork.fork, &unsynced()).map(drop).unwrap_err();
    assert!(matches!(changed, Error::BaseChanged { .. }), "{changed}");
}

/// A fork whose images, once they are opened by their names, would show something else is refused.
#[test]
fn a_fork_is_on_what_the_disk_is_on() {
    let chain = Chain::new(&[(Kind::Internal, SIZE), (Kind::External, SIZE)], 7);
    std::fs::copy(chain.path("top.data"), chain.path("aside")).unwrap();
    let other_data = OpenOptions {
        data_file: Some(chain.path("aside")),
        ..unsynced()
    };
    let nothing_below = OpenOptions {
        backing: Backing::Nothing,
        ..unsynced()
    };
    for (open, is_refused) in [
        (other_data, true),
        (nothing_below, true),
        (unsynced(), false),
    ] {
        let disk = LiveDisk::new(Qcow2::open(&chain.path("top"), &open).unwrap());
        let fork = ForkOptions {
            open,
            overlay: chain.path("overlay"),
            fork: chain.path("fork"),
        };
        match disk.fork(&fork) {
            Ok(_) => assert!(!is_refused),
            Err(error) => {
                assert!(
                    is_refused && error.to_string().contains("its data file, or what is"),
                    "{error}"
                );
                assert!(!fork.overlay.exists() && !fork.fork.exists());
            }
        }
        disk.close().unwrap();
    }
}
