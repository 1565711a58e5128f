//! `create`

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use crate::run::{Both, Place, len, words};

/// Command lines that create `t`, and what it may consist of besides.
#[test]
fn creates_the_same() {
    let lines = "
        create t 1M
        create -q t 1M
        create t 0
        create t 1023
        create -f raw t 1.3k
        create -f raw t 1M -o preallocation=full
        create -f raw -o preallocation=falloc,size=1000 t
        create -f qcow2 t 1.5G
        create -f qcow2 t 0x1000
        create -f qcow2 t 1000
        create -q -f qcow2 t 1M
        create --qui --format=qcow2 t 1M
        create -fqcow2 -qu t 1M
        create file:t 1M
        create -f qcow2 -o compat=v2 t 1M
        create -f qcow2 -o compat=0.10 t 1M
        create -f qcow2 -o compat=v3 t 1M
        create -f qcow2 -o size=2M t
        create -f qcow2 -o size=2M,size=5M t
        create -f qcow2 -o cluster_size=64k -o size=1M t
        create -f qcow2 -o lazy_refcounts t 1M
        create -f qcow2 -o refcount_bits=0x10 t 1M
        create -f qcow2 -o refcount_bits=1 t 1G
        create -f qcow2 -o compression_type=zstd t 1M
        create -f qcow2 -o compression_type=zstd,data_file=d t 1M
        create -f qcow2 -o refcount_bits=2,preallocation=metadata t 1M
        create -f qcow2 -o refcount_bits=8,data_file=d t 1M
        create -f qcow2 -o refcount_bits=64,cluster_size=512 t 1M
        create -f qcow2 -o data_file=d t 1M
        create -f qcow2 -o data_file=d,data_file_raw t 1M
        create -f qcow2 -o data_file=d,nodata_file_raw t 1M
        create -f qcow2 -o data_file=file:d t 1M
        create -f qcow2 -o data_file=a,,b t 1M
    ";
    for line in lines.trim().lines() {
        let both = Both::empty();
        both.same(line);
        assert_same_disk(&both, line);
    }
}

/// Every kind of image in every kind of size.
#[test]
fn creates_every_kind() {
    let kinds = ["", ",data_file=d", ",data_file=d,data_file_raw=on"];
    for cluster_size in ["512", "4k", "64k", "2M"] {
        for kind in kinds {
            for preallocation in ["off", "metadata", "falloc", "full"] {
                for size in ["0", "1001", "1000k"] {
                    let line = format!(
                        "create -f qcow2 -o cluster_size={cluster_size},preallocation=\
                         {preallocation}{kind} t {size}"
                    );
                    // Clusters of the usual size are for the file system, the others for memory.
                    let both = match cluster_size {
                        "64k" => Both::empty(),
                        _ => Both::in_memory(|_| ()),
                    };
                    both.same(&line);
                    assert_same_disk(&both, &line);
                }
            }
        }
    }
}

/// Tables of more than one cluster, and refcount blocks that count refcount blocks.
#[test]
fn creates_large_images() {
    for line in [
        "create -f qcow2 -o cluster_size=512 t 1G",
        "create -f qcow2 -o cluster_size=512,data_file=d,data_file_raw=on t 1G",
        "create -f qcow2 -o cluster_size=512,preallocation=metadata t 300M",
        "create -f qcow2 -o cluster_size=4k,preallocation=metadata t 10G",
        "create -f qcow2 -o data_file=d,data_file_raw=on t 100G",
        "create -f qcow2 -o cluster_size=2M t 2E",
        "create -f qcow2 t 2P",
    ] {
        let tandem = Place::in_memory();
        assert_eq!(tandem.run(&words(line)).stderr, "", "{line}");
        let expected = tandem.qemu_img(&["check", "t"]);
        assert_eq!(
            expected.status,
            Some(0),
            "{line}: {}{}",
            expected.stdout,
            expected.stderr
        );
        let found = tandem.run(&["check", "t"]);
        assert_eq!(found, expected, "{line}");
    }
}

