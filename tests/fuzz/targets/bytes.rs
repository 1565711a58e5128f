//! Bytes that are no image of ours, taken for one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tandem_fuzz::exercise::{Files, exercise};
use tandem_fuzz::input::Input;
use tandem_fuzz::limit::limited;
use tandem_fuzz::memory::Memory;

/// Where the header tells how many entries the L1 table has.
const L1_SIZE: usize = 36;
/// And how many snapshots there are.
const NB_SNAPSHOTS: usize = 60;

fuzz_target!(|bytes: &[u8]| {
    let mut image = bytes.to_vec();
    if let [first @ (b'Q' | b'q'), ..] = image[..]
        && image.len() > NB_SNAPSHOTS + 4
    {
        // Without these all would end at once.
        image[..7].copy_from_slice(b"QFI\xfb\0\0\0");
        if first == b'Q' {
            // Tables that are as large as may be take long, and show little.
            for at in [L1_SIZE, NB_SNAPSHOTS] {
                image[at..at + 2].fill(0);
            }
        }
    }
    let files = Files {
        image: Memory::new(image),
        data: Some(Memory::default()),
    };
    // What is done is told by the last bytes, of which an image makes little use.
    let last = &bytes[bytes.len() - bytes.len().min(40)..];
    limited(|| exercise(&files, false, &mut Input::new(last)));
});
