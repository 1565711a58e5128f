//! Images that are described by options.

use crate::run::{Both, Place};

fn images(place: &Place) {
    place.make("create -q -f qcow2 a 1M");
    place.make("create -q -f qcow2 -b a -F qcow2 b");
    place.make("create -q -f qcow2 -o data_file=d.raw d 1M");
    place.make("create -q -f raw r 1M");
    place.make("create -q -f raw x,y 64k");
    place.qemu_io("a", &["write 0 64k", "write 512k 64k"]);
    place.qemu_io("d", &["write 128k 64k"]);
    place.qemu_io("r", &["write -P 3 0 1M"]);
    std::fs::copy(place.path("d.raw"), place.path("other.raw")).unwrap();
}

const A: &str = "--image-opts driver=qcow2,file.filename=a";

/// QEMU's JSON has strings in single quotes, too.
#[test]
fn json_in_single_quotes() {
    let both = Both::new(images);
    for json in [
        "{'driver':'qcow2','file':{'filename':'a'}}",
        r#"{"driver":'qcow2','file.filename':"\u0061"}"#,
        r#"{'driver':'qcow2','file':{'driver':'file','filename':'a\'b"'}}"#,
    ] {
        both.same(&format!("map json:{json}"));
    }
}

/// Every subcommand with good and bad options; nothing is changed.
#[test]
fn options_mean_the_same() {
    let both = Both::new(images);
    for options in [
        "",
        ",lazy-refcounts=on",
        ",nolazy-refcounts",
        ",lazy-refcounts",
        ",overlap-check=all",
        ",overlap-check.template=none,overlap-check.main-header=on",
        ",overlap-check=foo",
        ",overlap-check.template=foo",
        ",overlap-check.foo=on",
        ",cache-size=1M",
        ",cache-size=1M,l2-cache-size=512k",
        ",cache-size=x",
        ",cache-size=-1",
        ",l2-cache-size=1M,l2-cache-entry-size=4k",
        ",refcount-cache-size=1M,cache-clean-interval=3",
        ",cache-clean-interval=x",
        ",read-only=on",
        ",read-only=off,auto-read-only=on",
        ",read-only=x",
        ",force-share=on",
        ",force-share=x",
        ",discard=unmap,detect-zeroes=unmap",
        ",discard=x",
        ",detect-zeroes=unmap",
        ",detect-zeroes=x",
        ",cache.no-flush=on",
        ",cache.writeback=off",
        ",node-name=x",
        ",copy-on-read=on",
        ",pass-discard-request=on,pass-discard-other=off,discard-no-unref=on",
        ",file.locking=off",
        ",file.locking=x",
        ",file.aio=threads",
        ",file.aio=x",
        ",file.aio=native",
        ",file.driver=file",
        ",file.driver=foo",
        ",file.read-only=on,file.node-name=y,file.cache.no-flush=on",
        ",file.foo=bar",
        ",foo=bar",
        ",size=1",
        ",data-file.filename=d.raw",
        ",backing.driver=foo",
        ",backing=x",
        ",id=y",
        ",id=9",
    ] {
        let only_info = options.contains("data-file") || options.contains("backing");
        if !only_info {
            both.same(&format!("info {A}{options}"));
            both.same(&format!("check --output=json {A}{options}"));
        }
        both.same(&format!("map {A}{options}"));
        both.same(&format!("snapshot -l {A}{options}"));
    }
    let (a, before) = (both.tandem.path("a"), both.tandem.content());
    for line in [
        "info --image-opts a",
        "info --image-opts ''",
        "info --image-opts help",
        "info --image-opts filename=a",
        "info --image-opts file.filename=a",
        "info --image-opts file.driver=file,file.filename=r",
        "info --image-opts driver=raw,file.filename=a",
        "info --output=json --image-opts driver=raw,file.filename=a",
        "info --image-opts driver=raw,lazy-refcounts=on,file.filename=a",
        "info --image-opts driver=raw,backing.file.filename=a,file.filename=a",
        "info --image-opts driver=qcow2",
        "info --image-opts driver=qcow2,filename=a",
        "info --image-opts driver=qcow2,file=a",
        "info --image-opts driver=foo,file.filename=a",
        "info --image-opts driver=qcow2,,file.filename=a",
        "info --image-opts driver=qcow2,file.filename=missing",
        "info --image-opts driver=qcow2,file.filename=",
        "info --image-opts driver=qcow2,file.driver=file",
        "info --image-opts driver=qcow2,file.filename=r",
        "map --image-opts driver=qcow2,file.driver=raw,file.file.filename=a",
        "info --image-opts driver=raw,file.filename=x,,y",
        "info --image-opts driver=qcow2,file.filename=file:a",
        "info --image-opts driver=qcow2,file.filename=nbd:a",
        "info --image-opts driver=file,filename=a",
        "info --output=json --image-opts driver=file,filename=r",
        "info --image-opts driver=file,filename=a,foo=bar",
        "info --image-opts driver=qcow2,file.filename=a,backing.file.filename=a",
        "info -f qcow2 --image-opts driver=qcow2,file.filename=a",
        "info -U --image-opts driver=qcow2,file.filename=a,force-share=off",
        "info -U --image-opts driver=qcow2,file.filename=a,force-share=on",
        "map --image-opts driver=file,filename=r",
        "check --image-opts driver=raw,file.filename=r",
        "check --output=json a",
        "resize --image-opts driver=qcow2,file.filename=a,read-only=on +1M",
        "resize --image-opts driver=qcow2,file.filename=a,force-share=on +1M",
        "resize --image-opts driver=raw,file.filename=r,read-only=on +1M",
        "check -r all --image-opts driver=qcow2,file.filename=a,read-only=on",
        "check -r all --image-opts driver=qcow2,file.filename=a,force-share=on",
        "check -r all -U a",
        "snapshot -c s -U --image-opts driver=qcow2,file.filename=a",
        "snapshot -c s --image-opts driver=qcow2,file.filename=a,read-only=on",
        "map --image-opts driver=qcow2,file.filename=a,cache-size=1,l2-cache-size=2",
        "map --image-opts driver=qcow2,file.filename=a,cache-size=1,refcount-cache-size=2",
        "map --image-opts driver=qcow2,file.filename=a,cache-size=4,l2-cache-size=1,refcount-cache-size=2",
        "snapshot -f qcow2 a",
    ] {
        both.same(line);
    }
    assert!(both.tandem.content() == before);
    assert!(a.exists());
}

