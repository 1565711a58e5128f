//! A picture of where the data of a disk lies.
//!
//! However large the disk is and however it is divided, the picture has a bounded size: the disk is
//! counted in columns of equal length.

mod strip;
mod svg;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::Path;

use clap::Arg;
use tandem_block::ExtentKind;

use crate::commands::map::Part;
use crate::getopt::value;
use crate::output;

/// Columns that the range is counted in.
const COLUMNS: usize = 1000;
/// Columns and rows of the picture that shows places in the file.
const PLACES: (usize, usize) = (400, 200);

/// How a part of the disk is stored, as far as the picture tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// In the image on top.
    Data,
    /// Compressed, in whatever image.
    Compressed,
    /// One image below.
    Below1,
    /// Two images below.
    Below2,
    /// Further down.
    Below3,
    /// Reads as zero because an image says so.
    Zero,
    /// Nowhere.
    Unallocated,
}

impl Class {
    const ALL: [Self; 7] = [
        Self::Data,
        Self::Compressed,
        Self::Below1,
        Self::Below2,
        Self::Below3,
        Self::Zero,
        Self::Unallocated,
    ];

    fn of(part: &Part) -> Self {
        match (part.kind, part.depth) {
            (ExtentKind::Unallocated, _) => Self::Unallocated,
            (ExtentKind::Zero, _) => Self::Zero,
            (ExtentKind::Compressed, _) => Self::Compressed,
            (ExtentKind::Data, 0) => Self::Data,
            (ExtentKind::Data, 1) => Self::Below1,
            (ExtentKind::Data, 2) => Self::Below2,
            (ExtentKind::Data, _) => Self::Below3,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Compressed => "compressed",
            Self::Below1 => "backing file",
            Self::Below2 => "2 images below",
            Self::Below3 => "3 or more below",
            Self::Zero => "zero",
            Self::Unallocated => "unallocated",
        }
    }

    fn holds_data(self) -> bool {
        !matches!(self, Self::Zero | Self::Unallocated)
    }
}

/// Bytes of each [`Class`].
type Counts = [u64; Class::ALL.len()];

/// What is known of the part of a disk from `start` to `end`.
pub struct Plot {
    title: String,
    start: u64,
    end: u64,
    columns: Vec<Counts>,
    /// Which places of the file hold data of which part: columns of rows.
    places: Vec<[bool; PLACES.1]>,
    /// End of the last place in the file.
    file_end: u64,
    /// Whether something lies elsewhere than at its own offset.
    is_moved: bool,
    parts: Vec<Stored>,
}

/// Data of the image on top, at its place in the file.
#[derive(Clone, Copy)]
struct Stored {
    start: u64,
    offset: u64,
    length: u64,
}

/// Most places that are remembered before the picture is drawn coarser.
const MAX_STORED: usize = 1 << 16;

/// Definition of the option.
pub fn option() -> Arg {
    value(
        "plot",
        None,
        "FILE.svg",
        "Draw a picture instead, in SVG; with `-` on the terminal",
    )
}

impl Plot {
    /// An empty picture, called `title`, of a range of a disk.
    pub fn new(title: String, start: u64, end: u64) -> Self {
        let columns = COLUMNS.min(usize::try_from((end - start) / 512).unwrap_or(COLUMNS));
        Self {
            title,
            start,
            end,
            columns: vec![Counts::default(); columns.max(1)],
            places: Vec::new(),
            file_end: 0,
            is_moved: false,
            parts: Vec::new(),
        }
    }

    /// Adds a part of the disk, which lies within the range.
    pub fn add(&mut self, part: &Part) {
        let class = Class::of(part);
        let end = part.start + part.length;
        let mut at = part.start;
        while at < end {
            let column = self.column(at, self.columns.len());
            let next = self.column_start(column + 1, self.columns.len()).min(end);
            self.columns[column][class as usize] += next - at;
            at = next;
        }
        if let (Class::Data, Some(offset)) = (class, part.offset) {
            self.file_end = self.file_end.max(offset + part.length);
            self.is_moved |= offset != part.start;
            self.store(Stored {
                start: part.start,
                offset,
                length: part.length,
            });
        }
    }

