//! Images in use by `qemu-io`, which keeps a lock on them.

use std::io::Read;
use std::process::{Child, Command, Stdio};

use crate::run::{Both, Place};

/// A `qemu-io` that has an image open until this is dropped.
struct User(Child);

impl User {
    fn of(place: &Place, args: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(args)
            .current_dir(place.path(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut prompt = [0; 8];
        let stdout = child.stdout.as_mut().unwrap();
        stdout.read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"qemu-io>");
        Self(child)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Two places with the same files, of which the one that `args` end with is in use in both.
fn in_use(args: &[&str]) -> (Both, [User; 2]) {
    let both = Both::new(|place| {
        place.make("create -q -f raw raw 1M");
        place.make("create -q -f qcow2 -o data_file=data image 1M");
        place.make("create -q -f qcow2 -b image -F qcow2 overlay");
        place.make("create -q -f qcow2 free 1M");
    });
    let users = [User::of(&both.qemu, args), User::of(&both.tandem, args)];
    (both, users)
}

#[test]
fn an_image_that_is_written() {
    let (both, users) = in_use(&["-f", "qcow2", "image"]);
    let before = both.tandem.content();
    for line in [
        "info image",
        "info --output=json image",
        "info -U overlay",
        "check image",
        "bitmap --add image b",
        "measure -O qcow2 image",
        "measure -U -O qcow2 image",
        "bench -c 1 image",
        "dd if=image of=out",
        "dd if=free of=image",
        "map image",
        "map -f qcow2 overlay",
        "resize image 2M",
        "amend -o lazy_refcounts=on image",
        "rebase -u -b raw -F raw image",
        "rebase -b '' overlay",
        "rebase -b image -F qcow2 free",
        "commit overlay",
        "create -q -f qcow2 image 1M",
        "create -q -f raw image 1M",
        "create -q -f qcow2 -o data_file=data other 1M",
        "convert image copy",
        "convert -O qcow2 free image",
        "convert -O raw free image",
        "check -U image",
        "check --force-share image",
        "map -U --output=json image",
    ] {
        both.same(line);
    }
    assert!(both.tandem.content() == before);
    let shown = both.tandem.run(&["info", "-U", "image"]);
    assert_eq!(shown.status, Some(0), "{}", shown.stderr);
    both.same("create -q -f qcow2 -b image -F qcow2 new");
    drop(users);
    both.same("check image");
    both.same("resize image 2M");
}

#[test]
fn an_image_that_is_read() {
    let (both, _users) = in_use(&["-r", "-f", "qcow2", "image"]);
    for line in [
        "check image",
        "map overlay",
        "convert overlay copy",
        "resize image 2M",
        "amend -o lazy_refcounts=on image",
        "amend -o size=2M image",
        "rebase -u -b raw -F raw image",
        "commit overlay",
        "commit -d -b image overlay",
        "rebase -b image -F qcow2 free",
        "rebase -b '' overlay",
        "create -q -f qcow2 image 1M",
        "convert -O qcow2 free image",
    ] {
        both.same(line);
    }
    both.same_bytes("copy");
}

#[test]
fn a_raw_disk_that_is_written() {
    let (both, _users) = in_use(&["-f", "raw", "raw"]);
    for line in [
        "map -f raw raw",
        "map --output=json raw",
        "convert -f raw raw copy",
        "convert -U -f raw raw copy",
    ] {
        both.same(line);
    }
    let info = both.tandem.run(&["info", "raw"]);
    assert_eq!(info.status, Some(0), "{}", info.stderr);
}

#[test]
fn cache_modes() {
    let both = Both::new(|place| {
        place.make("create -q -f qcow2 -o data_file=data image 1M");
        place.qemu_io("image", &["write -P 7 3k 5k"]);
    });
    for mode in [
        "writeback",
        "none",
        "writethrough",
        "directsync",
        "unsafe",
        "off",
        "no",
        "",
    ] {
        let run = |line: String| {
            let words: Vec<_> = line.split(' ').collect();
            let [expected, found] = both.each(|place| place.run(&words));
            assert_eq!(found, expected, "{line}");
        };
        run(format!("check -T {mode} image"));
        run(format!("amend -t {mode} -o lazy_refcounts=on image"));
        run(format!("convert -T {mode} -O raw image copy"));
        run(format!("convert -t {mode} -O raw image copy"));
        run(format!(
            "convert -t {mode} -T {mode} -O qcow2 image copy.qcow2"
        ));
        both.same("check copy.qcow2");
        // With a mode that there is not, QEMU has emptied the copy already.
        if mode != "no" && !mode.is_empty() {
            both.same_bytes("copy");
        }
    }
}