/// Other files than those that the image names.
#[test]
fn other_files_are_used() {
    let both = Both::new(images);
    for line in [
        "map --image-opts driver=qcow2,file.filename=d,data-file.filename=other.raw",
        "map --image-opts driver=qcow2,file.filename=d,data-file.driver=file,data-file.filename=d.raw",
        "map --image-opts driver=qcow2,file.filename=d,data-file.driver=raw,data-file.file.filename=other.raw",
        "map --image-opts driver=qcow2,file.filename=d,data-file.filename=missing",
        "map --image-opts driver=qcow2,file.filename=d,data-file.foo=1",
        "map --image-opts driver=qcow2,file.filename=d,data-file.file.filename=d.raw",
        "map --image-opts driver=qcow2,file.filename=d,data-file=",
        "map --image-opts driver=qcow2,file.filename=a,data-file.filename=d.raw",
        "check --image-opts driver=qcow2,file.filename=d,data-file.filename=other.raw",
        "map --output=json --image-opts driver=qcow2,file.filename=b,backing.driver=raw,backing.file.filename=r",
        "map --image-opts driver=qcow2,file.filename=b,backing.driver=raw,backing.file.filename=r",
        "map --image-opts driver=qcow2,file.filename=a,backing.driver=raw,backing.file.filename=r",
        "map --image-opts driver=qcow2,file.filename=b,backing.driver=qcow2,backing.file.filename=a",
        "map --image-opts driver=qcow2,file.filename=b,backing.file.filename=a",
        "map --image-opts driver=qcow2,file.filename=b,backing.file.filename=r",
        "map --image-opts driver=qcow2,file.filename=b,backing.driver=qcow2,backing.file.filename=r",
        "map --image-opts driver=qcow2,file.filename=b,backing.driver=foo,backing.file.filename=r",
        "map --image-opts driver=qcow2,file.filename=b,backing.driver=qcow2,backing.file.filename=a,backing.foo=bar",
        "resize --image-opts driver=qcow2,file.filename=a,lazy-refcounts=on +1M",
        "snapshot -c s --image-opts driver=qcow2,file.filename=a,l2-cache-size=64k",
        "snapshot -d s --image-opts driver=qcow2,file.filename=a",
        "check -r all --image-opts driver=qcow2,file.filename=a",
        "resize --image-opts driver=raw,file.filename=r +1M",
        "resize --image-opts file.filename=r +1M",
    ] {
        both.same(line);
    }
    both.same_bytes("r");
}

