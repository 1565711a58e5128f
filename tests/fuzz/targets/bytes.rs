//! Bytes that are no image of ours, taken for one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tandem_fuzz::exercise::{Files, exercise};
use tandem_fuzz::input::Input;
use tandem_fuzz::limit::limited;
use tandem_fuzz::memory::Memory;

fuzz_target!(|bytes: &[u8]| {
    let mut image = bytes.to_vec();
    // Without these all would end at once.
    if let [b'Q', rest @ ..] = &mut image[..]
        && let Some(magic) = rest.get_mut(..6)
    {
        magic.copy_from_slice(b"FI\xfb\0\0\0");
    }
    let files = Files {
        image: Memory::new(image),
        data: Some(Memory::default()),
    };
    // What is done is told by the last bytes, of which an image makes little use.
    let last = &bytes[bytes.len() - bytes.len().min(40)..];
    limited(|| exercise(&files, false, &mut Input::new(last)));
});
