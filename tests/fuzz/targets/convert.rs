//! Images of all kinds with changes in their structures, converted.
#![no_main]

use std::ffi::OsString;
use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tandem_block::qcow2::{CheckOptions, Info, OpenOptions, Qcow2, check};
use tandem_block::{Disk, Raw, VolatileSlice};
use tandem_fuzz::files::Directory;
use tandem_fuzz::input::Input;
use tandem_fuzz::kinds::{BELOW, KINDS};
use tandem_fuzz::limit::limited;
use tandem_fuzz::places::edit;
use tandem_img::commands::convert;
use tandem_img::getopt::{Name, Outcome, parse};

static DIRECTORY: LazyLock<Directory> = LazyLock::new(Directory::new);

/// Most bytes of a disk that is converted: the target of a larger one takes as long as it is large.
const MAX_SIZE: u64 = 1 << 20;

fn arguments(input: &mut Input<'_>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["-q".into(), "-m".into(), "1".into()];
    let mut add = |text: &str| arguments.extend(text.split(' ').map(OsString::from));
    add(input.choose(&[
        "-f qcow2 -O raw",
        "-f qcow2 -O qcow2",
        "-f qcow2 -O qcow2 -c",
        "-f qcow2 -O qcow2 -o cluster_size=512",
        "-f qcow2 -O qcow2 -o cluster_size=4k,refcount_bits=1",
        "-f qcow2 -O qcow2 -o extended_l2=on,cluster_size=16k",
        "-f qcow2 -O qcow2 -c -o cluster_size=512,compression_type=zstd",
        "-f qcow2 -O qcow2 -o compat=0.10",
        "-f raw -O qcow2 -o cluster_size=512",
    ]));
    let more = [
        "--salvage",
        "-S 0",
        "-S 512",
        "-l snapshot",
        "--bitmaps",
        "--bitmaps --skip-broken-bitmaps",
        "-W",
        "-C",
    ];
    for _ in 0..input.below(4) {
        add(input.choose(&more));
    }
    arguments.push(DIRECTORY.argument("source"));
    arguments.push(DIRECTORY.argument("target"));
    arguments
}

fn read(disk: &dyn Disk) -> Option<Vec<u8>> {
    let mut bytes = vec![0; disk.size() as usize];
    let read = disk.read_at(&[VolatileSlice::from(&mut bytes[..])], 0);
    read.ok().map(|()| bytes)
}

fn content(path: &Path, is_qcow2: bool) -> Option<Vec<u8>> {
    if !is_qcow2 {
        return read(&Raw::open(path, true).ok()?);
    }
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    read(&Qcow2::open(path, &options).ok()?)
}

/// Asserts that the target is clean, and reads as the source.
fn compare(has: impl Fn(&str) -> bool) {
    let (source, target) = (DIRECTORY.path("source"), DIRECTORY.path("target"));
    let is_qcow2 = !has("-O raw");
    if is_qcow2 {
        let report = check(&target, &CheckOptions::default(), &mut |_| {}).unwrap();
        let wrong = report.corruptions + report.leaks + report.check_errors;
        assert!(wrong == 0, "{report:?}");
    }
    if has("--salvage") || has("-l") {
        return;
    }
    let wanted = content(&source, !has("-f raw"));
    // Too long to be told.
    assert!(content(&target, is_qcow2) == wanted, "the content differs");
}

fn run(input: &mut Input<'_>) {
    let kind = input.pick(&KINDS);
    let mut image = kind.image.clone();
    let arguments = arguments(input);
    while !input.is_empty() {
        edit(&mut image, &kind.places, input);
    }
    DIRECTORY.write("source", &image);
    if let Some(data) = &kind.data {
        DIRECTORY.write("data", data);
    }
    let source = DIRECTORY.path("source");
    let is_large = Info::read(&source).is_ok_and(|info| {
        let snapshots = info.snapshots.iter().map(|snapshot| snapshot.disk_size);
        snapshots.chain([info.size]).any(|size| size > MAX_SIZE)
    });
    if is_large {
        return;
    }
    let line: Vec<_> = arguments.iter().filter_map(|text| text.to_str()).collect();
    let line = line.join(" ");
    let has = |text: &str| line.contains(text);
    let name = Name::new("tandem-img".into());
    let parsed = parse(convert::command(), &name, &arguments, false);
    let Ok(Outcome::Run(parsed)) = parsed else {
        panic!("the arguments are good");
    };
    let target = DIRECTORY.path("target");
    match convert::run(&parsed) {
        Ok(()) => compare(has),
        Err(failure) => {
            assert!(failure.message.ends_with('\n'), "{}", failure.message);
            assert!(!target.exists(), "half made: {}", failure.message);
        }
    }
    let _ = std::fs::remove_file(target);
}

fuzz_target!(
    init: {
        LazyLock::force(&KINDS);
        DIRECTORY.write("below", &BELOW);
    },
    |bytes: &[u8]| {
        limited(|| run(&mut Input::new(bytes)));
    }
);
