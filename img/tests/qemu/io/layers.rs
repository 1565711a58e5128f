//! Disks on top of others, parts of disks, and files that fail when they are told to.

use std::fs;

use super::{TANDEM, args, run, same, same_disk};
use crate::run::{Both, Place};

/// `disk` holds the image `inner`, and `raw` is what that shows.
fn disks(place: &Place) {
    place.make("create -q -f qcow2 inner 1M");
    place.qemu_io("inner", &["write -P 5 64k 64k", "write -P 6 512k 1k"]);
    place.make("convert -f qcow2 -O raw inner raw");
    place.make("convert -f raw -O qcow2 inner disk");
    place.make("create -q -f qcow2 empty 1M");
    place.make("create -q -f qcow2 -o data_file=d.raw data 1M");
    let rules = "# Reads.\n[inject-error]\nevent = \"read_aio\"\nerrno = \"28\"\n";
    fs::write(place.path("reads"), rules).unwrap();
    fs::write(place.path("none"), "# Nothing.\n").unwrap();
    fs::write(place.path("wrong"), "[inject-error]\nevent = read\n").unwrap();
}

#[test]
fn disks_on_top_of_others() {
    let both = Both::new(disks);
    same(
        &both,
        "--image-opts driver=qcow2,file.driver=qcow2,file.file.filename=disk :: read -P 5 64k 64k :: read -P 6 512k 1k :: info
        --image-opts driver=qcow2,file.driver=qcow2,file.file.filename=disk :: write -P 7 64k 64k :: read -P 7 64k 64k
        --image-opts driver=raw,file.driver=qcow2,file.file.filename=inner :: read -P 5 64k 64k :: write -P 8 0 4k :: length :: map
        :: open -o driver=raw,file.driver=qcow2,file.file.filename=inner,offset=128k,size=64k :: length :: write -P 9 0 64k :: read 64k 1
        :: open -o driver=raw,offset=64k,size=1k raw :: length :: read -P 5 0 1k :: write -P 3 512 512 :: read 1k 1 :: truncate 2k
        :: open -o driver=raw,offset=1M raw :: length :: close :: open -o driver=raw,offset=1025k raw
        :: open -o driver=raw,offset=512k,size=513k raw :: open -o driver=raw,size=1000 raw :: open -o driver=raw,size=x raw
        --image-opts driver=raw,file.driver=raw,file.offset=64k,file.file.filename=raw :: read -P 5 0 512 :: length
        --image-opts driver=qcow2,file.driver=foo,file.file.filename=disk
        --image-opts driver=qcow2,file.driver=qcow2,file.foo=1,file.file.filename=disk
        --image-opts driver=raw,file.driver=qcow2,file.file.filename=raw
        :: open json:{'driver':'qcow2','file':{'driver':'file','filename':'inner'}} :: length :: read -P 9 128k 64k
        :: open -o driver=qcow2 json:{\"driver\":\"raw\",\"file.filename\":\"inner\"} :: length
        json:{'file':{'filename':'in\\'ner'}}
        json:{'file':{'filename':'inner'
        json:[1]",
    );
    for name in ["inner", "disk"] {
        same_disk(&both, "qcow2", name);
    }
    both.same_bytes("raw");
}

/// What the limits of `blkdebug` change is how zeros are written.
#[test]
fn limits() {
    let both = Both::new(disks);
    same(
        &both,
        "inner :: write -P 5 0 1M
        blkdebug:none:inner :: read -P 5 64k 64k :: write -P 1 3 5 :: map
        :: open -o driver=blkdebug,image.driver=qcow2,align=4k,max-transfer=64k blkdebug:none:inner :: write -P 2 1000 128k :: length
        :: open -o driver=qcow2,file.align=4k blkdebug:none:inner :: write -P 3 1 1
        :: open -o driver=blkdebug,image.driver=qcow2,align=512,opt-write-zero=96k,max-write-zero=96k blkdebug:none:inner :: write -z 50k 900k
        inner :: map :: read -P 0 50k 900k
        :: open -o driver=blkdebug,image.driver=qcow2,align=5 blkdebug:none:inner
        :: open -o driver=blkdebug,image.driver=qcow2,align=4G blkdebug:none:inner
        :: open -o driver=blkdebug,image.driver=qcow2,align=4k,max-transfer=6k blkdebug:none:inner
        :: open -o driver=blkdebug,image.driver=qcow2,opt-write-zero=1M,max-write-zero=1536k blkdebug:none:inner
        :: open -o driver=blkdebug,image.driver=qcow2,opt-discard=1M,max-discard=512k blkdebug:none:inner
        :: open -o driver=blkdebug,image.driver=qcow2,align=x blkdebug:none:inner
        blkdebug:inner",
    );
    same_disk(&both, "qcow2", "inner");
}

#[test]
fn files_that_fail() {
    let both = Both::new(disks);
    let (json, image) = (
        "json:{'driver':'qcow2','file':{'driver':'blkdebug'",
        "'image.filename':'inner'}}",
    );
    same(
        &both,
        &format!(
            "-r blkdebug:reads:inner :: read 0 512 :: read 64k 512 :: read 128k 1
            -r blkdebug:missing:inner :: length
            -r {json},'inject-error':[{{'event':'l2_load'}}],{image} :: read 0 1 :: read 64k 1
            -r {json},'inject-error':[{{'event':'read_aio','once':true}}],{image} :: read 64k 1 :: read 64k 1
            -r {json},'inject-error':[{{'event':'read_aio','sector':3000}}],{image} :: read 64k 1 :: read 512k 1
            -r {json},'inject-error':[{{'event':'read_aio','state':2,'errno':2}}],'set-state':[{{'event':'read_aio','state':1,'new_state':2}}],{image} :: read 64k 1 :: read 64k 1
            -r {json},'inject-error':[{{'event':'read_aio','iotype':'write'}}],{image} :: read 64k 1
            -r {json},'inject-error':[{{'errno':5}}],{image} :: length
            json:{{'driver':'qcow2','file.filename':'data','data-file':{{'driver':'blkdebug','image.filename':'d.raw'}}}} :: length",
        ),
    );
    // Which event it is that QEMU has no data written through is not the same.
    let case = "json:{'driver':'qcow2','file.filename':'data','data-file':{'driver':'blkdebug',\
                'inject-error':[{'event':'write_aio','errno':28}],'image.filename':'d.raw'}} \
                :: write 0 64k";
    let found = run(&both.tandem, TANDEM, &args(case), "");
    assert_eq!(
        (found.status, &*found.stdout),
        (Some(1), "write failed: No space left on device\n")
    );
    both.tandem.make("check -q data");
    for (case, text) in [
        ("blkdebug:wrong:inner", "wrong:2: parse error"),
        (
            "json:{'driver':'qcow2','file':{'driver':'blkdebug','inject-error':[{'event':'l2_update'}],'image.filename':'inner'}}",
            "Event 'l2_update' of blkdebug is not supported",
        ),
        (
            "json:{'driver':'blkdebug','inject-error':[{'event':'read_aio'}],'image':{'driver':'qcow2','file.filename':'inner'}}",
            "Rules of blkdebug are for files only",
        ),
    ] {
        let found = run(&both.tandem, TANDEM, &args(case), "");
        assert_eq!(found.status, Some(1));
        assert!(found.stderr.contains(text), "{case}: {}", found.stderr);
    }
}

/// A filter that compresses all that is written.
#[test]
fn compressed() {
    let both = Both::new(disks);
    same(
        &both,
        "json:{'driver':'compress','file':{'driver':'qcow2','file.filename':'empty'}} :: write -P 4 0 100k :: write -P 5 300k 200k :: read -P 4 0 100k :: read -P 0 100k 200k",
    );
    same_disk(&both, "qcow2", "empty");
    for place in [&both.qemu, &both.tandem] {
        let report = place.qemu_img(&["check", "--output=json", "empty"]).stdout;
        assert!(report.contains("\"compressed-clusters\": 6"), "{report}");
    }
}
