//! A copy that is broken off leaves what was there, and nothing that looks whole.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::run::{Place, words};

/// Begins a copy that would take minutes, and waits until it has written something.
fn begin(place: &Place, line: &str) -> Child {
    // Whoever runs tests in the background may have them ignore SIGINT.
    let mut child = Command::new("env")
        .args(["--default-signal", env!("CARGO_BIN_EXE_tandem-img")])
        .args(words(line))
        .current_dir(place.path("."))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while written(&child) < 1 << 20 {
        assert!(child.try_wait().unwrap().is_none(), "{line}: it has ended");
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{line}: nothing happens"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

/// Bytes that the largest file has which the process may write to and nobody else can see, or which
/// has an odd name.
fn written(child: &Child) -> u64 {
    let Ok(open) = fs::read_dir(format!("/proc/{}/fd", child.id())) else {
        return 0;
    };
    let used = open.flatten().filter_map(|entry| {
        let target = fs::read_link(entry.path()).ok()?;
        let target = target.to_string_lossy();
        let is_new = target.ends_with("(deleted)") || target.contains(".tandem-");
        is_new.then(|| fs::metadata(entry.path()).map(|m| m.blocks() * 512))
    });
    used.flatten().max().unwrap_or(0)
}

#[test]
fn old_files_stay() {
    let place = Place::tandem();
    fs::write(place.path("raw"), vec![1; 8 << 20]).unwrap();
    let source = fs::read(place.path("raw")).unwrap();
    let targets = [
        ("-f raw raw", "out"),
        ("-f raw -O qcow2 raw", "out"),
        ("-f raw -O qcow2 -o data_file=out.d raw", "out"),
        (
            "-f raw -O qcow2 -o data_file=out.d,data_file_raw=on raw",
            "out",
        ),
        (
            "-f raw -O qcow2 -o data_file=out.d,data_file_layout=packed raw",
            "out",
        ),
    ];
    for old in [None, Some("old")] {
        for signal in ["KILL", "TERM", "INT"] {
            for (options, target) in targets {
                for name in ["out", "out.d"] {
                    match old {
                        Some(old) => fs::write(place.path(name), old).unwrap(),
                        None => drop(fs::remove_file(place.path(name))),
                    }
                }
                let line = format!("convert -r 100k {options} {target}");
                let mut child = begin(&place, &line);
                let killed = Command::new("kill")
                    .args([format!("-{signal}"), child.id().to_string()])
                    .status();
                assert!(killed.unwrap().success());
                assert!(!child.wait().unwrap().success());
                for name in ["out", "out.d"] {
                    let found = fs::read_to_string(place.path(name)).ok();
                    assert_eq!(found.as_deref(), old, "{signal} {line}: {name}");
                }
                assert!(fs::read(place.path("raw")).unwrap() == source);
            }
        }
    }
}

/// No error on the way leaves anything either.
#[test]
fn nor_does_a_failure_leave_anything() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 damaged 8M");
    place.qemu_io("damaged", &["write -P 1 0 8M"]);
    let mut image = fs::read(place.path("damaged")).unwrap();
    // The entry of the last cluster leads far behind the end of the file.
    image[0x40000 + 127 * 8 + 2] = 0x7f;
    fs::write(place.path("damaged"), image).unwrap();
    fs::write(place.path("out"), "old").unwrap();
    let before = place.content();
    for options in [
        "",
        "-O qcow2",
        "-c -O qcow2",
        "-O qcow2 -o data_file=d",
        "-W -m 4",
    ] {
        let run = place.run(&words(&format!("convert {options} damaged out")));
        assert_eq!(run.status, Some(1), "{options}");
        assert!(run.stderr.contains("error while reading"), "{}", run.stderr);
        assert!(place.content() == before, "{options}");
    }
}