    /// Remembers a place; of too many that follow one another, every second one is joined to the
    /// one before.
    fn store(&mut self, stored: Stored) {
        if self.parts.len() == MAX_STORED {
            let mut keep = false;
            self.parts.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.parts.push(stored);
    }

    /// Writes the picture to a file, or with `-` to the terminal.
    ///
    /// # Errors
    /// The text about what keeps it from being written.
    pub fn write(mut self, target: &OsStr) -> Result<(), String> {
        if target == "-" {
            output::print(&strip::draw(&self));
            return Ok(());
        }
        self.mark_places();
        let path = Path::new(target);
        let failed = |e: io::Error| format!("Could not write '{}': {e}", path.display());
        if !may_be_replaced(path).map_err(failed)? {
            let path = path.display();
            return Err(format!(
                "'{path}' exists and is no SVG file; it is left as it is"
            ));
        }
        fs::write(path, svg::draw(&self)).map_err(failed)
    }

    fn mark_places(&mut self) {
        if !self.is_moved {
            return;
        }
        self.places = vec![[false; PLACES.1]; PLACES.0];
        for part in std::mem::take(&mut self.parts) {
            let columns = self.column(part.start, PLACES.0)
                ..=self.column(part.start + part.length - 1, PLACES.0);
            for column in columns {
                let first = self.column_start(column, PLACES.0).max(part.start);
                let last = self
                    .column_start(column + 1, PLACES.0)
                    .min(part.start + part.length);
                let row = |at: u64| {
                    let offset = u128::from(part.offset + (at - part.start));
                    (offset * PLACES.1 as u128 / u128::from(self.file_end.max(1))) as usize
                };
                for row in row(first)..=row(last.max(first + 1) - 1) {
                    self.places[column][row.min(PLACES.1 - 1)] = true;
                }
            }
        }
    }

    /// Which of `count` columns shows the byte at `offset`.
    fn column(&self, offset: u64, count: usize) -> usize {
        let (at, len) = (offset - self.start, (self.end - self.start).max(1));
        let column = u128::from(at) * count as u128 / u128::from(len);
        (column as usize).min(count - 1)
    }

    /// The first byte that column `index` of `count` shows.
    fn column_start(&self, index: usize, count: usize) -> u64 {
        let len = u128::from(self.end - self.start);
        self.start + (len * index as u128).div_ceil(count as u128) as u64
    }

    /// Bytes of each class in all.
    fn totals(&self) -> Counts {
        let mut totals = Counts::default();
        for column in &self.columns {
            for (total, bytes) in totals.iter_mut().zip(column) {
                *total += bytes;
            }
        }
        totals
    }

    /// The classes that there are, with their bytes and their part of all in percent.
    fn legend(&self) -> Vec<(Class, u64, f64)> {
        let all = (self.end - self.start).max(1) as f64;
        let totals = Class::ALL.into_iter().zip(self.totals());
        totals
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(class, bytes)| (class, bytes, bytes as f64 * 100.0 / all))
            .collect()
    }
}

/// Whether `path` is free, or holds a picture: not a disk, by a slip of the hand.
fn may_be_replaced(path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(e),
        // To open a pipe would wait for a writer.
        Ok(found) if !found.is_file() => Ok(false),
        Ok(_) => {
            let mut start = [0; 5];
            let len = io::Read::read(&mut fs::File::open(path)?, &mut start)?;
            Ok(len == 0 || start == *b"<svg " || start == *b"<?xml")
        }
    }
}

/// Offsets for an axis from `start` to `end`, at powers of two and few enough to read.
fn ticks(start: u64, end: u64, most: u64) -> Vec<u64> {
    let step = ((end - start) / most).max(1).next_power_of_two();
    let mut ticks = Vec::new();
    let mut at = start.checked_next_multiple_of(step);
    while let Some(tick) = at.filter(|tick| *tick <= end) {
        ticks.push(tick);
        at = tick.checked_add(step);
    }
    ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(start: u64, length: u64, kind: ExtentKind, depth: usize) -> Part {
        Part {
            start,
            length,
            depth,
            kind,
            is_hole: false,
            offset: Some(start + 512),
        }
    }

    #[test]
    fn every_byte_is_counted_once() {
        for end in [512, 4096, 1 << 20, (1 << 40) + 512, 1 << 62] {
            let mut plot = Plot::new(String::new(), 0, end);
            let half = end / 2 + 1;
            plot.add(&part(0, half, ExtentKind::Data, 0));
            plot.add(&part(half, end - half, ExtentKind::Data, 7));
            let totals = plot.totals();
            assert_eq!(totals[Class::Data as usize], half, "{end}");
            assert_eq!(totals[Class::Below3 as usize], end - half, "{end}");
            assert!(svg::draw(&plot).len() < 1 << 20);
        }
    }

    #[test]
    fn ticks_are_few() {
        assert_eq!(
            ticks(0, 1 << 20, 4),
            [0, 1 << 18, 1 << 19, 3 << 18, 1 << 20]
        );
        assert_eq!(ticks(5, 9, 8), [5, 6, 7, 8, 9]);
        assert!(ticks(0, u64::MAX, 8).len() <= 9);
        assert_eq!(ticks(0, 0, 8), [0]);
    }

    /// Many small places do not make the picture large.
    #[test]
    fn the_picture_is_bounded() {
        let mut plot = Plot::new("<&>".to_owned(), 0, 1 << 40);
        for i in 0..200_000u64 {
            plot.add(&Part {
                start: i * 4096,
                length: 512,
                depth: 0,
                kind: ExtentKind::Data,
                is_hole: false,
                offset: Some(i.wrapping_mul(0x9e37_79b9) % (1 << 30) * 512),
            });
        }
        assert!(plot.parts.len() <= MAX_STORED);
        plot.mark_places();
        let text = svg::draw(&plot);
        assert!(text.len() < 1 << 20, "{}", text.len());
        assert!(text.contains("&lt;&amp;&gt;"));
    }
}