/// The images look the same to QEMU, and have no errors.
fn assert_same_disk(both: &Both, line: &str) {
    let Both { qemu, tandem } = both;
    let is_qcow2 = fs::read(tandem.path("t")).unwrap().starts_with(b"QFI");
    for file in ["t", "d", "a,b"] {
        assert_eq!(
            qemu.path(file).exists(),
            tandem.path(file).exists(),
            "{line}: {file}"
        );
        if file != "t" && qemu.path(file).exists() {
            assert_eq!(len(qemu, file), len(tandem, file), "{line}: {file}");
        }
    }
    let info = |place: &Place| {
        let info = place.qemu_img(&["info", "t"]);
        assert_eq!(info.status, Some(0), "{line}: {}", info.stderr);
        let varies = |text: &&str| !text.contains("disk size") && !text.contains("file length");
        info.stdout
            .lines()
            .filter(varies)
            .collect::<Vec<_>>()
            .join("\n")
    };
    let [expected, found] = both.each(info);
    assert_eq!(found, expected, "{line}");
    let map = |place: &Place| extents(&place.qemu_img(&["map", "--output=json", "t"]).stdout);
    let [expected, found] = both.each(map);
    assert_eq!(found, expected, "{line}");
    if is_qcow2 {
        let check = tandem.qemu_img(&["check", "t"]);
        assert_eq!(
            check.status,
            Some(0),
            "{line}: {}{}",
            check.stdout,
            check.stderr
        );
    }
}

/// Guest ranges and whether they are mapped, from the JSON of `map`. Where QEMU puts preallocated
/// clusters in the image, and which of them it finds to be holes, is its own affair.
fn extents(json: &str) -> Vec<(u64, u64, bool)> {
    let field = |line: &str, name: &str| -> Option<String> {
        let (_, rest) = line.split_once(&format!("\"{name}\": "))?;
        Some(rest.split([',', '}']).next()?.to_owned())
    };
    let mut extents: Vec<(u64, u64, bool)> = Vec::new();
    for line in json.lines() {
        let number = |name| field(line, name).and_then(|text| text.parse().ok());
        let (Some(start), Some(length)) = (number("start"), number("length")) else {
            panic!("{json}");
        };
        let present = field(line, "present").as_deref() == Some("true");
        match extents.last_mut() {
            Some(last) if last.2 == present => last.1 += length,
            _ => extents.push((start, length, present)),
        }
    }
    extents
}

