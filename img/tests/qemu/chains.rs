//! Chains of images for tests.

use std::fs;
use std::path::Path;

use crate::run::{Both, Place};

/// Numbers that look random, the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) % end
    }

    fn of<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[self.below(all.len() as u64) as usize]
    }
}

/// How many random chains a test makes.
pub fn seeds() -> u64 {
    let given = std::env::var("TANDEM_CHAIN_SEEDS").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(8)
}

/// Makes a chain of images called `name` and a number, up to `top`; `name` and 0 is raw or qcow2, and
/// has nothing below it.
pub fn make(place: &Place, random: &mut Random, name: &str, top: u32) {
    for number in 0..=top {
        let image = format!("{name}{number}");
        let size = 64 * (1 + random.below(24)) * 1024 - 512 * random.below(2);
        let mut line = format!("create -q -f qcow2 {image} {size}");
        if number == 0 && random.below(2) == 0 {
            line = format!("create -q -f raw {image} {size}");
        } else {
            line += match random.below(6) {
                0 => " -o extended_l2=on",
                1 => " -o compat=0.10",
                2 => " -o compression_type=zstd",
                _ => "",
            };
            if !line.contains("extended") {
                line += random.of(&["", " -o cluster_size=512", " -o cluster_size=4k"]);
            }
            if random.below(3) == 0 && !line.contains("0.10") {
                line += &format!(" -o data_file={image}.data");
            }
        }
        if number > 0 {
            let below = format!("{name}{}", number - 1);
            line += &format!(" -b {below} -F {}", format(place, &below));
        }
        place.make(&line);
        write(place, random, &image, size);
    }
}

fn write(place: &Place, random: &mut Random, image: &str, size: u64) {
    let format = format(place, image);
    let mut commands = Vec::new();
    for _ in 0..3 + random.below(6) {
        let offset = random.below(size / 512) * 512;
        let len = (1 + random.below(256)) * 512;
        let len = len.min(size - offset);
        let pattern = 1 + random.below(3);
        commands.push(match random.below(6) {
            0 => format!("write -z {offset} {len}"),
            1 => format!("write -z -u {offset} {len}"),
            2 => format!("discard {offset} {len}"),
            _ => format!("write -P {pattern} {offset} {len}"),
        });
    }
    let commands: Vec<_> = commands.iter().map(String::as_str).collect();
    place.qemu_io_as(format, image, &commands);
}

/// The format of an image, as its first bytes tell.
pub fn format(place: &Place, image: &str) -> &'static str {
    let start = fs::read(place.path(image)).unwrap();
    if start.starts_with(b"QFI\xfb") {
        "qcow2"
    } else {
        "raw"
    }
}

/// What the disk of an image reads, as QEMU sees it.
pub fn content(place: &Place, image: &str) -> Vec<u8> {
    contents(place, format(place, image), &[image])
}

/// What the disks of images of this format read, one behind the other.
fn contents(place: &Place, format: &str, images: &[&str]) -> Vec<u8> {
    let out = "content";
    let options = ["convert", "-U", "-t", "unsafe", "-f", format, "-O", "raw"];
    let done = place.qemu_img(&[&options, images, &[out]].concat());
    assert_eq!(done.status, Some(0), "{images:?}: {}", done.stderr);
    let content = fs::read(place.path(out)).unwrap();
    fs::remove_file(place.path(out)).unwrap();
    content
}

/// Fails unless `image` reads the same in both places and is sound.
pub fn same_content(both: &Both, image: &str) {
    same_contents(both, &[image]);
}

/// Fails unless each of `images` reads the same in both places and is sound.
pub fn same_contents(both: &Both, images: &[&str]) {
    for wanted in ["qcow2", "raw"] {
        let mut images = images.to_vec();
        images.retain(|image| format(&both.tandem, image) == wanted);
        if images.is_empty() {
            continue;
        }
        let [expected, found] = both.each(|place| contents(place, wanted, &images));
        assert!(found == expected, "one of {images:?} reads differently");
        if wanted == "qcow2" {
            images.iter().for_each(|image| sound(&both.tandem, image));
        }
    }
}

/// Fails unless both programs find nothing wrong.
fn sound(place: &Place, image: &str) {
    for check in [
        place.qemu_img(&["check", image]),
        place.run(&["check", image]),
    ] {
        assert_eq!(
            check.status,
            Some(0),
            "{image}: {}{}",
            check.stdout,
            check.stderr
        );
    }
}

/// Makes an image not tell the format of its backing file.
pub fn forget_format(path: &Path) {
    let mut image = fs::read(path).unwrap();
    assert_eq!(image[112..116], [0xe2, 0x79, 0x2a, 0xca]);
    // An extension that nobody knows.
    image[112] = 0;
    fs::write(path, image).unwrap();
}
