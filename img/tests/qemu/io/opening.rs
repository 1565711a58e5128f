//! Opening images: by the program's arguments, and by commands.

use super::{QEMU, TANDEM, args, run, runs, same, same_disk};
use crate::run::{Both, Place};

fn disks(place: &Place) {
    place.make("create -q -f qcow2 disk 1M");
    place.make("create -q -f raw raw 2M");
    place.make("create -q -f qcow2 -o data_file=data external 3M");
    place.make("create -q -f qcow2 -b disk -F qcow2 top 1M");
    std::fs::create_dir(place.path("directory")).unwrap();
    let mut vmdk = vec![0; 1024];
    vmdk[..4].copy_from_slice(b"KDMV");
    std::fs::write(place.path("foreign"), vmdk).unwrap();
}

#[test]
fn arguments() {
    let both = Both::new(disks);
    same(
        &both,
        "
        disk :: length
        -f qcow2 disk :: info
        --format=qcow2 -r top :: info :: map
        --form raw disk :: info
        -f raw raw :: info
        external :: info :: length
        raw :: info
        nope :: length
        '' :: length
        directory :: length
        -f foo disk
        -f qcow2 raw
        file:disk :: length
        -U disk :: length
        -r -U disk :: length
        -rU disk :: write 0 1
        --force-share --read-only disk :: length
        -i threads disk :: length
        -i native disk :: length
        -n -i native disk :: length
        -k disk :: length
        -k -t none disk :: length
        --native-aio --nocache disk :: length
        -k -i threads disk :: length
        --aio=foo disk :: length
        -t foo disk :: length
        --cache= disk :: length
        -d foo disk :: length
        --discard=ignore disk :: length
        -t off disk :: length
        -i foo -t foo disk
        -t foo -i foo disk
        -C -r disk :: length
        disk --cmd=length -c map
        --cmd length --read-only disk
        --snapshot disk :: write 0 64k
        --misalign disk :: write 1 2
        -nrsm disk :: read 0 1
        -T foo disk :: length
        --image-opts -f raw disk
        ",
    );
    same_disk(&both, "qcow2", "disk");
}

/// What is wrong is told as by QEMU; the help that follows is Tandem's own.
#[test]
fn wrong_arguments() {
    let both = Both::new(disks);
    for case in [
        "-x disk",
        "--nope disk",
        "-c",
        "disk -f",
        "--format",
        "--read-only=1 disk",
        "-r=1 disk",
        "--cach",
        "--c disk",
        "disk raw",
        "-q disk",
    ] {
        let [expected, found] = runs(&both, &args(case), "");
        assert_eq!(found.stderr, expected.stderr, "{case}");
        assert_eq!(found.status, expected.status, "{case}");
        assert!(found.stdout.contains("Usage: tandem-io"), "{case}");
        assert!(expected.stdout.contains("Usage: qemu-io"), "{case}");
    }
    let found = run(
        &both.tandem,
        TANDEM,
        &["--object", "secret,id=a", "disk"],
        "",
    );
    let expected = "qemu-io: Option '--object' is not supported: ";
    assert!(found.stderr.starts_with(expected), "{}", found.stderr);
    assert_eq!(found.status, Some(1));
}

#[test]
fn help_and_version() {
    let both = Both::new(disks);
    for args in [["-h"], ["--help"], ["-V"], ["--version"]] {
        let found = run(&both.tandem, TANDEM, &args, "");
        assert_eq!((found.status, &*found.stderr), (Some(0), ""));
        assert!(found.stdout.contains("tandem-io"), "{}", found.stdout);
    }
    let [expected, found] = runs(&both, &["-c", "help", "disk"], "");
    assert_eq!(found.status, expected.status);
    for line in found.stdout.lines() {
        // It is new in 10.0.8.
        let is_new = line.starts_with("aio_discard");
        assert!(is_new || expected.stdout.contains(line), "{line}");
    }
    for command in [
        "read",
        "r",
        "aio_write",
        "w",
        "writev",
        "open",
        "discard",
        "reopen",
    ] {
        let help = format!("help {command}");
        let [expected, found] = runs(&both, &["-c", &help], "");
        let first = |text: &str| text.lines().next().map(str::to_owned);
        assert_eq!(first(&found.stdout), first(&expected.stdout));
        assert!(found.stdout.contains("Example"), "{}", found.stdout);
    }
    for command in [
        "help map",
        "help alloc",
        "help truncate",
        "? length",
        "help quit",
    ] {
        let [expected, found] = runs(&both, &["-c", command], "");
        assert_eq!(found, expected, "{command}");
    }
}

