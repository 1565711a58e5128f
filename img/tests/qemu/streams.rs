//! Standard error that cannot be written.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use crate::run::{Place, words};

const IMG: &str = env!("CARGO_BIN_EXE_tandem-img");
const IO: &str = env!("CARGO_BIN_EXE_tandem-io");

/// The exit status of `program`, whose messages go to `stderr`.
fn status(place: &Place, program: &str, args: &[&str], stderr: Stdio) -> Option<i32> {
    let mut command = Command::new(program);
    command.args(args).current_dir(place.path(""));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(stderr).status().unwrap().code()
}

fn full() -> Stdio {
    File::create("/dev/full").unwrap().into()
}

/// A pipe that nobody reads.
fn deserted() -> Stdio {
    let mut reader = Command::new("true").stdin(Stdio::piped()).spawn().unwrap();
    let pipe = reader.stdin.take().unwrap();
    reader.wait().unwrap();
    pipe.into()
}

#[test]
fn a_failure_keeps_its_status() {
    let place = Place::tandem();
    for stderr in [full, deserted] {
        for (program, line, expected) in [
            (IMG, "info missing", 1),
            (IMG, "compare missing missing", 2),
            (IO, "-c length missing", 1),
            (IO, "-c nonsense", 1),
        ] {
            let found = status(&place, program, &words(line), stderr());
            assert_eq!(found, Some(expected), "{line}");
        }
    }
}

#[test]
fn work_goes_on_behind_a_warning() {
    let place = Place::tandem();
    fs::write(place.path("raw"), [7; 4096]).unwrap();
    place.make("create -q -f qcow2 image 1M");
    for stderr in [full, deserted] {
        let args = words("dd if=raw of=copy skip=100");
        assert_eq!(status(&place, IMG, &args, stderr()), Some(0));
        assert_eq!(fs::read(place.path("copy")).unwrap(), b"");
        fs::remove_file(place.path("copy")).unwrap();
        // The first command fails, and says so.
        let args = ["-c", "nonsense", "-c", "write -P 5 0 64k", "image"];
        assert_eq!(status(&place, IO, &args, stderr()), Some(1));
        place.qemu_io("image", &["read -P 5 0 64k", "write -z 0 64k"]);
    }
}