/// QEMU would show something else.
#[test]
fn a_part_of_a_backing_file_is_refused() {
    let both = Both::new(images);
    let raw = "backing.driver=raw,backing.file.filename=r";
    let qcow2 = "backing.driver=qcow2,backing.file.filename=a";
    for (below, name, value) in [
        (raw, "offset", "512"),
        (raw, "size", "512"),
        (qcow2, "data-file.filename", "other.raw"),
        (qcow2, "backing.driver", "raw"),
        (qcow2, "backing", ""),
    ] {
        let image = format!("driver=qcow2,file.filename=b,{below},backing.{name}={value}");
        let found = both.tandem.run(&["map", "--image-opts", &image]);
        let expected = format!("Option 'backing.{name}' is not supported");
        assert!(
            found.stderr.contains(&expected),
            "{image}: {}",
            found.stderr
        );
        assert_eq!(found.status, Some(1), "{image}");
    }
}

#[test]
fn json_names_mean_the_same() {
    let both = Both::new(images);
    let same = |args: &[&str]| {
        let (expected, found) = (both.qemu.run(args), both.tandem.run(args));
        assert_eq!(found, expected, "{args:?}");
    };
    for json in [
        r#"{"driver":"qcow2","file":{"driver":"file","filename":"a"}}"#,
        r#"{"driver":"qcow2","file.filename":"a"}"#,
        r#"{"file":{"filename":"a"}}"#,
        r#"{"driver":"qcow2","file":{"driver":"file","filename":"a"}"#,
        r#"{"driver":"qcow2","file":{"driver":"file","filename":"a","x":1}}"#,
        r#"{"driver":"qcow2","read-only":true,"file":{"driver":"file","filename":"a"}}"#,
        r#"{"driver":"qcow2","read-only":"on","file":"a"}"#,
        r#"{"driver":"qcow2","cache-size":1048576,"file.filename":"a"}"#,
        r#"{"driver":"qcow2","file":{"filename":"json:{}"}}"#,
        r#"{"driver":"raw","file":{"filename":"r"}}"#,
        r#"{"driver":"file","filename":"r"}"#,
        "{}",
        "[]",
        "x",
        "",
    ] {
        let name = format!("json:{json}");
        same(&["info", &name]);
        same(&["info", "-f", "raw", &name]);
        same(&["map", "--output=json", &name]);
    }
    same(&[
        "map",
        r#"json:{"driver":"qcow2","file.filename":"b","backing":null}"#,
    ]);
    same(&[
        "map",
        r#"json:{"driver":"qcow2","file.filename":"b","backing":"x"}"#,
    ]);
    same(&[
        "info",
        r#"json:{"driver":"qcow2","file.filename":"b","backing":null}"#,
    ]);
}

/// A name in an image is a name.
#[test]
fn names_in_images_are_literal() {
    let place = Place::tandem();
    images(&place);
    let json = r#"json:{"driver":"raw","file":{"filename":"r"}}"#;
    let make = [
        "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", json, "j", "1M",
    ];
    assert_eq!(place.qemu_img(&make).status, Some(0));
    let map = place.run(&["map", "j"]);
    assert_eq!(map.status, Some(1));
    assert!(
        map.stderr.contains("Unknown protocol 'json'"),
        "{}",
        map.stderr
    );
}

#[test]
fn objects_are_refused() {
    let place = Place::tandem();
    images(&place);
    for command in [
        "info a",
        "check a",
        "map a",
        "snapshot a",
        "resize a 2M",
        "create n 1M",
    ] {
        let (name, rest) = command.split_once(' ').unwrap();
        let mut args = vec![name, "--object", "secret,id=s,data=x"];
        args.extend(rest.split(' '));
        let refused = place.run(&args);
        assert_eq!(refused.status, Some(1), "{command}");
        assert!(
            refused.stderr.contains("'--object' is not supported"),
            "{}",
            refused.stderr
        );
    }
}
