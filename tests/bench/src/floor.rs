//! The system calls that requests to an image come down to, made directly: on the same file, at the
//! same places. How a file lies in memory, or on a disk, makes more of a difference than an engine does.

use std::fs::File;
use std::path::Path;

use tandem_block::qcow2::{OpenOptions, Qcow2};
use tandem_block::{Disk, ExtentKind, FileOptions, Locking};

use crate::clock::Clock;
use crate::image::Kind;
use crate::target::{Target, open_file};
use crate::work::Work;

/// A part of a request that lies in one piece.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// In the file.
    at: u64,
    /// In the buffer.
    from: u32,
    length: u32,
}

pub struct Floor {
    file: File,
    pieces: Vec<Piece>,
    /// Bytes of a request.
    length: u64,
    /// The first piece of each request, and the end of those of the last.
    starts: Vec<usize>,
}

impl Floor {
    /// For requests of so many bytes to clusters of an image that are there, and that nobody moves.
    pub fn new(image: &Path, kind: Kind, offsets: &[u64], length: u64) -> Self {
        let options = OpenOptions {
            read_only: true,
            files: FileOptions {
                locking: Locking::Off,
                ..FileOptions::default()
            },
            ..OpenOptions::default()
        };
        let disk = Qcow2::open(image, &options).unwrap();
        let mut pieces = Vec::new();
        let mut starts = vec![0];
        for offset in offsets {
            let mut done = 0;
            while done < length {
                let extent = disk.extent(offset + done, length - done).unwrap();
                assert_eq!(extent.kind, ExtentKind::Data);
                pieces.push(Piece {
                    at: extent.offset.unwrap(),
                    from: done as u32,
                    length: extent.len as u32,
                });
                done += extent.len;
            }
            starts.push(pieces.len());
        }
        let holder = if kind.has_data_file() {
            image.with_file_name("data")
        } else {
            image.to_owned()
        };
        Self {
            file: open_file(&holder),
            pieces,
            length,
            starts,
        }
    }

    /// What each of the requests `number` × `count` and on takes, as [`crate::work::piece`] counts. They
    /// go to the places for one that `buffer` has, one behind the other.
    pub fn time(
        &self,
        clock: Clock,
        work: Work,
        buffer: &mut [u8],
        count: usize,
        number: usize,
    ) -> f64 {
        let first = number % ((self.starts.len() - 1) / count) * count;
        let requests = self.starts[first..=first + count].windows(2);
        let mut places = (0..buffer.len()).step_by(self.length as usize).cycle();
        let before = clock();
        for request in requests {
            let place = places.next().unwrap_or_default();
            for piece in &self.pieces[request[0]..request[1]] {
                let part = &mut buffer[place + piece.from as usize..][..piece.length as usize];
                match work {
                    Work::Read => Target::read(&self.file, part, piece.at),
                    Work::TryRead => Target::try_read(&self.file, part, piece.at),
                    _ => Target::write(&self.file, part, piece.at),
                }
            }
        }
        (clock() - before) / count as f64
    }
}
