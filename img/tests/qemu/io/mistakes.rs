//! Commands that cannot be carried out: equal words, and nothing changes.

use std::process::Command;

use super::{TANDEM, args, run, runs, same};
use crate::run::{Both, Place, len};

fn disks(place: &Place) {
    place.make("create -q -f qcow2 disk 1M");
    place.make("create -q -f raw raw 1M");
    std::fs::write(place.path("empty"), "").unwrap();
    std::fs::create_dir(place.path("directory")).unwrap();
}

#[test]
fn numbers() {
    let both = Both::new(disks);
    let before = both.tandem.content();
    same(
        &both,
        "
        disk :: read x 1 :: read 0 x :: read 0 1x :: read 0 1kB :: read 1.5 1 :: read 0 1e3
        disk :: read -- -1 512 :: read 0 -- -1 :: read -1 512 :: read 0 16E :: read 8E 1
        disk :: read 0 2G :: read 0 2147483137 :: read 0 2147483136 :: read 0 99999999999999999999
        disk :: read 1M 1 :: read 1048575 2 :: read 2M 0 :: read 0x100000 1 :: read 7E 1k
        disk :: write x 1 :: write 0 x :: write -- -1 1 :: write 0 2G :: write 1M 1 :: write 0 8E
        disk :: write -z 1M 1 :: write -z 0 2G :: write -zn 0 2G :: write -zn 0 8E
        disk :: writev 0 x :: writev 0 1 x :: writev 0 2G :: writev 0 1G 1G :: writev 1M 1 :: writev x 1
        disk :: readv 0 x :: readv 0 2G 1 :: readv 0 1G 1G :: readv 1023k 1k 1 :: readv x 1
        disk :: aio_read 0 x :: aio_read x 1 :: aio_read 1M 1 :: aio_read 0 2G :: aio_flush
        disk :: aio_write 0 x :: aio_write x 1 :: aio_write 1M 1 :: aio_write 0 1G 1G :: aio_flush
        disk :: aio_write -z 1M 1 :: aio_flush :: aio_write -z x 1 :: aio_write -z 0 x :: aio_flush
        disk :: discard x 1 :: discard 0 x :: discard 0 2G :: discard 1M 1 :: discard 2M 0
        disk :: alloc x :: alloc 0 x :: alloc 2M :: alloc 1M 1 :: alloc -1 :: alloc 0 8E :: alloc 16E
        disk :: truncate x :: truncate 1000 :: truncate 99999P :: truncate 8E :: truncate
        -f raw raw :: truncate x :: truncate 8E :: read 1M 1 :: write 1048575 2 :: discard 0 2M
        ",
    );
    assert!(both.tandem.content() == before);
}

#[test]
fn flags() {
    let both = Both::new(disks);
    let before = both.tandem.content();
    same(
        &both,
        "
        disk :: read -x 0 1 :: read 0 1 -x :: read --v 0 1 :: read -P :: read -a 0 1 :: read -P 1
        disk :: read -P x 0 1 :: read -P 256 0 1 :: read -P -1 0 1 :: read -P 0x 0 1 :: read -P 09 0 1
        disk :: read -s 1 0 512 :: read -l 1 0 512 :: read -P 0 -s 513 0 512 :: read -P 0 -l 513 0 512
        disk :: read -P 0 -s 8E 0 1 :: read -P 0 -s x 0 1 :: read -P 0 -l x 0 1 :: read -P 0 -s 500 -l 13 0 512
        disk :: read -b 1 512 :: read -b 0 1 :: read -br 0 512 :: read -P 0 -s 512 0 512
        disk :: read 0 :: read :: read 0 1 2 :: readv :: readv 0 :: readv -P 1 0 :: readv -x 0 1
        disk :: readv -P 300 0 1 :: aio_read 0 :: aio_read -x 0 1 :: aio_read -P 300 0 1 :: aio_read -P 1 0
        disk :: write -x 0 1 :: write 0 :: write 0 1 2 :: write -P 300 0 1 :: write -s :: write -qq
        disk :: write -b -z 0 512 :: write -f -c 0 512 :: write -f -b 0 512 :: write -n 0 1 :: write -u 0 1
        disk :: write -z -P 1 0 1 :: write -z -s empty 0 1 :: write -P 1 -s empty 0 1 :: write -zr 0 1
        disk :: write -s nope 0 1 :: write -s empty 0 1 :: write -s directory 0 1 :: write -s empty 2M 1
        disk :: write -c 1 512 :: write -c 0 5 :: write -b 1 512 :: write -b 0 5
        disk :: writev :: writev 0 :: writev -x 0 1 :: writev -z 0 1 :: writev -P 1 0 :: writev -P x 0 1
        disk :: aio_write 0 :: aio_write -x 0 1 :: aio_write -u 0 1 :: aio_write -z 0 1 2
        disk :: aio_write -zr 0 1 :: aio_write -P 300 0 1 :: aio_write -z 0 :: aio_write -P 1 0
        disk :: discard :: discard 0 :: discard 0 1 2 :: discard -x 0 1 :: discard -P 1 0
        disk :: flush 1 :: length 1 :: info 1 :: map 1 :: aio_flush 1 :: close 1 :: alloc :: alloc 1 2 3
        disk :: truncate -m :: truncate -m foo 2M :: truncate -x 1M :: truncate -m off :: truncate 1 2 3 4
        disk :: truncate -m off x :: truncate x -m off :: truncate -- x :: truncate -moff x
        disk :: truncate -m metadata 512k :: truncate -m falloc 1k :: truncate -m full 512k
        -f raw raw :: truncate -m metadata 2M :: truncate -m falloc 1k :: truncate -m full 512k
        disk :: foo :: read0 :: READ 0 1 :: help foo :: help a b :: ? foo :: sleep :: sleep x :: sleep -1
        disk :: sleep 1 :: sleep 0x1 :: sigraise x :: sigraise 66 :: sigraise 0 :: sigraise
        disk :: quit 1 2 :: foo
        disk :: q :: foo
        disk ::   ::  length  :: read   -q  0   512
        disk :: reopen -x :: reopen 1 :: reopen -r -w :: reopen -c foo :: reopen -c
        disk :: reopen -r -o read-only=on :: reopen -c none -o cache.direct=on
        ",
    );
    assert!(both.tandem.content() == before);
}