/// Command lines that fail and leave nothing behind.
#[test]
fn fails_the_same() {
    let lines = "
        create
        create -f qcow2
        create -f qcow2 t
        create -f qcow2 t 1X
        create -f qcow2 t -- -1
        create t ''
        create t 1e3
        create t 1kB
        create t inf
        create t 99999999999999999999
        create -f qcow2 t 1M 2M
        create -f foo t 1M
        create -f foo -o help
        create -f qcow2 -o foo=bar t 1M
        create -f qcow2 -o cluster_size=3000 t 1M
        create -f qcow2 -o cluster_size=4M t 1M
        create -f qcow2 -o cluster_size=0 t 1M
        create -f qcow2 -o cluster_size=-1 t 1M
        create -f qcow2 -o cluster_size=x t 1M
        create -f qcow2 -o cluster_size t 1M
        create -f qcow2 -o preallocation=x t 1M
        create -f qcow2 -o data_file_raw=x t 1M
        create -f qcow2 -o data_file_raw=on t 1M
        create -f qcow2 -o data_file=d,compat=0.10 t 1M
        create -f qcow2 -o compat=0.9 t 1M
        create -f qcow2 -o compression_type=foo,refcount_bits=3 t 1M
        create -f qcow2 -o extended_l2=on,cluster_size=4k,refcount_bits=3 t 1M
        create -f qcow2 -o compat=0.10,extended_l2=on,cluster_size=3000 t 1M
        create -f qcow2 -o compat=0.10,lazy_refcounts=on,refcount_bits=3 t 1M
        create -f qcow2 -o compat=0.10,compression_type=zstd,data_file=d t 1M
        create -f qcow2 -o size=2M t 3M
        create -f qcow2 t 100T -o cluster_size=512
        create -f qcow2 t 8E
        create -f qcow2 t 7E
        create -f qcow2 t 16E
        create t 7E
        create -f qcow2 -o lazy_refcounts=on,compat=0.10 t 1M
        create -f qcow2 -o refcount_bits=7 t 1M
        create -f qcow2 -o refcount_bits=128 t 1M
        create -f qcow2 -o refcount_bits=x t 1M
        create -f qcow2 -o refcount_bits=99999999999999999999 t 1M
        create -f qcow2 -o refcount_bits=1,compat=0.10 t 1M
        create -f qcow2 missing/t 1M
        create -f qcow2 -o data_file=missing/d t 1M
        create -f qcow2 . 1M
        create -f qcow2 -o data_file=. t 1M
        create -f qcow2 -o data_file= t 1M
        create -f qcow2 -o data_file=foo:b t 1M
        create -f qcow2 -o extended_l2=on,cluster_size=4k t 1M
        create -f qcow2 -o extended_l2=on,compat=v2 t 1M
        create -f qcow2 -o compression_type=foo t 1M
        create -f qcow2 -o compression_type=zstd,compat=v2 t 1M
        create -f raw -o preallocation=metadata t 1M
        create -f raw -o cluster_size=64k t 1M
        create -f raw -b x t 1M
        create -F raw t 1M
        create foo:x 1M
        create -x
        create t -6 1M
        create --foo
        create --o
        create --quiet=3 t 1M
        create --format
        create -f
        create -f qcow2 -o '' t 1M
        create -f qcow2 -o , t 1M
        create -f qcow2 -o a, t 1M
        --foo
        -q
        foo
    ";
    for line in lines.trim().lines() {
        let both = Both::empty();
        both.same(line);
        assert_eq!(both.tandem.content(), [], "{line}");
    }
}

/// QEMU deletes or empties files when it fails after it has begun. Here they are as they were.
#[test]
fn a_failure_changes_nothing() {
    let prepare = |place: &Place| {
        fs::write(place.path("t"), "old image").unwrap();
        fs::write(place.path("d"), "old data").unwrap();
        fs::hard_link(place.path("t"), place.path("hard")).unwrap();
        std::os::unix::fs::symlink("t", place.path("soft")).unwrap();
    };
    for (options, message) in [
        ("data_file=d,cluster_size=3000", "Cluster size must be"),
        (
            "data_file=d,compat=0.10",
            "External data files are only supported",
        ),
        (
            "data_file=d,encryption=on",
            "Option 'encryption' is not supported: images cannot be encrypted",
        ),
        (
            "data_file=d,backing_file=x",
            "Could not open 'x': No such file or directory\nCould not open backing image.",
        ),
        ("data_file=d,size=1E,cluster_size=2M", "too large"),
        ("data_file=missing/d", "Could not create 'missing/d'"),
        ("data_file=t", "'t' is the image itself"),
        ("data_file=./t", "'./t' is the image itself"),
        ("data_file=hard", "'hard' is the image itself"),
        ("data_file=soft", "'soft' is the image itself"),
    ] {
        let place = Place::tandem();
        prepare(&place);
        let before = place.content();
        let size = if options.contains("size=1E") {
            ""
        } else {
            "1M"
        };
        let failed = place.run(&words(&format!("create -q -f qcow2 -o {options} t {size}")));
        assert_eq!(failed.status, Some(1), "{options}");
        assert!(
            failed.stderr.starts_with("qemu-img: t: "),
            "{}",
            failed.stderr
        );
        assert!(failed.stderr.contains(message), "{}", failed.stderr);
        assert_eq!(place.content(), before, "{options}");
    }
}

