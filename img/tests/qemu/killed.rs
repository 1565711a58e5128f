//! Every operation that takes long is killed at random moments. The image opens then, `check` finds
//! leaks at most, and what the disks hold is what they held before, or what they hold after the operation.
//!
//! `TANDEM_KILLS=100` has each of them killed a hundred times; without it, a third of them is killed once.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::chains::Random;
use crate::run::{Place, Run, words};

/// An operation, and what becomes of the images.
struct Operation {
    /// Lines of `tandem-img` that make what it works on, or `io IMAGE: COMMAND; COMMAND…` of `qemu-io`.
    prepare: Vec<String>,
    line: String,
    /// In the order in which they may change.
    images: Vec<(&'static str, Judged)>,
}

/// What the disk of an image may hold after the kill.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Judged {
    /// What it held before.
    Same,
    /// What it held before, if it was there, or what it holds after the operation.
    Either,
    /// Each sector by itself is as before or as after.
    Mixed,
    /// What it held before; it was damaged, and can be repaired still.
    Repaired,
}

use Judged::{Either, Mixed, Repaired, Same};

impl Operation {
    fn new(prepare: &[&str], line: &str, images: &[(&'static str, Judged)]) -> Self {
        Self {
            prepare: prepare.iter().map(|line| line.to_string()).collect(),
            line: line.to_owned(),
            images: images.to_vec(),
        }
    }

    /// What is said by whoever knows such images: QEMU, but for what is Tandem's own.
    fn ask(&self, place: &Place, line: &str) -> Run {
        let mut lines = self.prepare.iter().chain([&self.line]);
        match lines.any(|line| line.contains("packed")) {
            true => place.run(&words(line)),
            false => place.qemu_img(&words(line)),
        }
    }
}

/// Where the data of `disk` is: creation options, and whether it can have snapshots and a backing file.
const KINDS: [(&str, bool, bool); 5] = [
    ("cluster_size=4k", true, true),
    ("cluster_size=16k,extended_l2=on", true, true),
    (
        "cluster_size=4k,data_file=disk.d,data_file_raw=off",
        false,
        true,
    ),
    (
        "cluster_size=4k,data_file=disk.d,data_file_raw=on",
        false,
        false,
    ),
    (
        "cluster_size=4k,data_file=disk.d,data_file_layout=packed",
        false,
        true,
    ),
];

/// Those for images of each kind.
fn operations_on((kind, snapshots, backing): (&str, bool, bool)) -> Vec<Operation> {
    let disk = &*format!("convert -f raw -O qcow2 -o {kind} a disk");
    let out = kind.replace("disk.d", "out.d");
    let mut all = vec![
        Operation::new(&[disk], "resize -q disk +3M", &[("disk", Either)]),
        Operation::new(&[disk], "resize -q --shrink disk 1M", &[("disk", Either)]),
        Operation::new(
            &[disk],
            "resize -q --preallocation=full disk +2M",
            &[("disk", Either)],
        ),
        Operation::new(
            &[
                disk,
                "create -q -f qcow2 -b disk -F qcow2 top",
                "io top: write -P 7 512k 3M",
            ],
            "commit -q top",
            &[("top", Same), ("disk", Mixed)],
        ),
        Operation::new(
            &[],
            &format!("convert -f raw -O qcow2 -o {out} a out"),
            &[("out", Either)],
        ),
        Operation::new(
            &[disk],
            "convert -n -f raw -O qcow2 b disk",
            &[("disk", Mixed)],
        ),
        Operation::new(
            &[],
            &format!("create -q -f qcow2 -o preallocation=full,{out} out 3M"),
            &[("out", Either)],
        ),
    ];
    if backing {
        let top = &*format!("create -q -f qcow2 -o {kind} -b a -F raw disk");
        let write = "io disk: write -P 7 512k 1M; write -z 2M 64k";
        for line in ["rebase -b b -F raw disk", "rebase -b '' disk"] {
            all.push(Operation::new(&[top, write], line, &[("disk", Same)]));
        }
    }
    if snapshots {
        let prepare = [disk, "snapshot -c one disk", "io disk: write -P 7 512k 3M"];
        for (line, judged) in [
            ("snapshot -c two disk", Same),
            ("snapshot -a one disk", Either),
            ("snapshot -d one disk", Same),
        ] {
            all.push(Operation::new(&prepare, line, &[("disk", judged)]));
        }
    }
    all
}

/// The others.
fn operations() -> Vec<Operation> {
    let disk = "convert -f raw -O qcow2 -o cluster_size=4k a disk";
    let packed = "convert -f raw -O qcow2 -o cluster_size=4k,data_file=disk.d,data_file_layout=packed a disk";
    let old = "convert -f raw -O qcow2 b out";
    let mut all: Vec<_> = KINDS.into_iter().flat_map(operations_on).collect();
    for line in [
        "convert -O raw disk out",
        "convert -c -O qcow2 disk out",
        "convert -O qcow2 -o data_file=out.d disk out",
        "create -q -f qcow2 -o preallocation=metadata,cluster_size=4k out 4M",
        "create -q -f raw -o preallocation=falloc out 4M",
        "dd -f qcow2 -O qcow2 bs=4k if=disk of=out",
        "dd -f qcow2 -O raw bs=4k if=disk of=out",
    ] {
        for prepare in [vec![disk], vec![disk, old]] {
            all.push(Operation::new(
                &prepare,
                line,
                &[("out", Either), ("disk", Same)],
            ));
        }
    }
    for change in [
        "compat=0.10",
        "refcount_bits=64",
        "refcount_bits=1",
        "lazy_refcounts=on",
    ] {
        let line = format!("amend -q -o {change} disk");
        all.push(Operation::new(&[disk], &line, &[("disk", Same)]));
    }
    let bitmaps = [
        disk,
        "bitmap --add -g 512 disk one",
        "bitmap --add -g 512 disk two",
        "io disk: write -P 7 512k 2M",
    ];
    for line in [
        "bitmap --add -g 512 disk three",
        "bitmap --merge one disk two",
        "bitmap --clear disk one",
        "bitmap --remove disk one",
        "bitmap --remove --add -g 64k disk one",
    ] {
        all.push(Operation::new(&bitmaps, line, &[("disk", Same)]));
    }
    let backups = [
        disk,
        "backup -q --track one disk full",
        "backup -q -O stream disk stream",
        "io disk: write -P 7 512k 2M",
    ];
    for line in [
        // The bitmap tells what has changed, until the target is there.
        "backup -q --since one -b full -F qcow2 disk out",
        "backup -q -O raw disk out",
        "restore -q -O qcow2 stream out",
        "restore -q -O raw stream out",
    ] {
        let images = [("out", Either), ("disk", Same)];
        all.push(Operation::new(&backups, line, &images));
    }
    for prepare in [disk, packed] {
        for line in ["check -q -r leaks disk", "check -q -r all disk"] {
            all.push(Operation::new(
                &[prepare, "damage disk"],
                line,
                &[("disk", Repaired)],
            ));
        }
    }
    all
}

/// What can be seen of an image: its disk, those of its snapshots, and its bitmaps.
#[derive(Clone, PartialEq, Eq)]
struct Seen {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    bitmaps: Value,
}

impl Seen {
    /// `None` if the image is not there.
    fn of(operation: &Operation, place: &Place, image: &str) -> Option<Self> {
        if !place.path(image).exists() {
            return None;
        }
        let run = |line: &str| {
            let run = operation.ask(place, line);
            assert_eq!(run.status, Some(0), "{line}: {}", run.stderr);
            run.stdout
        };
        let read = |options: &str| {
            run(&format!("convert {options} -O raw {image} seen"));
            fs::read(place.path("seen")).unwrap()
        };
        let format = format(&place.path(image));
        let info: Value =
            serde_json::from_str(&run(&format!("info --output=json -f {format} {image}"))).unwrap();
        let names = info["snapshots"].as_array().into_iter().flatten();
        let names = names.filter_map(|snapshot| snapshot["name"].as_str());
        Some(Self {
            disk: read(&format!("-f {format}")),
            snapshots: names
                .map(|name| (name.to_owned(), read(&format!("-f {format} -l {name}"))))
                .collect(),
            bitmaps: info["format-specific"]["data"]["bitmaps"].clone(),
        })
    }
}

fn format(path: &Path) -> &'static str {
    match fs::read(path).unwrap().starts_with(b"QFI\xfb") {
        true => "qcow2",
        false => "raw",
    }
}

/// Whether what is `found` may be there after an operation that was to make `after` of `before`; if not,
/// what is wrong.
fn allowed(
    judged: Judged,
    found: &Option<Seen>,
    before: &Option<Seen>,
    after: &Option<Seen>,
) -> Result<(), &'static str> {
    let disk = |seen: &Option<Seen>| seen.as_ref().map(|seen| seen.disk.clone());
    let is_right = match judged {
        Same | Repaired => disk(found) == disk(before),
        Either => [disk(before), disk(after)].contains(&disk(found)),
        Mixed => {
            let [found, before, after] = [found, before, after].map(|seen| disk(seen).unwrap());
            let pairs = before.chunks(512).zip(after.chunks(512));
            let mut sectors = found.chunks(512).zip(pairs);
            sectors.all(|(found, (before, after))| found == before || found == after)
        }
    };
    if !is_right {
        return Err("the disk is another one");
    }
    let others = |seen: &Option<Seen>| {
        let seen = seen.as_ref()?;
        Some((seen.snapshots.clone(), seen.bitmaps.clone()))
    };
    match [others(before), others(after)].contains(&others(found)) {
        true => Ok(()),
        false => Err("it has other snapshots or bitmaps"),
    }
}