#[test]
fn option_lists() {
    let both = Both::new(disks);
    same(
        &both,
        "
        --image-opts driver=qcow2,file.filename=disk :: info
        --image-opts file.filename=disk :: info
        --image-opts file.filename=raw :: length
        --image-opts driver=raw,file.driver=file,file.filename=disk :: info
        --image-opts driver=qcow2,file.filename=nope
        --image-opts driver=qcow2,file.filename=raw
        --image-opts driver=qcow2
        --image-opts ''
        --image-opts disk
        --image-opts driver=foo,file.filename=disk
        --image-opts driver=qcow2,file.driver=foo,file.filename=disk
        --image-opts driver=qcow2,file.filename=disk,foo=on
        --image-opts driver=raw,file.filename=raw,foo=on
        --image-opts driver=raw,file.filename=raw,file.foo=on
        --image-opts driver=qcow2,file.filename=disk,read-only=on
        --image-opts -r driver=qcow2,file.filename=disk,read-only=on :: write 0 1
        --image-opts -r driver=qcow2,file.filename=disk,read-only=off :: write 0 1
        --image-opts driver=qcow2,file.filename=disk,read-only=foo
        --image-opts driver=qcow2,file.filename=disk,cache.direct=on,cache.no-flush=off :: write 0 1
        --image-opts driver=qcow2,file.filename=disk,cache.direct=foo
        --image-opts driver=qcow2,file.filename=disk,cache.no-flush=on :: write 0 1 :: flush
        --image-opts driver=qcow2,file.filename=disk,discard=ignore :: discard 0 64k :: map
        --image-opts driver=qcow2,file.filename=disk,discard=foo
        --image-opts driver=qcow2,file.filename=disk,force-share=on
        --image-opts -r driver=qcow2,file.filename=disk,force-share=on :: length
        --image-opts -U -r driver=qcow2,file.filename=disk,force-share=off :: length
        --image-opts -U -r driver=qcow2,file.filename=disk,force-share=on :: length
        --image-opts driver=qcow2,file.filename=disk,file.locking=off :: write 0 1
        --image-opts driver=qcow2,file.filename=disk,l2-cache-size=1M :: write 0 1
        --image-opts driver=qcow2,file.filename=disk,l2-cache-size=foo
        --image-opts driver=qcow2,file.filename=disk,lazy-refcounts=on,overlap-check=none :: write 0 1
        --image-opts driver=qcow2,file.filename=disk,lazy-refcounts=foo
        --image-opts driver=qcow2,file.filename=external,data-file.filename=raw :: write 1M 1 :: alloc 1M
        --image-opts driver=qcow2,file.filename=external,data-file.driver=file,data-file.filename=raw :: map
        --image-opts driver=qcow2,file.filename=disk,data-file.filename=raw
        --image-opts driver=qcow2,file.filename=top,backing.driver=qcow2 :: length
        --image-opts -C -k -n driver=qcow2,file.filename=top :: read 0 1k :: map
        --image-opts -s driver=qcow2,file.filename=top :: write 0 1k
        ",
    );
    same_disk(&both, "qcow2", "disk");
    same_disk(&both, "qcow2", "top");
    both.same_bytes("raw");
}

#[test]
fn the_command() {
    let both = Both::new(disks);
    same(
        &both,
        "
        :: open disk :: length :: open disk :: close :: length
        :: open :: open -r :: open -x disk :: open disk raw :: open -o :: length
        :: open nope :: open -o driver=foo disk :: open -o driver=qcow2 raw :: o directory
        :: open -r disk :: write 0 1 :: close :: open -o read-only=on disk :: length
        :: open -r -o read-only=off disk :: write 0 1 :: close :: open -rU disk :: c :: open -U disk
        :: open -n disk :: write 0 1 :: c :: open -t none -k disk :: c :: open -k disk :: open -i foo disk
        :: open -t foo disk :: open -d foo disk :: open -d ignore disk :: discard 0 64k :: map
        :: open -s disk :: write 0 1M :: map :: c :: o disk :: map :: c :: open -s -r disk :: write 0 1
        :: open -o driver=raw disk :: info :: c :: open -o file.filename=disk :: info
        :: open -o file.filename=disk disk :: open -o driver=qcow2,file.filename=top :: map
        :: open -o foo disk :: open -o nofoo=on disk :: open -o a=b=c,,d disk :: open -o =c disk
        :: open -o driver=raw,filename=disk raw :: open -o driver=qcow2 :: open -o read-only=on
        :: open -o driver=raw -o read-only=on raw :: open -o driver=qcow2 -o driver=raw disk :: info
        :: open -o lazy-refcounts disk :: length :: c :: open -o nolazy-refcounts disk :: length
        --image-opts file.filename=disk :: c :: open driver=raw,file.filename=disk :: info
        --image-opts file.filename=disk :: c :: open -o driver=raw disk :: open foo :: open file.filename=nope
        ",
    );
    same_disk(&both, "qcow2", "disk");
}

