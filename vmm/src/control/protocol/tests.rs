use super::*;
use crate::control::test_common::{SIZE, control};

pub fn ask(control: &Control, request: &str) -> Value {
    let line = answer(control, request.as_bytes(), &mut Vec::new());
    let (last, text) = line.as_bytes().split_last().unwrap();
    assert_eq!(*last, b'\n');
    assert!(!text.contains(&b'\n'), "{line}");
    serde_json::from_slice(text).unwrap()
}

/// The kind and the message of the error that answers `request`.
pub fn error(control: &Control, request: &str) -> (String, String) {
    let answer = ask(control, request);
    assert_eq!(answer.get("ok"), None, "{answer}");
    let text = |key: &str| answer["error"][key].as_str().unwrap().to_owned();
    (text("kind"), text("message"))
}

#[test]
fn the_id_comes_back_as_it_is() {
    let (control, _dir) = control();
    for id in ["1", "\"x\"", "null", "[1,{\"a\":2}]"] {
        let id: Value = id.parse().unwrap();
        let good = json!({"command": "resume", "id": id});
        let expected = json!({"id": id, "ok": {"state": "running"}});
        assert_eq!(ask(&control, &good.to_string()), expected);
        let bad = json!({"id": id, "command": "fly"});
        assert_eq!(ask(&control, &bad.to_string())["id"], id);
    }
    // To its last digit.
    let number = r#"{"id":0.9348931239306407,"#;
    let line = answer(
        &control,
        format!("{number}\"command\":\"resume\"}}").as_bytes(),
        &mut Vec::new(),
    );
    assert!(line.starts_with(number), "{line}");
    let answer = ask(&control, r#"{"command":"resume"}"#);
    assert_eq!(answer, json!({"ok": {"state": "running"}}));
}

#[test]
fn states() {
    let (control, _dir) = control();
    for (command, state) in [
        ("pause", "paused"),
        ("pause", "paused"),
        ("resume", "running"),
        ("pause", "paused"),
        ("shutdown", "ended"),
    ] {
        let request = json!({"command": command}).to_string();
        assert_eq!(ask(&control, &request), json!({"ok": {"state": state}}));
        let status = ask(&control, r#"{"command":"status"}"#);
        assert_eq!(status["ok"]["state"], state);
        assert_eq!(status["ok"]["cpus"], 2);
        assert_eq!(status["ok"]["memory"], 8 << 20);
        assert_eq!(status["ok"]["disks"], 2);
    }
    assert_eq!(error(&control, r#"{"command":"flush"}"#).0, "ended");
}

#[test]
fn disks_and_metrics() {
    let (control, dir) = control();
    let disks = ask(&control, r#"{"command":"disks"}"#);
    let path = |name| dir.path().join(name).display().to_string();
    assert_eq!(
        disks["ok"]["disks"][1],
        json!({
            "index": 1, "name": "vdb", "path": path("b"), "format": "qcow2", "kind": "external-raw",
            "data_file": path("b.data"), "size": SIZE, "read_only": false, "write_cache": true,
            "queues": 3,
        })
    );
    let metrics = &ask(&control, r#"{"command":"metrics"}"#)["ok"];
    assert_eq!(metrics["state"], "running");
    let disk = &metrics["disks"][1];
    assert_eq!((&disk["name"], &disk["index"]), (&json!("vdb"), &json!(1)));
    assert_eq!(disk["queues"].as_array().unwrap().len(), 3);
    assert_eq!(disk["total"]["written_bytes"], 0);
    assert_eq!(disk["last_error"], Value::Null);
}

#[test]
fn flushes() {
    let (control, _dir) = control();
    for disk in ["", r#","disk":"vda""#, r#","disk":1"#, r#","disk":null"#] {
        let request = format!(r#"{{"command":"flush"{disk}}}"#);
        assert_eq!(ask(&control, &request), json!({"ok": {}}), "{request}");
    }
}

#[test]
fn resizes() {
    let (control, dir) = control();
    for (arguments, size) in [
        (r#""disk":"vdb","size":2097152"#, 2 << 20),
        (r#""disk":1,"size":"4M""#, 4 << 20),
        (r#""disk":"vda","size":"512K","shrink":true"#, 512 << 10),
    ] {
        let request = format!(r#"{{"command":"resize",{arguments}}}"#);
        assert_eq!(ask(&control, &request), json!({"ok": {"size": size}}));
    }
    std::fs::write(dir.path().join("a"), vec![0; 2 << 20]).unwrap();
    let request = r#"{"command":"resize","disk":"vda"}"#;
    assert_eq!(ask(&control, request), json!({"ok": {"size": 2 << 20}}));
    assert_eq!(control.disks()[0].size, 2 << 20);

    for (arguments, kind, message) in [
        (r#""disk":"vdb","size":"1M""#, "would-shrink", "4194304"),
        (r#""disk":"vdb""#, "needs-size", "no block device"),
        (r#""disk":"vdb","size":4194305"#, "disk", "multiple of 512"),
        (
            r#""disk":"vdc","size":1"#,
            "no-such-disk",
            "no disk \"vdc\"",
        ),
        (r#""disk":2,"size":1"#, "no-such-disk", "no disk 2"),
        (r#""disk":-1,"size":1"#, "no-such-disk", "no disk -1"),
        (
            r#""disk":[],"size":1"#,
            "bad-argument",
            "disk: [] is neither",
        ),
        (
            r#""disk":0,"size":"1""#,
            "bad-argument",
            "size: \"1\" is neither",
        ),
        (
            r#""disk":0,"size":-1"#,
            "bad-argument",
            "size: -1 is neither",
        ),
        (
            r#""disk":0,"size":1e30"#,
            "bad-argument",
            "size: 1e+30 is neither",
        ),
        (r#""size":1"#, "bad-argument", "missing field `disk`"),
        (r#""disk":0,"size":1,"x":1"#, "bad-argument", "`x`"),
        (r#""disk":0,"size":1,"shrink":1"#, "bad-argument", "boolean"),
    ] {
        let request = format!(r#"{{"command":"resize",{arguments}}}"#);
        let (found, text) = error(&control, &request);
        assert_eq!(found, kind, "{request}: {text}");
        assert!(text.contains(message), "{request}: {text}");
    }
    assert_eq!(control.disks()[1].size, 4 << 20);
}

#[test]
fn each_command_that_is_told_of_is_known() {
    let (control, _dir) = control();
    for command in COMMANDS {
        let answer = ask(&control, &json!({"command": command}).to_string());
        assert_ne!(answer["error"]["kind"], "unknown-command", "{command}");
    }
    let (_, text) = error(&control, r#"{"command":"fly"}"#);
    assert!(text.contains("'fly'; known are status, disks, "), "{text}");
    assert!(text.ends_with(", backup-read and backup-end"), "{text}");
}

#[test]
fn what_is_no_request_gets_an_error() {
    let (control, _dir) = control();
    let deep = "[".repeat(60_000);
    for (request, kind) in [
        ("x", "bad-request"),
        ("{", "bad-request"),
        ("[1]", "bad-request"),
        (r#"{"command":"status"} {"#, "bad-request"),
        (&deep, "bad-request"),
        ("{}", "bad-request"),
        (r#"{"command":1}"#, "bad-request"),
        (r#"{"command":""}"#, "unknown-command"),
        (r#"{"command":"Status"}"#, "unknown-command"),
        (r#"{"command":"status","disk":0}"#, "bad-argument"),
        (r#"{"command":"shutdown","now":true}"#, "bad-argument"),
    ] {
        assert_eq!(error(&control, request).0, kind, "{request}");
    }
    let not_text = answer(&control, b"{\"command\":\"\xff\"}", &mut Vec::new());
    assert!(not_text.contains("bad-request"), "{not_text}");
    assert_eq!(control.state(), crate::control::VmState::Running);
}
