use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tandem_block::qcow2::{Info, OpenOptions, Qcow2};
use tandem_block::{Disk, VolatileSlice};

use crate::control::Control;
use crate::control::protocol::answer;
use crate::control::test_common::{SIZE, control};

fn ask(control: &Control, request: Value) -> Value {
    let line = answer(control, request.to_string().as_bytes(), &mut Vec::new());
    serde_json::from_str(&line).unwrap()
}

/// What has gone wrong with `request`.
fn error(control: &Control, request: Value) -> String {
    let answer = ask(control, request);
    let message = answer["error"]["message"].as_str();
    message.unwrap_or_else(|| panic!("{answer}")).to_owned()
}

/// Waits until the job that `request` begins is over.
fn job(control: &Control, request: Value) -> Value {
    let started = ask(control, request);
    let id = &started["ok"]["job"];
    assert!(id.is_u64(), "{started}");
    loop {
        let answer = ask(control, json!({"command": "jobs"}));
        let jobs = answer["ok"]["jobs"].as_array().unwrap();
        let job = jobs.iter().find(|job| job["job"] == *id).unwrap();
        if job["state"] != "running" {
            return job.clone();
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Has the disk number `index` hold `byte` in its first sector.
fn write(control: &Control, index: usize, byte: u8) {
    let disk = control.0.disks[index].handle.disk();
    let mut data = [byte; 512];
    disk.write_at(&[VolatileSlice::from(&mut data[..])], 0)
        .unwrap();
}

fn first_byte(disk: &dyn Disk) -> u8 {
    let mut data = [0xee; 512];
    disk.read_at(&[VolatileSlice::from(&mut data[..])], 0)
        .unwrap();
    data[0]
}

fn shown(control: &Control, index: usize) -> u8 {
    first_byte(&*control.0.disks[index].handle.disk())
}

#[test]
fn disks_are_forked_and_committed() {
    let (control, dir) = control();
    for (disk, (name, kind)) in [("a", "raw"), ("b", "external-raw")]
        .into_iter()
        .enumerate()
    {
        let path = |suffix: &str| dir.path().join(format!("{name}{suffix}"));
        write(&control, disk, 1);
        let request =
            json!({"command": "fork", "disk": disk, "overlay": path(".1"), "fork": path(".2")});
        let answer = ask(&control, request.clone());
        assert!(answer["ok"]["stopped_us"].is_u64(), "{answer}");
        assert_eq!(answer["ok"].get("warning"), Some(&Value::Null));
        let info = ask(&control, json!({"command": "disks"}))["ok"]["disks"][disk].clone();
        let told = json!([path(".1"), "qcow2", "internal", null, SIZE, false]);
        let found = ["path", "format", "kind", "data_file", "size", "read_only"];
        assert_eq!(json!(found.map(|key| &info[key])), told);
        let again = error(&control, request);
        assert!(again.contains(".1' exists already"), "{again}");

        write(&control, disk, 2);
        let other = Qcow2::open(&path(".2"), &OpenOptions::default()).unwrap();
        assert_eq!(first_byte(&other), 1);
        let in_use = json!({"command": "commit", "disk": disk, "pivot": true});
        let in_use = job(&control, in_use);
        assert_eq!(in_use["state"], "failed", "{in_use}");
        let reason = in_use["error"].as_str().unwrap();
        assert!(reason.contains("lock"), "{reason}");
        drop(other);

        for base in [Value::Null, json!(0), json!(path(""))] {
            let mut request = json!({"command": "commit", "disk": disk});
            if !base.is_null() {
                request["base"] = base;
            }
            let done = job(&control, request);
            assert_eq!(done["state"], "done", "{done}");
            assert_eq!(
                (&done["kind"], &done["disk"]),
                (&json!("commit"), &json!(format!("vd{name}")))
            );
            assert!(
                done["stopped_us"].is_u64() && done["done"] == done["total"],
                "{done}"
            );
            // What there is nothing to tell of is there all the same, as everywhere.
            let none = ["warning", "error", "error_kind"].map(|key| done.get(key));
            assert_eq!(none, [Some(&Value::Null); 3]);
            assert_eq!(shown(&control, disk), 2);
        }
        let done = job(
            &control,
            json!({"command": "commit", "disk": disk, "pivot": true}),
        );
        assert_eq!(done["state"], "done", "{done}");
        assert_eq!(shown(&control, disk), 2);
        let info = ask(&control, json!({"command": "disks"}))["ok"]["disks"][disk].clone();
        assert_eq!(json!([info["path"], info["kind"]]), json!([path(""), kind]));
    }
}

#[test]
fn a_disk_can_come_to_stand_alone() {
    let (control, dir) = control();
    let path = |name: &str| dir.path().join(name);
    let fork = json!({"command": "fork", "disk": "vdb", "overlay": path("c"), "fork": path("d")});
    write(&control, 1, 5);
    ask(&control, fork);
    let rebase = json!({"command": "rebase", "disk": "vdb", "backing": "b", "format": "qcow2"});
    assert_eq!(job(&control, rebase)["state"], "done");
    assert!(Info::read(&path("d")).unwrap().backing_file.is_some());
    let alone = json!({"command": "rebase", "disk": "vdb", "backing": "", "max_last": "1M"});
    let done = job(&control, alone);
    assert_eq!(done["state"], "done", "{done}");
    assert_eq!(shown(&control, 1), 5);
    control.0.disks[1].handle.disk().close().unwrap();
    let read_only = tandem_block::qcow2::OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    assert!(Qcow2::open(&path("b"), &read_only).is_ok());
    drop(control);
    assert_eq!(Info::read(&path("c")).unwrap().backing_file, None);
}

#[test]
fn what_cannot_be_is_refused() {
    let (control, dir) = control();
    let path = |name: &str| dir.path().join(name);
    let wrong = [
        (json!({"command": "commit"}), "missing field `disk`"),
        (
            json!({"command": "commit", "disk": "vdz"}),
            "there is no disk",
        ),
        (
            json!({"command": "commit", "disk": 0, "base": []}),
            "neither a path nor",
        ),
        (
            json!({"command": "commit", "disk": 0, "base": path("x")}),
            "could not find",
        ),
        (
            json!({"command": "commit", "disk": 0, "base": path("b")}),
            "is not below",
        ),
        (
            json!({"command": "rebase", "disk": 0, "backing": "x"}),
            "raw or qcow2",
        ),
        (
            json!({"command": "rebase", "disk": 0, "backing": "x", "format": "vmdk"}),
            "'vmdk'",
        ),
        (
            json!({"command": "rebase", "disk": 0, "backing": "", "format": "raw"}),
            "no backing file",
        ),
        (
            json!({"command": "fork", "disk": 0, "overlay": path("o")}),
            "missing field `fork`",
        ),
        (
            json!({"command": "fork", "disk": 0, "overlay": path("b"), "fork": path("o")}),
            "exists",
        ),
        (
            json!({"command": "fork", "disk": 0, "overlay": path("o"), "fork": path("b")}),
            "exists",
        ),
        (
            json!({"command": "fork", "disk": 0, "overlay": path("o"), "fork": path("o")}),
            "exists",
        ),
        (
            json!({"command": "fork", "disk": 0, "overlay": path("o"), "fork": path("n/o")}),
            "/n'",
        ),
        (
            json!({"command": "job-cancel", "job": 77}),
            "there is no job 77",
        ),
    ];
    for (request, reason) in wrong {
        let message = error(&control, request.clone());
        assert!(message.contains(reason), "{request}: {message}");
    }
    assert!(!path("o").exists());
    let raw = job(&control, json!({"command": "commit", "disk": 0}));
    assert!(raw["error"].as_str().unwrap().contains("raw disk"), "{raw}");
    assert_eq!(raw["error_kind"], "disk");
    let none = job(&control, json!({"command": "commit", "disk": 1}));
    assert!(
        none["error"].as_str().unwrap().contains("no image below"),
        "{none}"
    );
    let raw_data = json!({"command": "rebase", "disk": 1, "backing": "a", "format": "raw"});
    let refused = job(&control, raw_data);
    assert!(
        refused["error"].as_str().unwrap().contains("data-file-raw"),
        "{refused}"
    );
    // A directory from which the image is not followed.
    std::fs::create_dir(path("sub")).unwrap();
    let elsewhere =
        json!({"command": "fork", "disk": 1, "overlay": path("sub/o"), "fork": path("p")});
    let message = error(&control, elsewhere);
    assert!(
        message.contains("outside the image's directory"),
        "{message}"
    );
    assert!(!path("sub/o").exists() && !path("p").exists());
    assert_eq!(shown(&control, 1), 0);
    control.shut_down();
    let ended = error(&control, json!({"command": "commit", "disk": 1}));
    assert!(ended.contains("has ended"), "{ended}");
}

/// However many a client asks for, there is one thread for each disk.
#[test]
fn a_disk_has_one_job_at_a_time() {
    let (control, _dir) = control();
    let (started, go_on) = (Barrier::new(2), Barrier::new(2));
    let [started, go_on] = [started, go_on].map(Arc::new);
    let waits = [started.clone(), go_on.clone()];
    let operation = move |_: tandem_block::Progress<'_>| {
        for barrier in &waits {
            barrier.wait();
        }
        Err(tandem_block::Error::Cancelled)
    };
    control.start_job("commit", 0, operation).unwrap();
    started.wait();
    let rebase = |disk: usize| json!({"command": "rebase", "disk": disk, "backing": ""});
    let busy = ask(&control, rebase(0))["error"].take();
    assert_eq!(busy["kind"], "busy");
    let message = busy["message"].as_str().unwrap();
    assert!(
        message.starts_with("job 1 is under way on disk vda"),
        "{message}"
    );
    assert_eq!(control.jobs().len(), 1);
    assert_eq!(job(&control, rebase(1))["state"], "done");
    go_on.wait();
    while control.jobs()[0].state == "running" {
        thread::yield_now();
    }
    assert_eq!(control.jobs()[0].state, "cancelled");
    assert_eq!(job(&control, rebase(0))["job"], 3);
}

/// A mistake in the program ends a job, but not what is said about it.
#[test]
fn a_job_that_panics_has_failed() {
    let (control, _dir) = control();
    for (text, operation) in [
        (
            "of all",
            (|_| panic!("of all")) as fn(tandem_block::Progress<'_>) -> _,
        ),
        ("no 7", |_| panic!("no {}", 7)),
    ] {
        control.start_job("commit", 0, operation).unwrap();
        while control.jobs().last().unwrap().state == "running" {
            thread::yield_now();
        }
        let job = control.jobs().pop().unwrap();
        assert_eq!((job.state, job.error_kind), ("failed", Some("panic")));
        let said = job.error.unwrap();
        assert!(said.ends_with(&format!("on disk vda: {text}")), "{said}");
    }
    control.shut_down();
    control.finish();
}

#[test]
fn the_last_jobs_are_remembered() {
    let (control, _dir) = control();
    for _ in 0..40 {
        job(&control, json!({"command": "commit", "disk": 0}));
    }
    let jobs = control.jobs();
    assert_eq!(jobs.len(), 16);
    assert_eq!(jobs.last().unwrap().job, 40);
    control.cancel_job(40).unwrap();
    assert_eq!(
        control.jobs().last().unwrap().state,
        "failed",
        "it was over"
    );
}
