use std::sync::Arc;

use tandem_block::{Disk, VolatileSlice};

use super::*;
use crate::control::protocol::tests::{ask, error};
use crate::control::test_common::control;

/// Has the guest write to the first byte of the block number `block` of 64 KiB.
fn write(control: &Control, block: u64) {
    let disk = Arc::clone(&control.operated()[1].image.disk);
    let mut bytes = [1];
    disk.write_at(&[VolatileSlice::from(&mut bytes[..])], block << 16)
        .unwrap();
}

/// Has the VM carry out what must succeed, on the qcow2 disk.
fn change(control: &Control, command: &str, arguments: &Value) {
    let mut request = json!({"command": command, "disk": "vdb"});
    for (key, value) in arguments.as_object().unwrap() {
        request[key] = value.clone();
    }
    assert_eq!(ask(control, &request.to_string()), json!({"ok": {}}));
}

fn bitmaps(control: &Control) -> Value {
    ask(control, r#"{"command":"bitmaps","disk":"vdb"}"#)["ok"]["bitmaps"].take()
}

fn shown(name: &str, enabled: bool, blocks: u64) -> Value {
    json!({
        "name": name, "granularity": 65536, "enabled": enabled, "in_use": false,
        "dirty": blocks << 16,
    })
}

#[test]
fn each_command() {
    let (control, _dir) = control();
    assert_eq!(bitmaps(&control), json!([]));
    change(&control, "bitmap-add", &json!({"name": "a"}));
    write(&control, 0);
    let add = json!({"name": "b", "granularity": "64K", "disabled": true});
    change(&control, "bitmap-add", &add);
    write(&control, 1);
    assert_eq!(
        bitmaps(&control),
        json!([shown("a", true, 2), shown("b", false, 0)])
    );
    change(&control, "bitmap-enable", &json!({"name": "b"}));
    change(&control, "bitmap-disable", &json!({"name": "a"}));
    write(&control, 2);
    assert_eq!(
        bitmaps(&control),
        json!([shown("a", false, 2), shown("b", true, 1)])
    );
    let add = json!({"name": "c", "granularity": 65536});
    change(&control, "bitmap-add", &add);
    change(
        &control,
        "bitmap-merge",
        &json!({"target": "c", "sources": ["a", "b"]}),
    );
    change(&control, "bitmap-clear", &json!({"name": "b"}));
    change(&control, "bitmap-remove", &json!({"name": "a"}));
    assert_eq!(
        bitmaps(&control),
        json!([shown("b", true, 0), shown("c", true, 3)])
    );
}

#[test]
fn a_transaction_is_carried_out_or_not() {
    let (control, _dir) = control();
    change(&control, "bitmap-add", &json!({"name": "a"}));
    write(&control, 0);
    let actions = json!([
        {"command": "bitmap-disable", "name": "a"},
        {"command": "bitmap-add", "name": "b"},
        {"command": "bitmap-merge", "target": "b", "sources": ["a"]},
    ]);
    let mut bad = actions.clone();
    let last = json!({"command": "bitmap-remove", "name": "c"});
    bad.as_array_mut().unwrap().push(last);
    let request = json!({"command": "bitmap-transaction", "disk": 1, "actions": bad});
    let (kind, text) = error(&control, &request.to_string());
    assert_eq!(kind, "disk");
    assert!(text.ends_with("Dirty bitmap 'c' not found"), "{text}");
    assert_eq!(bitmaps(&control), json!([shown("a", true, 1)]));
    change(&control, "bitmap-transaction", &json!({"actions": actions}));
    write(&control, 1);
    assert_eq!(
        bitmaps(&control),
        json!([shown("a", false, 1), shown("b", true, 2)])
    );
}

#[test]
fn mistakes() {
    let (control, dir) = control();
    let before = std::fs::read(dir.path().join("b")).unwrap();
    for (request, kind, message) in [
        (r#""bitmaps""#, "bad-argument", "missing field `disk`"),
        (r#""bitmaps","disk":"vdz""#, "no-such-disk", "vdz"),
        (r#""bitmaps","disk":0"#, "disk", "data_file_reuse=keep"),
        (
            r#""bitmap-add","disk":0,"name":"a""#,
            "disk",
            "raw disk has no place",
        ),
        (
            r#""bitmap-add","name":"a""#,
            "bad-argument",
            "missing field `disk`",
        ),
        (
            r#""bitmap-add","disk":1"#,
            "bad-argument",
            "missing field `name`",
        ),
        (
            r#""bitmap-add","disk":1,"name":"""#,
            "disk",
            "cannot be empty",
        ),
        (
            r#""bitmap-add","disk":1,"name":"a","granularity":513"#,
            "disk",
            "power of 2",
        ),
        (
            r#""bitmap-add","disk":1,"name":"a","granularity":"x""#,
            "bad-argument",
            "granularity: \"x\" is neither",
        ),
        (
            r#""bitmap-clear","disk":1,"name":"a""#,
            "disk",
            "'a' not found",
        ),
        (
            r#""bitmap-clear","disk":1,"name":"a","x":1"#,
            "bad-argument",
            "`x`",
        ),
        (
            r#""bitmap-merge","disk":1,"target":"a""#,
            "bad-argument",
            "`sources`",
        ),
        (
            r#""bitmap-fly","disk":1"#,
            "unknown-command",
            "bitmap-transaction",
        ),
        (
            r#""bitmap-transaction","disk":1,"actions":[{}]"#,
            "bad-argument",
            "no \"command\"",
        ),
        (
            r#""bitmap-transaction","disk":1,"actions":[{"command":"flush"}]"#,
            "bad-argument",
            "'flush' is none of",
        ),
        (
            r#""bitmap-transaction","disk":1,"actions":[{"command":"bitmap-clear","disk":1,"name":"a"}]"#,
            "bad-argument",
            "`disk`",
        ),
    ] {
        let request = format!(r#"{{"command":{request}}}"#);
        let (found, text) = error(&control, &request);
        assert_eq!(found, kind, "{request}: {text}");
        assert!(text.contains(message), "{request}: {text}");
        // Which image it is, once.
        let image = dir.path().join("b").display().to_string();
        let is_named = kind == "disk" && request.contains("\"disk\":1");
        let names = text.matches(&image).count();
        assert_eq!(names, usize::from(is_named), "{request}: {text}");
    }
    assert!(std::fs::read(dir.path().join("b")).unwrap() == before);
    control.shut_down();
    let add = r#"{"command":"bitmap-add","disk":1,"name":"a"}"#;
    assert_eq!(error(&control, add).0, "ended");
}