#[test]
fn a_success_replaces_what_is_there() {
    let both = Both::new(|place| {
        place.make("create -q -f qcow2 t 10M");
        place.qemu_io("t", &["write 0 5M"]);
        fs::write(place.path("d"), vec![1; 3 << 20]).unwrap();
    });
    both.same("create -f qcow2 -o data_file=d,data_file_raw=on t 1M");
    let tandem = &both.tandem;
    assert_eq!(fs::read(tandem.path("d")).unwrap(), vec![0; 1 << 20]);
    assert_eq!(tandem.qemu_img(&["check", "t"]).status, Some(0));
}

/// The lines are QEMU's, and there are those of two more options.
#[test]
fn describes_options() {
    for line in [
        "create -f qcow2 -o help",
        "create -f qcow2 -o help t",
        "create -f qcow2 -o cluster_size=1,? t",
        "create -f qcow2 -o help t 1M 2M",
        "create -f raw -o help",
        "create -f raw -o ? t",
        "create -o help",
        "create -f foo -o help",
        "create -f qcow2 -o help foo:t",
    ] {
        let expected = Place::qemu().run(&words(line));
        let mut found = Place::tandem().run(&words(line));
        let is_own = |text: &&str| {
            let own = ["base_stamp", "data_file_layout", "data_file_reuse"];
            own.iter()
                .any(|name| text.starts_with(&format!("  {name}=")))
        };
        let own = found.stdout.lines().filter(is_own).count();
        assert_eq!(
            own,
            if line.contains("qcow2") && !line.contains("foo") {
                3
            } else {
                0
            },
            "{line}"
        );
        let lines = found
            .stdout
            .split_inclusive('\n')
            .filter(|text| !is_own(text));
        found.stdout = lines.collect();
        assert_eq!(found, expected, "{line}");
    }
}

/// What is told to the file system, and what of it the file system does not take.
#[test]
fn hints_are_the_same() {
    for line in [
        "create -f qcow2 -o nocow=on t 1M",
        "create -f qcow2 -o nocow=off,encryption=off t 1M",
        "create -f qcow2 -o extent_size_hint=1M t 1M",
        "create -f qcow2 -o extent_size_hint=0 t 1M",
        "create -f qcow2 -o extent_size_hint=1M,data_file=d t 1M",
        "create -f raw -o extent_size_hint=64k,nocow=on t 1M",
    ] {
        let both = Both::empty();
        both.same(line);
        assert_same_disk(&both, line);
    }
    for line in [
        "create -f qcow2 -o extent_size_hint=8G t 1M",
        "create -f raw -o extent_size_hint=8G t 1M",
        "create -f raw -o extent_size_hint=x t 1M",
        "create -f raw -o nocow=x t 1M",
        "create -f raw -o encryption=on t 1M",
    ] {
        Both::empty().same(line);
    }
}

/// Backing files, by name and by option.
#[test]
fn backing_options_mean_the_same() {
    let both = Both::new(|place| {
        place.make("create -q -f qcow2 a 1M");
        place.make("create -q -f raw r 2M");
    });
    for line in [
        "create -f qcow2 -u -b missing -F raw t 1M",
        "create -f qcow2 -u -b missing -F raw t",
        "create -f qcow2 -u -b missing t 1M",
        "create -f qcow2 -b a -F qcow2 t",
        "create -f qcow2 -b a -F qcow2 t 2M",
        "create -f qcow2 -b a -F foo t 2M",
        "create -f qcow2 -b a t 2M",
        "create -f qcow2 -b r -F qcow2 t",
        "create -f qcow2 -F qcow2 t 2M",
        "create -f qcow2 -o backing_file=a,backing_fmt=qcow2 t",
        "create -f qcow2 -o backing_file=a -F qcow2 t",
        "create -f qcow2 -o backing_file=a -b r -F raw t",
        "create -f qcow2 -b '' -F raw t 1M",
        "create -f qcow2 -b t -F raw t 1M",
        "create --backing a --backing-format qcow2 --format qcow2 --options cluster_size=4k t",
        "create --backing-unsafe -b zz -F raw -f qcow2 t 1M",
        "create --backing-unsafe -q -b zz -F raw -f qcow2 t 1M",
    ] {
        both.same(line);
    }
}

