//! `check`

use std::fs;

use crate::run::{Both, Place, words};

const KINDS: [&str; 3] = ["", ",data_file=d", ",data_file=d,data_file_raw=on"];

/// What only `tandem-img` looks for.
const ADDED: [&str; 3] = [
    "is not at its guest offset",
    "Raw data file has data where the disk reads as zero",
    " data file has ",
];

/// What only `qemu-img` says.
fn is_qemus(line: &str) -> bool {
    line.starts_with("qcow2: Image is corrupt:")
}

fn is_added(line: &str) -> bool {
    ADDED.iter().any(|added| line.contains(added))
}

/// An image `t` of a kind with a bit of everything in it.
fn image(place: &Place, cluster_size: u64, kind: &str) {
    let size = 300 * cluster_size;
    place.make(&format!(
        "create -q -f qcow2 -o cluster_size={cluster_size}{kind} t {size}"
    ));
    let at = |clusters: u64| clusters * cluster_size;
    let mut commands = vec![
        format!("write {} {}", at(3), at(20)),
        format!("write -z {} {}", at(10), at(40)),
        format!("write -zu {} {}", at(12), at(2)),
        format!("write {} {}", at(100), at(3)),
        format!("discard {} {}", at(101), at(1)),
    ];
    if kind.is_empty() {
        commands.push(format!("write -c {} {}", at(200), at(1)));
    }
    let commands: Vec<_> = commands.iter().map(String::as_str).collect();
    place.qemu_io("t", &commands);
}

/// As [`image`], an internal one with snapshots, of which one is like the disk no more.
fn image_with_snapshots(place: &Place, cluster_size: u64) {
    image(place, cluster_size, "");
    place.make("snapshot -c first t");
    place.qemu_io(
        "t",
        &[&format!("write {} {}", 5 * cluster_size, 40 * cluster_size)],
    );
    place.make("snapshot -c second t");
    place.qemu_io(
        "t",
        &[&format!("write {} {}", 8 * cluster_size, cluster_size)],
    );
}

#[test]
fn sound_images() {
    for cluster_size in [512, 65536, 2 << 20] {
        for kind in KINDS {
            let both = Both::in_memory(|place| image(place, cluster_size, kind));
            for options in ["", "-q", "--output=json", "-q --output=json", "-U -f qcow2"] {
                both.same(&format!("check {options} t"));
            }
        }
    }
    let both = Both::in_memory(|place| image_with_snapshots(place, 4096));
    both.same("check t");
    let both = Both::in_memory(|place| image(place, 65536, ",extended_l2=on"));
    both.same("check t");
}

#[test]
fn fails_the_same() {
    let both = Both::in_memory(|place| {
        image(place, 4096, ",data_file=d");
        fs::write(place.path("raw"), [7; 1000]).unwrap();
        place.make("create -q -f qcow2 -o data_file=gone alone 1M");
        fs::remove_file(place.path("gone")).unwrap();
    });
    let lines = "
        check
        check t t
        check missing
        check alone
        check raw
        check -f raw t
        check -f qcow2 raw
        check -f foo t
        check -r foo t
        check -U -r all t
        check --output=foo t
        check --output=json raw
    ";
    for line in lines.trim().lines() {
        both.same(line);
    }
}

/// Places of both programs, with equal sound images of each kind.
fn sound_places() -> Vec<(Both, String)> {
    let mut places = Vec::new();
    for cluster_size in [512, 4096] {
        for kind in KINDS {
            let both = Both::in_memory(|place| image(place, cluster_size, kind));
            places.push((both, format!("{cluster_size}{kind}")));
        }
        let both = Both::in_memory(|place| image_with_snapshots(place, cluster_size));
        places.push((both, format!("{cluster_size} with snapshots")));
    }
    let both = Both::in_memory(|place| image(place, 16384, ",extended_l2=on"));
    places.push((both, "subclusters".to_owned()));
    let both = Both::in_memory(|place| {
        image(place, 4096, ",data_file=d");
        place.make("bitmap --add t some");
        place.qemu_io("t", &["write 0 1M"]);
    });
    places.push((both, "bitmaps".to_owned()));
    // The dates of snapshots differ.
    for (both, _) in &places {
        fs::copy(both.qemu.path("t"), both.tandem.path("t")).unwrap();
    }
    places
}

