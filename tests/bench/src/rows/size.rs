//! Cost of a request against the size of the disk.

use tandem_block::Preallocation;

use super::requests::{BLOCK, contender};
use crate::clock;
use crate::image::{Kind, image_with};
use crate::measure::Summary;
use crate::plot::{Plot, bytes};
use crate::suite::Suite;
use crate::target::{Who, open_file};
use crate::work::{Buffer, Random, Work, piece};

/// Clusters that have data, spread over the disk; in large ones, each has an L2 table of its own.
const CLUSTERS: usize = 4096;
const CLUSTER: u64 = 64 << 10;

pub fn plot(suite: &mut Suite) {
    let mut curves: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    for power in (30..=46).step_by(2) {
        let size = 1_u64 << power;
        let dir = suite.memory();
        let offsets = places(size);
        let all = [Who::Bare, Who::Tandem, Who::Imago, Who::Qcow2Rs];
        let contenders = all.map(|who| {
            let own = dir.path().join(who.name());
            let path = image_with(&own, Kind::Internal, size, Preallocation::Off);
            if who == Who::Bare {
                open_file(&path.with_file_name("bare"))
                    .set_len(size)
                    .unwrap();
            }
            let target = who.open(&path, Kind::Internal);
            let mut buffer = Buffer::new(BLOCK as usize);
            Work::Write.carry_out(&*target, buffer.bytes(), &offsets);
            target.flush();
            let offsets = &offsets;
            contender(who, move |turn| {
                let offsets = piece(offsets, CLUSTERS, turn);
                Work::Read.time(clock::thread, &*target, buffer.bytes(), offsets)
            })
        });
        for series in suite.turns(3).run(contenders.into()) {
            let point = (size as f64, Summary::of(&series.samples).median / 1000.0);
            match curves.iter_mut().find(|curve| curve.0 == series.name) {
                Some(curve) => curve.1.push(point),
                None => curves.push((series.name, vec![point])),
            }
        }
    }
    suite.plots.push(Plot {
        name: "size",
        title: "4 KiB random reads of 4096 clusters, spread over an internal image",
        x: "size of the disk",
        y: "processor time for a request, µs",
        is_log_y: true,
        marks: bytes,
        curves,
    });
}

/// A block in each of so many parts of the disk, shuffled.
fn places(size: u64) -> Vec<u64> {
    let mut random = Random::new(9);
    let step = size / CLUSTERS as u64;
    let mut places: Vec<_> = (0..CLUSTERS as u64)
        .map(|i| i * step + random.below(step / CLUSTER) * CLUSTER)
        .collect();
    random.shuffle(&mut places);
    places
}
