//! Overlays and what they stand on: stamps of backing files, locks, and who uses an image.

use std::fs;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use tandem_block::ImageFormat;
use tandem_block::qcow2::{Base, OpenOptions, OverlayOptions, OverlayPlace, Qcow2};

use crate::run::{Place, Run, words};

fn run(place: &Place, line: &str) -> Run {
    place.run(&words(line))
}

fn succeeds(place: &Place, line: &str) -> String {
    let run = run(place, line);
    assert_eq!(run.status, Some(0), "{line}: {}", run.stderr);
    assert_eq!(run.stderr, "", "{line}");
    run.stdout
}

fn fails(place: &Place, line: &str, text: &str) {
    let run = run(place, line);
    assert!(run.status.is_some_and(|status| status > 0), "{line}");
    assert!(run.stderr.contains(text), "{line}: {}", run.stderr);
}

/// A base with its data in a file, and an overlay that keeps a stamp.
fn stamped() -> Place {
    let place = Place::tandem();
    place.make("create -q -f qcow2 -o data_file=base.data base 1M");
    place.qemu_io("base", &["write -P 7 0 64k"]);
    succeeds(
        &place,
        "create -q -f qcow2 -b base -F qcow2 -o base_stamp=on over",
    );
    place
}

fn touch(place: &Place, name: &str) {
    let file = fs::File::options().write(true).open(place.path(name));
    let time = UNIX_EPOCH + Duration::from_secs(1000);
    file.unwrap().set_modified(time).unwrap();
}

fn has_stamp(place: &Place) -> bool {
    succeeds(place, "info over").contains("base stamp:")
}

#[test]
fn a_changed_base_is_refused_by_all_that_read_it() {
    let place = stamped();
    succeeds(&place, "check over");
    succeeds(&place, "map over");
    assert!(!succeeds(&place, "info over").contains("changed"));
    // QEMU keeps what it does not know, and clears the bit only when it writes.
    place.make("check over");
    place.make("convert -O raw over copy");
    touch(&place, "base.data");
    let reason = "base.data' was written at 1000.000000000, and last at ";
    for line in [
        "map over",
        "convert -O raw over copy",
        "compare over over",
        "dd if=over of=copy",
        "bench -c 1 over",
        "commit over",
        "resize over 2M",
        "snapshot -c one over",
        "rebase -b '' over",
        "measure -O qcow2 over",
    ] {
        fails(&place, line, reason);
    }
    fails(
        &place,
        "map over",
        "Could not open 'over': backing file 'base' has changed ('/",
    );
    let what_to_do =
        "'tandem-img rebase -u -b base -F qcow2 over' says so; otherwise make a new image";
    fails(&place, "map over", what_to_do);
    for line in [
        "check over",
        "bitmap --add over b",
        "bitmap --remove over b",
        "amend -o lazy_refcounts=on over",
        "check -r all over",
        "map -f qcow2 base",
    ] {
        succeeds(&place, line);
    }
    let told = succeeds(&place, "info over");
    assert!(told.contains("\nbacking file has changed: '/"), "{told}");
    assert!(told.contains("    base stamp:\n        virtual size: 1048576\n        files:\n"));
    let json: serde_json::Value =
        serde_json::from_str(&succeeds(&place, "info --output=json over")).unwrap();
    let changed = json["backing-file-changed"].as_str().unwrap();
    assert!(changed.contains("base.data' was written at 1000.000000000"));
    let stamp = &json["format-specific"]["data"]["base-stamp"];
    assert_eq!(stamp["virtual-size"], 1 << 20);
    assert_eq!(stamp["files"].as_array().unwrap().len(), 2);
    assert_eq!(stamp["files"][1]["length"], 1 << 20);
    // As the message says.
    succeeds(&place, "rebase -u -b base -F qcow2 over");
    succeeds(&place, "map over");
    assert!(has_stamp(&place));
}

#[test]
fn stamps_follow_what_is_done() {
    let place = stamped();
    // What has been written as part of it is not a change.
    place.make("create -q -f qcow2 -b base -F qcow2 other");
    succeeds(&place, "commit -q over");
    assert!(has_stamp(&place));
    succeeds(&place, "map over");
    place.make("create -q -f raw raw 1M");
    succeeds(&place, "rebase -b raw -F raw over");
    assert!(has_stamp(&place));
    touch(&place, "base");
    succeeds(&place, "map over");
    touch(&place, "raw");
    fails(&place, "map over", "raw' was written at 1000");
    // The name of a file that is not there.
    let renamed = run(&place, "rebase -u -b none -F raw over");
    assert_eq!(renamed.status, Some(0));
    let warning = "warning: The image keeps no stamp of its backing file now: Could not open";
    assert!(renamed.stderr.contains(warning), "{}", renamed.stderr);
    assert!(!has_stamp(&place));
    succeeds(&place, "rebase -u -b raw -F raw over");
    assert!(!has_stamp(&place), "nobody has asked for one");
}

#[test]
fn what_qemu_writes_to_ends_its_stamp() {
    for line in ["commit -q over", "rebase -b base.copy -F qcow2 over"] {
        let place = stamped();
        fs::copy(place.path("base"), place.path("base.copy")).unwrap();
        place.make(line);
        assert!(!has_stamp(&place), "{line}");
        succeeds(&place, "map over");
        touch(&place, "base");
        succeeds(&place, "map over");
        succeeds(&place, "check over");
    }
    let place = stamped();
    place.qemu_io("over", &["write -P 8 64k 64k"]);
    assert!(!has_stamp(&place));
}