/// Calls `f` for each of the sound places, all at the same time: most of it is waiting for the disk.
/// Each has random numbers of its own.
fn in_each_place(seed: u64, f: impl Fn(&Both, &str, &mut Random) + Sync) {
    let places = sound_places();
    std::thread::scope(|scope| {
        for (i, (both, kind)) in (0..).zip(&places) {
            let f = &f;
            scope.spawn(move || f(both, kind, &mut Random(seed + i)));
        }
    });
}

/// Random damage to the tables: the findings are those of `qemu-img`, line for line.
#[test]
fn random_damage() {
    in_each_place(0x7461_6e64_656d, |Both { qemu, tandem }, kind, random| {
        let sound = fs::read(qemu.path("t")).unwrap();
        for _ in 0..40 {
            let (damaged, what) = damage(&sound, random);
            for place in [qemu, tandem] {
                fs::write(place.path("t"), &damaged).unwrap();
            }
            compare(qemu, tandem, &format!("{kind}: {what}"));
            assert_eq!(fs::read(tandem.path("t")).unwrap(), damaged);
        }
    });
}

/// QEMU may take an offset far away for the end of the image, and would count and store refcounts up to
/// there: an image must not become so long, and a repair that fails for that is not compared.
const SHORT: u64 = 16 << 20;

/// What a repair leaves is what `qemu-img check` finds then, nothing if it says so, and the guest's
/// data is as it was.
#[test]
fn repairs_of_random_damage() {
    in_each_place(0x7265_7061_6972, |Both { qemu, tandem }, kind, random| {
        let sound = fs::read(qemu.path("t")).unwrap();
        let data = fs::read(tandem.path("d")).ok();
        let mut clean = 0;
        for round in 0..40 {
            let (damaged, what) = damage(&sound, random);
            let what = format!("{kind}: {what}");
            let mode = if round % 4 == 0 { "leaks" } else { "all" };
            let (by_qemu, is_clean) = std::thread::scope(|scope| {
                let by_qemu = scope.spawn(|| {
                    fs::write(qemu.path("t"), &damaged).unwrap();
                    qemu.qemu_img_within(SHORT, &words("check -q -r all -f qcow2 t"))
                });
                fs::write(tandem.path("t"), &damaged).unwrap();
                if let Some(data) = &data {
                    fs::write(tandem.path("d"), data).unwrap();
                }
                let is_clean = repair(tandem, mode, &what);
                (by_qemu.join().unwrap(), is_clean)
            });
            clean += usize::from(is_clean);
            // Whatever QEMU makes of it, we find no more than QEMU.
            if by_qemu.status == Some(0) {
                let found = fs::copy(qemu.path("t"), tandem.path("t"))
                    .map(|_| tandem.run(&words("check -q -f qcow2 t")).stderr)
                    .unwrap();
                let found: Vec<_> = found.lines().filter(|line| !is_added(line)).collect();
                assert!(found.is_empty(), "{what}: after QEMU's repair: {found:?}");
            }
        }
        // What a raw data file holds is left alone where the mapping may be what is lost.
        let least = if kind.contains("data_file_raw") {
            5
        } else {
            11
        };
        assert!(clean >= least, "{kind}: {clean} of 40 repaired");
    });
}

/// Repairs the image `t`; tells whether all of it could be.
fn repair(place: &Place, mode: &str, what: &str) -> bool {
    let before = content(place);
    let repaired = place.run(&["check", "-q", "-r", mode, "-f", "qcow2", "t"]);
    assert_ne!(repaired.status, None, "{what}");
    let left = place.run(&words("check -q -f qcow2 t"));
    assert_eq!(left.status, repaired.status, "{what}: {}", left.stderr);
    compare_left(place, &left.stderr, what);
    // QEMU may stop at what it had not met before.
    if let Some(before) = before
        && mode == "all"
    {
        assert!(
            content(place) == Some(before),
            "{what}: {:?}",
            place.qemu_img(&words("convert -t unsafe -f qcow2 -O raw t converted"))
        );
    }
    left.status == Some(0)
}

