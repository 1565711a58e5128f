//! A part of the faults that the command injects, which takes seconds.

use tandem_block::ImageFormat;
use tandem_block::qcow2::{Base, CreateOptions, OpenOptions, OverlayOptions, OverlayPlace, create};
use tandem_crash::faults::{Injected, SETUPS, explore};
use tandem_crash::live_faults;
use tandem_crash::setup::scratch;
use tandem_crash::syscalls::at_each_call;

#[test]
fn any_call_may_fail() {
    let mut injected = Injected::default();
    for setup in SETUPS {
        explore(&setup, 5, &mut injected).unwrap_or_else(|problem| panic!("{problem}"));
    }
    println!("{injected}");
    assert!(injected.faults > 500 && injected.syncs > 50);
}

#[test]
fn any_call_may_fail_in_operations_on_disks_in_use() {
    let mut injected = Injected::default();
    live_faults::explore(13, &mut injected).unwrap_or_else(|problem| panic!("{problem}"));
    println!("{injected}");
    assert!(injected.faults > 100 && injected.syncs > 20);
}

/// The first overlay that is kept has the base synced, whose stamp it keeps; nothing else is.
#[test]
fn overlays_are_made_without_syncs() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    create(&path("base"), &CreateOptions::default()).unwrap();
    let kept = |name| OverlayPlace::Kept {
        path: path(name),
        data_file: None,
    };
    let temporary = OverlayOptions::default().place;
    for (places, expected) in [
        (vec![temporary.clone(), temporary.clone()], 0),
        (vec![kept("one"), temporary, kept("two")], 1),
    ] {
        let mut syncs = 0;
        let make = || {
            let base = Base::open(&path("base"), ImageFormat::Qcow2, &OpenOptions::default());
            let base = base.unwrap();
            let make_one = |place| {
                let options = OverlayOptions {
                    place,
                    ..OverlayOptions::default()
                };
                base.overlay(&options).unwrap()
            };
            places.into_iter().map(make_one).collect::<Vec<_>>()
        };
        // To close them syncs what is kept.
        let open = at_each_call(make, |number, _| {
            syncs += usize::from(matches!(number, libc::SYS_fsync | libc::SYS_fdatasync));
        });
        assert_eq!(syncs, expected);
        drop(open);
    }
}
