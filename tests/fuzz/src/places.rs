//! Where the structures of an image are, and changing them.

use crate::feedback;
use crate::input::Input;

/// Entries of one size, one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub offset: u64,
    /// Bytes of an entry: 1 to 8.
    pub width: u64,
    pub count: u64,
}

/// Fields of the header: offset and bytes.
const FIELDS: [(u64, u64); 18] = [
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
];
/// Most bytes of an image.
const LONGEST: usize = 256 << 10;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const BITMAPS: u64 = 0x2385_2875;

/// Big-endian numbers of an image, zero past its end.
struct Image<'a>(&'a [u8]);

impl Image<'_> {
    fn get(&self, offset: u64, width: u64) -> u64 {
        (offset..offset + width).fold(0, |value, at| {
            let byte = self.0.get(at as usize).copied().unwrap_or_default();
            value << 8 | u64::from(byte)
        })
    }
}

/// The places of a valid image.
pub fn places(bytes: &[u8]) -> Vec<Place> {
    let image = Image(bytes);
    let cluster = 1 << image.get(20, 4);
    let is_v3 = image.get(4, 4) == 3;
    let order = if is_v3 { image.get(96, 4) } else { 4 };
    let place = |offset, width, count| Place {
        offset,
        width,
        count,
    };
    let mut places: Vec<_> = FIELDS.map(|(at, width)| place(at, width, 1)).into();
    // Extensions, and the name of the backing file.
    places.push(place(if is_v3 { 104 } else { 72 }, 4, 96));
    let table = image.get(48, 8);
    places.push(place(table, 8, cluster / 8));
    for block in entries(&image, table, cluster / 8) {
        let width = (1 << order) / 8;
        places.push(place(
            block,
            u64::max(width, 1),
            cluster >> order.saturating_sub(3),
        ));
    }
    l1_table(&image, image.get(40, 8), image.get(36, 4), &mut places);
    snapshots(&image, &mut places);
    if is_v3 {
        bitmaps(&image, &mut places);
    }
    places
}

/// What the entries of a table lead to.
fn entries(image: &Image<'_>, table: u64, count: u64) -> impl Iterator<Item = u64> {
    let entry = move |n| image.get(table + n * 8, 8) & OFFSET;
    (0..count).map(entry).filter(|offset| *offset != 0)
}

fn l1_table(image: &Image<'_>, offset: u64, count: u64, places: &mut Vec<Place>) {
    let cluster = 1 << image.get(20, 4);
    let place = |offset, width, count| Place {
        offset,
        width,
        count,
    };
    places.push(place(offset, 8, count));
    for table in entries(image, offset, count) {
        places.push(place(table, 8, cluster / 8));
        let words = (0..cluster / 8).map(|n| image.get(table + n * 8, 8));
        if let Some(entry) = words.into_iter().find(|word| word & COMPRESSED != 0) {
            places.push(place(entry & 0xff_ffff, 1, 32));
        }
    }
}

fn snapshots(image: &Image<'_>, places: &mut Vec<Place>) {
    let mut at = image.get(64, 8);
    for _ in 0..image.get(60, 4) {
        let length = 40 + image.get(at + 36, 4) + image.get(at + 12, 2) + image.get(at + 14, 2);
        for (width, count) in [(8, 1), (2, 20), (4, length / 4), (8, length / 8)] {
            places.push(Place {
                offset: at,
                width,
                count,
            });
        }
        l1_table(image, image.get(at, 8), image.get(at + 8, 4), places);
        at += length.next_multiple_of(8);
    }
}

fn bitmaps(image: &Image<'_>, places: &mut Vec<Place>) {
    let mut at = image.get(100, 4);
    while image.get(at, 4) != BITMAPS {
        if image.get(at, 4) == 0 {
            return;
        }
        at += 8 + image.get(at + 4, 4).next_multiple_of(8);
    }
    let (count, mut at) = (image.get(at + 8, 4), image.get(at + 24, 8));
    for _ in 0..count {
        let length = 24 + image.get(at + 18, 2) + image.get(at + 20, 4);
        let (table, tables) = (image.get(at, 8), image.get(at + 8, 4));
        for (offset, width, count) in [(at, 8, 1), (at, 4, 6), (at, 1, length), (table, 8, tables)]
        {
            places.push(Place {
                offset,
                width,
                count,
            });
        }
        at += length.next_multiple_of(8);
    }
}

/// Changes `image`, whose structures are at `places`, once.
pub fn edit(image: &mut Vec<u8>, places: &[Place], input: &mut Input<'_>) {
    let how = input.byte();
    if how >= 0xf0 {
        return edit_bytes(image, how, input);
    }
    let (place, index) = pick(places, input);
    feedback::note(&[places.len(), place.offset as usize, usize::from(how % 6)]);
    let old = Image(image).get(place.offset + index * place.width, place.width);
    let new = match how % 6 {
        0 => input.value(),
        1 => old ^ 1 << (input.byte() % 64),
        2 => old.wrapping_add(input.u16() as i16 as u64),
        3 => {
            let (other, index) = pick(places, input);
            Image(image).get(other.offset + index * other.width, other.width)
        }
        4 => pick(places, input).0.offset & OFFSET | COPIED,
        // Of the version without the flag: refcount blocks, tables of snapshots and of bitmaps.
        _ => pick(places, input).0.offset & OFFSET,
    };
    let at = (place.offset + index * place.width) as usize;
    let bytes = &new.to_be_bytes()[8 - place.width as usize..];
    if let Some(entry) = image.get_mut(at..at + bytes.len()) {
        entry.copy_from_slice(bytes);
    }
}

fn pick(places: &[Place], input: &mut Input<'_>) -> (Place, u64) {
    let place = input.choose(places);
    (place, u64::from(input.u16()) % place.count.max(1))
}

/// Changes what is no structure, or the length.
fn edit_bytes(image: &mut Vec<u8>, how: u8, input: &mut Input<'_>) {
    let at = input.u32() as usize;
    if how >= 0xf8 {
        // Up to four times as long, so that what leads past the end may lead inside.
        let len = at % (4 * image.len() + 1);
        return image.resize(len.min(LONGEST), 0);
    }
    let len = image.len();
    if len > 0 {
        image[at % len] = input.byte();
    }
}