/// The disk as QEMU reads it, if it can.
fn content(place: &Place) -> Option<Vec<u8>> {
    let converted = place.qemu_img(&words("convert -t unsafe -f qcow2 -O raw t converted"));
    (converted.status == Some(0)).then(|| fs::read(place.path("converted")).unwrap())
}

/// `qemu-img check` finds what `left` says, but for what only one program looks at.
fn compare_left(place: &Place, left: &str, what: &str) {
    let expected = place.qemu_img(&words("check -q -f qcow2 t")).stderr;
    let lines = |text: &str| -> Vec<String> {
        let lines = text
            .lines()
            .filter(|line| !is_added(line) && !is_qemus(line));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(lines(left), lines(&expected), "{what}");
}

/// Compares the results of a check, all but what is found on purpose by one of the programs.
fn compare(qemu: &Place, tandem: &Place, what: &str) {
    let args = words("check -f qcow2 t");
    let (expected, found) = (qemu.run(&args), tandem.run(&args));
    let lines = |text: &str| -> Vec<String> {
        text.lines()
            .filter(|line| !is_added(line) && !is_qemus(line))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(lines(&found.stderr), lines(&expected.stderr), "{what}");
    if found.stderr.lines().any(is_added) {
        assert_eq!(
            found.status,
            expected
                .status
                .map(|status| if status == 1 { 1 } else { 2 })
        );
    } else {
        assert_eq!(
            (found.status, found.stdout),
            (expected.status, expected.stdout),
            "{what}"
        );
    }
}

/// Changes an entry or two of the L1 table, the refcount structures, or an L2 table.
fn damage(sound: &[u8], random: &mut Random) -> (Vec<u8>, String) {
    let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    let cluster_size = 1usize << sound[23];
    let clusters = (sound.len() / cluster_size) as u64;
    let offset = |entry: u64| (entry & 0x00ff_ffff_ffff_fe00) as usize;
    let (l1, refcount_table) = (word(40) as usize, word(48) as usize);
    let l1_size = word(32) as usize & 0xffff_ffff;
    let mut damaged = sound.to_vec();
    let mut what = String::new();
    for _ in 0..1 + random.below(2) {
        let l2 = offset(word(l1 + 8 * random.below(l1_size as u64) as usize));
        let at = match random.below(4) {
            0 => l1 + 8 * random.below(l1_size as u64) as usize,
            1 => refcount_table + 8 * random.below(2) as usize,
            2 => word(refcount_table) as usize + 8 * random.below(clusters.div_ceil(4)) as usize,
            _ if l2 > 0 => l2 + 8 * random.below(cluster_size as u64 / 8) as usize,
            _ => continue,
        };
        let old = u64::from_be_bytes(damaged[at..at + 8].try_into().unwrap());
        let new = match random.below(5) {
            0 => 0,
            1 => old ^ (1 << random.below(64)),
            2 => old.wrapping_add(cluster_size as u64),
            3 => (random.below(clusters + 3) * cluster_size as u64) | (random.below(2) << 63),
            _ => random.below(u64::MAX) >> random.below(64),
        };
        damaged[at..at + 8].copy_from_slice(&new.to_be_bytes());
        what += &format!("{old:#x} at {at:#x} becomes {new:#x}; ");
    }
    if random.below(10) == 0 {
        let len = random.below(sound.len() as u64);
        damaged.truncate(len as usize);
        what += &format!("cut at {len}");
    }
    (damaged, what)
}

/// The same numbers in every run (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// What is wrong is told before it is repaired, and after all other text of the other channel in a pipe.
#[test]
fn what_is_repaired_is_told_first() {
    for mode in ["leaks", "all"] {
        let both = Both::in_memory(|place| {
            place.make("create -q -f qcow2 t 1M");
            place.qemu_io("t", &["write 0 256k"]);
            let mut bytes = fs::read(place.path("t")).unwrap();
            // Refcounts of 16 bits: one too high, and a leak.
            bytes[0x20000 + 7 * 2 + 1] = 2;
            bytes[0x20000 + 20 * 2 + 1] = 1;
            // A cluster that is mapped twice.
            bytes.copy_within(0x40000..0x40008, 0x40008);
            bytes.resize(21 << 16, 0);
            fs::write(place.path("t"), bytes).unwrap();
        });
        both.same("check t");
        both.same(&format!("check -r {mode} t"));
    }
}