/// Formats that Tandem has not are refused by name.
#[test]
fn foreign_formats() {
    let place = Place::tandem();
    disks(&place);
    for (args, name) in [
        (&["foreign"][..], "vmdk"),
        (&["-f", "vdi", "disk"], "vdi"),
        (&["-f", "nbd", "disk"], "nbd"),
        (
            &["--image-opts", "driver=quorum,children.0.filename=disk"],
            "quorum",
        ),
    ] {
        let found = run(&place, TANDEM, args, "");
        assert_eq!(found.status, Some(1));
        let expected = format!("Unknown driver '{name}'\n");
        assert!(found.stderr.ends_with(&expected), "{}", found.stderr);
    }
    let found = run(&place, TANDEM, &["nbd:disk"], "");
    let expected = "qemu-io: can't open device nbd:disk: Unknown protocol 'nbd'\n";
    assert_eq!((found.status, &*found.stderr), (Some(1), expected));
}

#[test]
fn names_that_lead_elsewhere() {
    let place = Place::tandem();
    disks(&place);
    std::fs::create_dir(place.path("sub")).unwrap();
    place.make("create -q -f qcow2 -u -b ../raw -F raw sub/up 1M");
    let found = run(&place, TANDEM, &args("sub/up :: read 0 1"), "");
    assert_eq!(found.status, Some(1));
    assert!(found.stderr.contains("lies outside the image's directory"));
    let case = args("--follow=anywhere sub/up :: read 0 1 :: c :: open sub/up :: length");
    let found = run(&place, TANDEM, &case, "");
    assert_eq!(found.status, Some(0), "{}", found.stderr);
}

/// While the other program has the image open.
#[test]
fn locks() {
    let both = Both::new(disks);
    for mode in ["-t unsafe", "-r"] {
        let holding = format!("{mode} disk :: sleep 1500");
        std::thread::scope(|scope| {
            let holders = [(&both.qemu, QEMU), (&both.tandem, QEMU)];
            let holders = holders.map(|(place, program)| {
                let holding = args(&holding);
                scope.spawn(move || run(place, program, &holding, ""))
            });
            std::thread::sleep(std::time::Duration::from_millis(600));
            for case in ["", "-r", "-r -U"] {
                let case = format!("{case} disk :: length");
                let found = run(&both.tandem, TANDEM, &args(&case), "");
                let expected = run(&both.qemu, QEMU, &args(&case), "");
                assert_eq!(found, expected, "{mode}: {case}");
            }
            for holder in holders {
                assert_eq!(holder.join().unwrap().status, Some(0));
            }
        });
    }
}

/// What a node is cannot be changed while it is open; to say the same again changes nothing.
#[test]
fn reopening() {
    let both = Both::new(disks);
    same(
        &both,
        "top :: reopen -o node-name=x :: reopen -o file.node-name=x :: reopen -o backing.node-name=x
        top :: reopen -o driver=raw :: reopen -o file.driver=qcow2 :: reopen -o backing.driver=file
        disk :: reopen -o driver=qcow2 :: reopen -o file.driver=file :: length :: reopen -o auto-read-only=x
        :: open -o node-name=x disk :: reopen -o node-name=x :: reopen :: length
        :: open -o file.node-name=x disk :: reopen -o file.node-name=x :: reopen -o file.node-name=y
        disk :: reopen -o l2-cache-entry-size=4k :: length
        :: open -o l2-cache-entry-size=256 disk :: open -o l2-cache-entry-size=5k disk
        :: open -o l2-cache-entry-size=4M disk :: open -o l2-cache-entry-size=4k disk :: length
        :: open -o cache-size=1M,l2-cache-size=1M,refcount-cache-size=1M disk
        :: open -o cache-size=1M,l2-cache-size=2M disk",
    );
}
