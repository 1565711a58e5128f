//! Images in a directory that name each other, themselves, and what is none of their business.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tandem_block::qcow2::{
    Backing, CheckOptions, Commit, Follow, Info, OpenOptions, Qcow2, Repair, check, find_backing,
    set_backing_name,
};
use tandem_block::{Disk, FileOptions, ImageFormat, Result, VolatileSlice, extent_in_chain};
use tandem_fuzz::feedback;
use tandem_fuzz::files::{Directory, is_secret, set_names};
use tandem_fuzz::input::Input;
use tandem_fuzz::kinds::KINDS;
use tandem_fuzz::limit::limited;
use tandem_fuzz::places::edit;

static DIRECTORY: LazyLock<Directory> = LazyLock::new(Directory::new);

const IMAGES: [&str; 4] = ["a", "b", "c", "d"];
const RAW_LEN: usize = 8 << 10;
const STEPS: usize = 6;

fn name(input: &mut Input<'_>) -> PathBuf {
    const NAMES: [&str; 20] = [
        "a",
        "b",
        "c",
        "d",
        "b",
        "raw",
        "in",
        "./a",
        "sub/../b",
        "sub",
        "../outside",
        "out",
        "loop",
        "pipe",
        "missing",
        "/dev/zero",
        "file:raw",
        "json:{\"driver\":\"raw\",\"file\":\"a\"}",
        "nbd://localhost/a",
        "raw\0",
    ];
    match input.below(NAMES.len() + 3) {
        20 => DIRECTORY.outside(),
        21 => DIRECTORY.path(input.choose(&IMAGES)),
        22 => String::from_utf8_lossy(input.bytes(12)).into_owned().into(),
        n => NAMES[n].into(),
    }
}

/// Tells of a name what it leads to, and as what.
fn note(name: &Path, kind: usize, follow: Follow) {
    let name = name.as_os_str().len() * 256
        + usize::from(
            name.as_os_str()
                .as_encoded_bytes()
                .first()
                .copied()
                .unwrap_or_default(),
        );
    feedback::note(&[name, kind, follow as usize]);
}

fn make(file: &str, follow: Follow, input: &mut Input<'_>) {
    const FORMATS: [&[u8]; 8] = [
        b"qcow2", b"qcow2", b"qcow2", b"raw", b"raw", b"", b"vmdk", b"file",
    ];
    let kind = input.pick(&KINDS);
    let mut image = kind.image.clone();
    let backing = match input.byte() {
        0..64 => None,
        _ => Some((name(input), input.below(FORMATS.len()))),
    };
    let data = match input.byte() {
        0..160 => None,
        _ => Some(name(input)),
    };
    let backing = backing.as_ref().map(|(name, format)| {
        note(name, *format, follow);
        (&**name, FORMATS[*format])
    });
    if let Some(name) = &data {
        note(name, FORMATS.len(), follow);
    }
    if image[7] == 3 && input.byte() < 240 {
        set_names(&mut image, backing, data.as_deref());
    }
    for _ in 0..input.byte().saturating_sub(200) / 16 {
        edit(&mut image, &kind.places, input);
    }
    DIRECTORY.write(file, &image);
}

fn options(follow: Follow, input: &mut Input<'_>) -> OpenOptions {
    let format = input.choose(&[None, None, Some(ImageFormat::Qcow2), Some(ImageFormat::Raw)]);
    let backing = match input.byte() {
        0..200 => Backing::Named,
        200..216 => Backing::NamedAs(format.unwrap_or(ImageFormat::Raw)),
        216..232 => Backing::Nothing,
        _ => Backing::File {
            path: DIRECTORY.path(input.choose(&IMAGES)),
            format,
        },
    };
    OpenOptions {
        read_only: input.bool(),
        follow,
        backing,
        backing_format: format,
        l2_cache_size: 0,
        ..OpenOptions::default()
    }
}

/// Reads what is to be had in short time. It must not come to see the secret.
fn survey(disk: &dyn Disk, follow: Follow) {
    let (mut at, size) = (0, disk.size());
    for _ in 0..48 {
        let Ok((_, extent)) = extent_in_chain(disk, at, size - at) else {
            break;
        };
        let mut bytes = vec![0; extent.len.min(1024) as usize];
        if disk
            .read_at(&[VolatileSlice::from(&mut bytes[..])], at)
            .is_ok()
        {
            let is_led_outside = follow != Follow::Anywhere && is_secret(&bytes);
            assert!(!is_led_outside, "led outside");
        }
        at += extent.len;
        if at >= size || extent.len == 0 {
            break;
        }
    }
}

/// Does something with an image.
fn step(follow: Follow, input: &mut Input<'_>) -> Result<()> {
    let path = DIRECTORY.path(input.choose(&IMAGES));
    let options = options(follow, input);
    match input.byte() % 8 {
        0..4 => {
            let disk = Qcow2::open(&path, &options)?;
            survey(&disk, follow);
            if !options.read_only {
                let mut bytes = vec![1; usize::from(input.u16()) % 6000];
                let offset = u64::from(input.u16());
                let _ = disk.write_at(&[VolatileSlice::from(&mut bytes[..])], offset);
                let _ = disk.write_zeroes(offset, 3000, input.bool());
                survey(&disk, follow);
            }
            disk.close()
        }
        4 => {
            let info = Info::read(&path)?;
            if let Some(name) = &info.backing_file {
                let _ = find_backing(&path, name, follow);
            }
            Ok(())
        }
        5 => {
            let options = CheckOptions {
                repair: input.choose(&[Repair::Nothing, Repair::Leaks, Repair::All]),
                follow,
                ..CheckOptions::default()
            };
            check(&path, &options, &mut |_| {})?;
            Ok(())
        }
        6 => {
            let commit = Commit::open(&path, input.below(4), &options)?;
            commit.copy(&mut |_, _| {})?;
            commit.finish(input.bool())?;
            Ok(())
        }
        _ => set_backing_name(&path, None, FileOptions::default()),
    }
}

fn run(input: &mut Input<'_>) {
    let follow = input.choose(&[
        Follow::ImageDirectory,
        Follow::ImageDirectory,
        Follow::Nothing,
        Follow::Anywhere,
    ]);
    DIRECTORY.write("raw", &[7; RAW_LEN]);
    for image in &IMAGES[..1 + input.below(IMAGES.len())] {
        make(image, follow, input);
    }
    for _ in 0..STEPS {
        let _ = step(follow, input);
        if input.is_empty() {
            break;
        }
    }
    if follow == Follow::Anywhere {
        DIRECTORY.hide_secret();
    } else {
        DIRECTORY.assert_secret_is_safe();
    }
    for image in IMAGES {
        let _ = std::fs::remove_file(DIRECTORY.path(image));
    }
}

fuzz_target!(
    init: {
        LazyLock::force(&KINDS);
    },
    |bytes: &[u8]| {
        limited(|| run(&mut Input::new(bytes)));
    }
);
