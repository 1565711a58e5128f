use super::test_common::{SIZE, control};
use super::*;

#[test]
fn disks_are_described() {
    let (control, dir) = control();
    let disks = control.disks();
    let [raw, qcow2] = &disks[..] else {
        panic!("{disks:?}");
    };
    assert_eq!((raw.index, &*raw.name), (0, "vda"));
    assert_eq!(
        (raw.format, raw.kind, &raw.data_file),
        ("raw", "raw", &None)
    );
    assert_eq!((raw.size, raw.read_only, raw.queues), (SIZE, false, 2));
    assert_eq!((qcow2.index, &*qcow2.name, qcow2.queues), (1, "vdb", 3));
    assert_eq!((qcow2.format, qcow2.kind), ("qcow2", "external-raw"));
    assert_eq!(qcow2.path, dir.path().join("b"));
    assert_eq!(qcow2.data_file, Some(dir.path().join("b.data")));
}

#[test]
fn pausing_and_resuming_can_be_repeated() {
    let (control, _dir) = control();
    assert_eq!(control.state(), VmState::Running);
    control.resume().unwrap();
    for _ in 0..2 {
        control.pause().unwrap();
        assert_eq!(control.state(), VmState::Paused);
    }
    control.flush_all().unwrap();
    for _ in 0..2 {
        control.resume().unwrap();
        assert_eq!(control.state(), VmState::Running);
    }
}

#[test]
fn a_disk_shrinks_only_if_it_is_said() {
    let (control, dir) = control();
    let result = control.resize(0, Some(SIZE / 2), false);
    assert!(
        matches!(result, Err(ControlError::WouldShrink { size, present })
            if (size, present) == (SIZE / 2, SIZE))
    );
    for (index, file) in ["a", "b.data"].into_iter().enumerate() {
        assert_eq!(control.disks()[index].size, SIZE);
        control.resize(index, Some(SIZE / 2), true).unwrap();
        assert_eq!(control.disks()[index].size, SIZE / 2);
        control.resize(index, Some(4 * SIZE), false).unwrap();
        assert_eq!(control.disks()[index].size, 4 * SIZE);
        let file = std::fs::metadata(dir.path().join(file)).unwrap();
        assert_eq!(file.len(), 4 * SIZE);
    }
    for index in 0..2 {
        for size in [1 << 63, u64::MAX - 511] {
            let huge = control.resize(index, Some(size), false).unwrap_err();
            assert!(huge.to_string().contains("too large"), "{huge}");
        }
    }
    let odd = control.resize(1, Some(4 * SIZE + 1), false).unwrap_err();
    assert!(odd.to_string().contains("multiple of 512"), "{odd}");
    assert!(odd.to_string().contains("/b': "), "{odd}");
}

#[test]
fn a_raw_disk_follows_its_file() {
    let (control, dir) = control();
    std::fs::write(dir.path().join("a"), vec![1; 3 * SIZE as usize]).unwrap();
    assert_eq!(control.disks()[0].size, SIZE);
    assert_eq!(control.resize(0, None, false).unwrap(), 3 * SIZE);
    assert_eq!(control.disks()[0].size, 3 * SIZE);
    std::fs::write(dir.path().join("a"), [1; 1000]).unwrap();
    let result = control.resize(0, None, false);
    assert!(matches!(
        result,
        Err(ControlError::WouldShrink { size: 1000, .. })
    ));
    assert_eq!(control.resize(0, None, true).unwrap(), 1024);
    let same = control.resize(0, None, false);
    assert_eq!(same.unwrap(), 1024, "though the file has but 1000 bytes");
    let result = control.resize(1, None, false);
    assert!(matches!(result, Err(ControlError::NeedsSize)));
}

#[test]
fn after_the_end_only_questions_are_answered() {
    let (control, _dir) = control();
    control.pause().unwrap();
    control.shut_down();
    control.finish();
    assert_eq!(control.state(), VmState::Ended);
    assert_eq!(control.disks().len(), 2);
    assert_eq!(control.metrics().state, VmState::Ended);
    for result in [
        control.pause(),
        control.resume(),
        control.flush(0),
        control.flush_all(),
        control.resize(0, Some(2 * SIZE), false).map(drop),
        control.resize(0, None, false).map(drop),
    ] {
        assert!(matches!(result, Err(ControlError::Ended)), "{result:?}");
    }
    assert_eq!(control.disks()[0].size, SIZE);
}