/// A raw image has no state of a virtual machine, and none is put into a data file.
#[test]
fn vm_state() {
    let both = Both::new(disks);
    same(
        &both,
        "-f raw raw :: write -b 0 512 :: read -b 0 512
        disk :: write -b 1 512 :: write -b 0 5 :: read -b 3 512 :: read -b 0 1 :: write -bz 0 512
        disk :: read -b 0 512 :: read -b 8E 512 :: write -b 7E 1M",
    );
    both.tandem
        .make("create -q -f qcow2 -o data_file=state.raw state 1M");
    let args = args("state :: write -b 0 512 :: read -P 0 -b 0 512");
    let found = run(&both.tandem, super::TANDEM, &args, "");
    assert_eq!(found.status, Some(1));
    assert!(
        found
            .stderr
            .contains("VM state in an image with a data file")
    );
    both.tandem.make("check -q state");
}

#[test]
fn commands_that_are_missing() {
    let place = Place::tandem();
    disks(&place);
    for command in ["zone_report 0 1", "zo 0 1", "break a b", "wait_break a"] {
        let found = run(&place, super::TANDEM, &["-c", command, "disk"], "");
        assert_eq!(found.status, Some(1));
        let name = command.split(' ').next().unwrap();
        assert_eq!(found.stderr, format!("Command not supported yet: {name}\n"));
    }
}

#[test]
fn nothing_is_open() {
    let both = Both::new(disks);
    for command in [
        "read 0 1",
        "write 0 1",
        "read",
        "length",
        "map",
        "info",
        "flush",
        "discard 0 1",
        "close",
        "truncate 0",
        "alloc 0",
        "aio_flush",
        "reopen",
        "quit",
        "sleep 0",
        "foo",
        "",
    ] {
        let [expected, found] = runs(&both, &["-c", command], "");
        assert_eq!(found, expected, "{command}");
    }
}

#[test]
fn read_only() {
    let both = Both::new(disks);
    let before = both.tandem.content();
    same(
        &both,
        "
        -r disk :: write 0 512 :: writev 0 1 :: aio_write 0 1 :: discard 0 1 :: truncate 2M :: flush
        -r disk :: write :: write -x :: write -z 0 1 :: read -P 0 0 512 :: reopen -r :: length
        -r -f raw raw :: write 0 512 :: read 0 512 :: flush :: truncate 2M :: map
        -r raw :: read 0 512
        --read-only disk :: write 0 1
        ",
    );
    assert!(both.tandem.content() == before);
}

/// A disk that was taken for raw must not become something else.
#[test]
fn a_guess_stays_true() {
    let both = Both::new(|place| {
        disks(place);
        std::fs::write(place.path("header"), b"QFI\xfb\0\0\0\x03").unwrap();
        std::fs::write(place.path("part"), b"\xfb\0\0\0\x03").unwrap();
        std::fs::write(place.path("vmdk"), b"KDMV").unwrap();
    });
    same(
        &both,
        "
        raw :: write -s header 0 512 :: write -s header 512 512 :: write -s vmdk 0 4
        raw :: write -P 1 0 512 :: write 100 5 :: write -z 0 1 :: write -s header 0 64k
        raw :: write -P 0x51 0 1 :: write -P 0x46 1 1 :: write -P 0x49 2 1 :: write -s part 3 5
        -f raw raw :: write -s header 0 512 :: read -v 0 16
        ",
    );
    both.same_bytes("raw");
}

/// A bitmap is stored when its image is closed, and finds no room there.
#[test]
fn an_error_on_closing_is_told() {
    const IMG: &str = env!("CARGO_BIN_EXE_tandem-img");
    for (program, arguments) in [
        (TANDEM, "-c 'write 0 64k' disk"),
        (IMG, "bench -w -c 1 -f qcow2 disk"),
        (IMG, "convert -n -O qcow2 source disk"),
    ] {
        let place = Place::tandem();
        place.make("create -q -f qcow2 disk 1M");
        place.qemu_io("disk", &["write 0 1M"]);
        place.make("bitmap --add disk b");
        std::fs::write(place.path("source"), vec![7; 1 << 20]).unwrap();
        // A file that would become longer is an error then, and not a signal.
        let most = len(&place, "disk").div_ceil(1024);
        let line = format!("trap '' XFSZ; ulimit -f {most}; exec '{program}' {arguments}");
        let run = Command::new("bash")
            .args(["-c", &line])
            .current_dir(place.path(""))
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(1), "{arguments}: {stderr}");
        assert!(stderr.contains("File too large"), "{arguments}: {stderr}");
    }
}