/// Makes the files that `operation` works on.
fn prepare(operation: &Operation) -> Place {
    let place = Place::in_memory();
    // Holes and data, by stretches of a size that no cluster has.
    for (name, fill) in [("a", 1), ("b", 101)] {
        let bytes = (0..4 << 20).map(|at: u32| match at / 100_000 % 3 {
            0 => 0,
            stretch => (fill + stretch + at / 4096 % 50) as u8,
        });
        fs::write(place.path(name), bytes.collect::<Vec<_>>()).unwrap();
    }
    for line in &operation.prepare {
        if let Some((image, commands)) = line.strip_prefix("io ").and_then(|io| io.split_once(": "))
        {
            let commands: Vec<_> = commands.split("; ").collect();
            place.tandem_io(image, &commands);
        } else if let Some(image) = line.strip_prefix("damage ") {
            damage(&place.path(image));
        } else {
            let run = place.run(&words(line));
            assert_eq!(run.status, Some(0), "{line}: {}", run.stderr);
        }
    }
    place
}

/// Raises and lowers many counts of clusters.
fn damage(image: &Path) {
    let mut bytes = fs::read(image).unwrap();
    let number = |bytes: &[u8], at: usize| {
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
    };
    let table = number(&bytes, 48);
    let block = number(&bytes, table);
    for count in (100..1000).step_by(3) {
        bytes[block + 2 * count + 1] ^= 1;
    }
    fs::write(image, bytes).unwrap();
}

