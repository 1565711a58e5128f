//! Refcounts of every width.

use tandem_block::Disk;
use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, check, create};

use crate::qemu::{Image, Kind, assert_same, read_all, write};

const WIDTHS: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];

/// QEMU writes first, then Tandem, each in the other's gaps; refcount blocks and, in clusters of 512
/// bytes, the refcount table grow under both.
#[test]
fn both_write_to_images_of_every_width() {
    for bits in WIDTHS {
        for (cluster, size) in [(512, 6 << 20), (4096, 24 << 20)] {
            let more = format!(",refcount_bits={bits}");
            let image = Image::with_options(Kind::Internal, cluster, size, &more);
            let mut model = vec![0; size as usize];
            let mut commands = Vec::new();
            for i in 0..16 {
                let at = i * size / 16;
                commands.push(format!("write -P {} {at} {}", i + 1, size / 64));
                model[at as usize..][..size as usize / 64].fill(i as u8 + 1);
            }
            image.qemu_io(&commands);
            let disk = image.open().unwrap();
            for i in (0..16).rev() {
                let at = i * size / 16 + size / 64 + 512;
                write(&disk, at, size as usize / 50, 0x80 + i as u8);
                model[at as usize..][..size as usize / 50].fill(0x80 + i as u8);
            }
            disk.discard(0, size / 16).unwrap();
            model[..size as usize / 16].fill(0);
            disk.flush().unwrap();
            assert_same(&read_all(&disk), &model, "the disk");
            drop(disk);
            image.expect(&model);
            image.qemu_io(&[format!("write -P 9 0 {}", size / 2)]);
            model[..size as usize / 2].fill(9);
            image.expect(&model);
            let disk = image.open().unwrap();
            assert_same(&read_all(&disk), &model, "the disk after QEMU");
        }
    }
}

/// Images that Tandem makes, preallocated or not.
#[test]
fn images_of_every_width_are_made() {
    for bits in WIDTHS {
        for preallocation in [
            tandem_block::Preallocation::Off,
            tandem_block::Preallocation::Metadata,
        ] {
            let image = Image::create(Kind::Internal, 512, 512);
            let options = CreateOptions {
                size: 3 << 20,
                cluster_size: 1024,
                refcount_bits: bits,
                preallocation,
                ..CreateOptions::default()
            };
            create(&image.path(), &options).unwrap();
            image.check();
            let mut model = vec![0; 3 << 20];
            image.expect(&model);
            let disk = Qcow2::open(&image.path(), &OpenOptions::default()).unwrap();
            write(&disk, 1 << 20, 1 << 20, 7);
            model[1 << 20..2 << 20].fill(7);
            drop(disk);
            image.expect(&model);
            let report = check(
                &image.path(),
                &tandem_block::qcow2::CheckOptions::default(),
                &mut |finding| panic!("{}", finding.text),
            )
            .unwrap();
            assert_eq!(report.leaks, 0);
        }
    }
}
