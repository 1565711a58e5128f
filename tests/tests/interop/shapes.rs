//! Images that grow in every way an image can.

use tandem_block::Disk;

use crate::qemu::{Image, KINDS, Kind, assert_same, read_all, write};

/// 40 MiB in clusters of 512 bytes: hundreds of L2 tables and refcount blocks, and a refcount
/// table (8 MiB for each of its clusters) that has to move several times.
#[test]
fn tables_grow_as_the_image_fills() {
    for kind in [Kind::Internal, Kind::InternalV2, Kind::External] {
        let size = 40 << 20;
        let image = Image::create(kind, 512, size);
        let mut model = vec![0; size as usize];
        let disk = image.open().unwrap();
        // Backwards, so that neither tables nor data come in guest order.
        for i in (0..size / 65536).rev() {
            let byte = 1 + (i % 255) as u8;
            write(&disk, i * 65536, 65536, byte);
            model[i as usize * 65536..][..65536].fill(byte);
        }
        disk.flush().unwrap();
        assert_same(&read_all(&disk), &model, "the disk");
        drop(disk);
        image.expect(&model);
    }
}

/// What a write of one sector leaves around it: zeros, in clusters of every size.
#[test]
fn the_rest_of_a_new_cluster_is_zero() {
    for kind in KINDS {
        for bits in 9..=21 {
            let cluster = 1 << bits;
            let size = 5 * cluster;
            let image = Image::create(kind, cluster, size);
            let mut model = vec![0; size as usize];
            let disk = image.open().unwrap();
            for at in [cluster + cluster / 2, size - 512] {
                let at = at & !511;
                write(&disk, at, 512, 0x5a);
                model[at as usize..][..512].fill(0x5a);
            }
            disk.flush().unwrap();
            drop(disk);
            image.expect(&model);
        }
    }
}

/// A data file that holds other things where nothing is mapped: they must not show.
#[test]
fn stale_bytes_of_the_data_file_stay_hidden() {
    let size = 1 << 20;
    let image = Image::create(Kind::External, 65536, size);
    std::fs::write(image.data_file(), vec![0xdd; size as usize]).unwrap();
    let disk = image.open().unwrap();
    let mut model = vec![0; size as usize];
    write(&disk, 100_000, 1000, 7);
    model[100_000..101_000].fill(7);
    disk.flush().unwrap();
    drop(disk);
    image.expect(&model);
}

/// A raw data file shorter than the disk reads as zero past its end, and grows when written.
#[test]
fn a_short_data_file_ends_in_zeros() {
    for kind in [Kind::External, Kind::Raw] {
        let size = 1 << 20;
        let image = Image::create(kind, 65536, size);
        let file = std::fs::File::options()
            .write(true)
            .open(image.data_file())
            .unwrap();
        file.set_len(1000).unwrap();
        let disk = image.open().unwrap();
        assert_same(&read_all(&disk), &vec![0; size as usize], "the disk");
        let mut model = vec![0; size as usize];
        write(&disk, 900_000, 5000, 3);
        model[900_000..905_000].fill(3);
        disk.write_zeroes(0, size, true).unwrap();
        write(&disk, 900_000, 5000, 3);
        disk.flush().unwrap();
        assert_same(&read_all(&disk), &model, "the disk");
        drop(disk);
        file.set_len(size).unwrap();
        image.expect(&model);
    }
}

/// QEMU before 6.0 left the mapping of raw images empty. Such a table fills up as it is written,
/// and then is one whose data needs no look at it.
#[test]
fn an_incomplete_mapping_of_a_raw_data_file_decides_until_it_is_complete() {
    let (cluster, size) = (65536, 1 << 20);
    let image = Image::create(Kind::Raw, cluster, size);
    let mut bytes = std::fs::read(image.path()).unwrap();
    let offset_at = |bytes: &[u8], at: usize| {
        let entry = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        (entry & 0x00ff_ffff_ffff_fe00) as usize
    };
    let l1 = offset_at(&bytes, 40);
    let l2 = offset_at(&bytes, l1);
    bytes[l2..l2 + cluster as usize].fill(0);
    std::fs::write(image.path(), bytes).unwrap();
    std::fs::write(image.data_file(), vec![0xdd; size as usize]).unwrap();

    let disk = image.open().unwrap();
    let mut model = vec![0; size as usize];
    assert_same(&read_all(&disk), &model, "the disk with an empty mapping");
    for i in (0..size / cluster).rev() {
        let at = i * cluster + 700;
        write(&disk, at, 9000, 1 + i as u8);
        model[at as usize..][..9000].fill(1 + i as u8);
        assert_same(&read_all(&disk), &model, "the disk");
    }
    disk.write_zeroes(3 * cluster, 2 * cluster, true).unwrap();
    model[3 * cluster as usize..5 * cluster as usize].fill(0);
    disk.flush().unwrap();
    drop(disk);
    image.expect(&model);
}