#[test]
fn a_stamp_needs_a_base_that_can_be_looked_at() {
    let place = Place::tandem();
    place.make("create -q -f raw base 1M");
    let create = "create -q -f qcow2 -o base_stamp=on";
    fails(
        &place,
        &format!("{create} over 1M"),
        "base_stamp=on requires a backing file that is opened",
    );
    fails(
        &place,
        &format!("{create} -u -b base -F raw over 1M"),
        "base_stamp=on requires a backing file that is opened",
    );
    fails(
        &place,
        &format!("{create},compat=0.10 -b base -F raw over"),
        "compatibility level 1.1",
    );
    assert!(!place.path("over").exists());
    let formatting = succeeds(
        &place,
        "create -f qcow2 -b base -F raw -o base_stamp=on over",
    );
    assert!(formatting.contains(" backing_fmt=raw base_stamp=on "));
    succeeds(
        &place,
        "convert -O qcow2 -B over -F qcow2 -o base_stamp=on over copy",
    );
    touch(&place, "base");
    fails(
        &place,
        "map copy",
        "Could not open backing file: backing file 'base' has changed",
    );
    // An image without a stamp is shown as by QEMU.
    place.make("create -q -f qcow2 -b base -F raw plain");
    let expected = place.qemu_img(&words("info plain"));
    assert_eq!(run(&place, "info plain"), expected);
}

/// An overlay of the base `base` that is open in this process.
fn overlay(place: &Place, base: &str, name: &str) -> Qcow2 {
    let base = place.path(base);
    let base = Base::open(&base, ImageFormat::Qcow2, &OpenOptions::default()).unwrap();
    let options = OverlayOptions {
        place: OverlayPlace::Kept {
            path: place.path(name),
            data_file: None,
        },
        ..OverlayOptions::default()
    };
    base.overlay(&options).unwrap()
}

#[test]
fn nothing_below_an_open_overlay_is_written_or_replaced() {
    let place = Place::tandem();
    place.make("create -q -f raw lowest 1M");
    place.make("create -q -f qcow2 -b lowest -F raw base");
    place.make("snapshot -c one base");
    place.make("create -q -f qcow2 -o data_file=data external 1M");
    place.make("create -q -f qcow2 -b base -F qcow2 other");
    place.make("create -q -f qcow2 free 1M");
    for name in ["base", "external"] {
        place.make(&format!("bitmap --add {name} old"));
    }
    // Two on one base, and one on another.
    let disks = [("base", "a"), ("base", "b"), ("external", "c")];
    let disks = disks.map(|(base, name)| overlay(&place, base, name));
    let before = place.content();
    for line in [
        "create -q -f qcow2 base 1M",
        "create -q -f raw base 1M",
        "create -q -f raw lowest 1M",
        "create -q -f raw data 1M",
        "create -q -f qcow2 -o data_file=data new 1M",
        "create -q -f qcow2 -b base -F qcow2 -o data_file=lowest new",
        "commit other",
        "commit -b lowest other",
        "commit base",
        "resize base 2M",
        "resize external 2M",
        "resize -f raw lowest 2M",
        "resize -f raw data 2M",
        "amend -o lazy_refcounts=on base",
        "amend -o size=2M external",
        "rebase -b '' base",
        "rebase -u -b free -F qcow2 base",
        "snapshot -c two base",
        "snapshot -a one base",
        "snapshot -d one base",
        "bitmap --add base new",
        "bitmap --remove base old",
        "bitmap --merge old --add external new",
        "check -r all base",
        "check -r leaks external",
        "convert -O qcow2 free base",
        "convert -n -O qcow2 free base",
        "convert -n -O raw free lowest",
        "convert -n -O qcow2 free external",
        "convert -O raw free data",
        "convert -O qcow2 -o data_file=data free new",
        "dd -O qcow2 if=free of=base",
        "dd -O raw if=free of=data",
        "bench -w -c 1 base",
        "bench -w -c 1 -f raw lowest",
    ] {
        fails(&place, line, "lock");
    }
    for image in [
        "-f qcow2 base",
        "-f qcow2 external",
        "-f raw lowest",
        "-f raw data",
    ] {
        let done = Command::new(env!("CARGO_BIN_EXE_tandem-io"))
            .args(["-c", "write 0 512"])
            .args(words(image))
            .current_dir(place.path(""))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(
            said.contains("lock") && !done.status.success(),
            "{image}: {said}"
        );
    }
    assert!(place.content() == before);
    // Those who only read are welcome.
    for line in [
        "check base",
        "map base",
        "convert -O raw base copy",
        "create -q -f qcow2 -b base -F qcow2 third",
        "map other",
    ] {
        succeeds(&place, line);
    }
    drop(disks);
    succeeds(&place, "resize -q base 2M");
}

#[test]
fn users_are_named() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 base 1M");
    assert!(succeeds(&place, "info --users base").contains("\nusers:\n    "));
    let disk = overlay(&place, "base", "over");
    let pid = std::process::id();
    let command = fs::read_to_string("/proc/self/comm").unwrap();
    let line = |access: &str| format!("    process {pid} ({}): {access}\n", command.trim_end());
    let told = |file: &str| succeeds(&place, &format!("info --users {file}"));
    assert!(told("base").contains(&line("read")));
    // Which is locked.
    assert!(told("over").contains(&line("write")));
    let json = succeeds(&place, "info --users --output=json over");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let users = json["users"]["processes"].as_array().unwrap();
    let user = serde_json::json!({ "pid": pid, "command": command.trim_end(), "access": "write" });
    assert!(users.contains(&user), "{users:?}");
    assert!(json["users"]["unseen"].is_u64());
    drop(disk);
    // A child that another test is starting may have it for a moment.
    let is_free = || !told("over").contains("process");
    assert!((0..1000).any(|_| is_free()), "{}", told("over"));
    assert!(!succeeds(&place, "info base").contains("users"));
}