/// A data file whose name cannot be told from another is not made under that other name.
#[test]
fn a_data_file_name_that_is_not_utf8() {
    use std::os::unix::ffi::OsStrExt;

    let dir = tempfile::tempdir().unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_tandem-img"))
        .current_dir(&dir)
        .args(["create", "-f", "qcow2", "-o"])
        .arg(std::ffi::OsStr::from_bytes(b"data_file=\xff.raw"))
        .args(["disk.qcow2", "1M"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("not UTF-8"));
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
}

/// Whoever replaces a file of somebody else leaves it to the group that it belongs to, if that may be;
/// no other group gets what that one may do.
#[test]
fn a_file_of_somebody_else_stays_with_its_group() {
    let place = Place::tandem();
    let program = place.path("program");
    fs::copy(env!("CARGO_BIN_EXE_tandem-img"), &program).unwrap();
    fs::set_permissions(place.path(""), Permissions::from_mode(0o777)).unwrap();
    for (groups, expected) in [
        ("--groups=100", (100, 0o666)),
        ("--clear-groups", (65534, 0o606)),
    ] {
        let disk = place.path("disk");
        let _ = fs::remove_file(&disk);
        fs::write(&disk, "").unwrap();
        fs::set_permissions(&disk, Permissions::from_mode(0o666)).unwrap();
        if std::os::unix::fs::chown(&disk, Some(1234), Some(100)).is_err() {
            println!("only root can give a file away");
            return;
        }
        let made = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", groups])
            .arg(&program)
            .args(["create", "-q", "-f", "raw", "disk", "1M"])
            .current_dir(place.path(""))
            .status();
        assert!(made.unwrap().success(), "{groups}");
        let metadata = fs::metadata(&disk).unwrap();
        assert_eq!(
            (metadata.gid(), metadata.mode() & 0o777),
            expected,
            "{groups}"
        );
    }
}

/// Neither the new image nor its data file takes the place of what the backing file consists of,
/// under whatever name.
#[test]
fn leaves_the_backing_file_alone() {
    let place = Place::tandem();
    place.make("create -q -f raw bottom 1M");
    place.make("create -q -f qcow2 -b bottom -F raw middle");
    place.make("create -q -f qcow2 -o data_file=data -b middle -F qcow2 top");
    for name in ["bottom", "middle", "data", "top"] {
        std::os::unix::fs::symlink(name, place.path(&format!("{name}.link"))).unwrap();
        fs::hard_link(place.path(name), place.path(&format!("{name}.hard"))).unwrap();
    }
    let before = place.content();
    for name in ["bottom", "middle", "data", "top"] {
        for name in [
            name.to_owned(),
            format!("{name}.link"),
            format!("{name}.hard"),
        ] {
            for line in [
                format!("create -q -f qcow2 -b ./top -F qcow2 {name}"),
                format!("create -q -f qcow2 -o data_file={name} -b top -F qcow2 new"),
            ] {
                let run = place.run(&words(&line));
                assert_eq!(run.status, Some(1), "{line}");
                assert!(
                    run.stderr.contains("Failed to get \"write\" lock"),
                    "{}",
                    run.stderr
                );
                assert!(place.content() == before, "{line}");
            }
        }
    }
    // One that somebody writes to is none the less a backing file.
    place.make("create -q -f qcow2 -b top -F qcow2 other");
    let both = Both::new(|place| place.make("create -q -f qcow2 top 1M"));
    both.same("create -f qcow2 -b top -F qcow2 new");
}