/// Kills `operation` so many times, and returns how often it had not ended by then.
fn kill(operation: &Operation, times: u64, random: &mut Random) -> u64 {
    let template = prepare(operation);
    let seen = |place: &Place| -> Vec<_> {
        let images = operation.images.iter();
        images
            .map(|(image, _)| Seen::of(operation, place, image))
            .collect()
    };
    let before = seen(&template);
    let whole = template.copy();
    let begin = Instant::now();
    let run = whole.run(&words(&operation.line));
    let mut time = begin.elapsed().as_micros() as u64;
    assert!(
        matches!(run.status, Some(0 | 2 | 3)),
        "{}: {}",
        operation.line,
        run.stderr
    );
    let after = seen(&whole);

    let mut killed = 0;
    for _ in 0..times {
        let place = template.copy();
        let delay = Duration::from_micros(random.below(time));
        if place.kill_after(&words(&operation.line), delay) {
            killed += 1;
        } else {
            // The machine is quicker by now.
            time -= time / 8;
        }
        let context = format!(
            "{:?}, {}, killed after {delay:?}",
            operation.prepare, operation.line
        );
        let mut all_after = true;
        for (index, (image, judged)) in operation.images.iter().enumerate() {
            if place.path(image).exists() && format(&place.path(image)) == "qcow2" {
                sound(operation, &place, image, *judged, &context);
            }
            let found = Seen::of(operation, &place, image);
            let (before, after) = (&before[index], &after[index]);
            if let Err(why) = allowed(*judged, &found, before, after) {
                panic!("{context}: {image}: {why}");
            }
            if *judged != Mixed && before != after {
                let is_after = found == *after;
                assert!(
                    all_after || !is_after,
                    "{context}: {image} has changed too early"
                );
                all_after &= is_after;
            }
        }
    }
    killed
}

/// `check` finds leaks at most; what was damaged is repaired.
fn sound(operation: &Operation, place: &Place, image: &str, judged: Judged, context: &str) {
    if judged == Repaired {
        let repaired = place.run(&words(&format!("check -q -r all {image}")));
        assert_eq!(repaired.status, Some(0), "{context}: {}", repaired.stderr);
    }
    let check = operation.ask(place, &format!("check -f qcow2 {image}"));
    // 3: leaks, and nothing worse.
    let allowed = if judged == Repaired {
        &[0][..]
    } else {
        &[0, 3]
    };
    let status = check.status.unwrap();
    assert!(
        allowed.contains(&status),
        "{context}: {}{}",
        check.stdout,
        check.stderr
    );
}

#[test]
fn at_any_moment() {
    let asked = std::env::var("TANDEM_KILLS").ok();
    let asked: Option<u64> = asked.and_then(|times| times.parse().ok());
    let times = asked.unwrap_or(1);
    let mut operations = operations();
    if asked.is_none() {
        // Others the next time: when they are killed is never the same, either.
        let chosen = std::process::id() as usize % 3;
        let mut index = 0..;
        operations.retain(|_| index.next().is_some_and(|index: usize| index % 3 == chosen));
    }
    let all = operations.len();
    // Two at a time: they wait for their programs, most of the time.
    let killed = std::thread::scope(|scope| {
        let halves = operations.chunks(all.div_ceil(2)).zip(1..);
        let halves = halves.map(|(half, seed)| {
            scope.spawn(move || {
                let mut random = Random::new(seed);
                let killed = half.iter().map(|one| kill(one, times, &mut random));
                killed.sum::<u64>()
            })
        });
        let halves: Vec<_> = halves.collect();
        halves
            .into_iter()
            .map(|half| half.join().unwrap())
            .sum::<u64>()
    });
    assert!(
        killed > times * all as u64 / 8,
        "{killed} of {all} were killed in time"
    );
    println!("tandem-img: {killed} kills in {all} operations, nothing lost");
}
