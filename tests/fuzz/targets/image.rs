//! Images of all kinds with changes in their structures, and all that can be done with them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tandem_fuzz::exercise::{Files, exercise};
use tandem_fuzz::input::Input;
use tandem_fuzz::kinds::KINDS;
use tandem_fuzz::limit::limited;
use tandem_fuzz::memory::Memory;
use tandem_fuzz::places::edit;

fuzz_target!(
    init: {
        std::sync::LazyLock::force(&KINDS);
    },
    |bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let kind = input.pick(&KINDS);
    let mut image = kind.image.clone();
    // Many are left as they are.
    let edits = input.below(12).saturating_sub(4);
    for _ in 0..edits {
        edit(&mut image, &kind.places, &mut input);
    }
    let files = Files {
        image: Memory::new(image),
        data: kind.data.clone().map(Memory::new),
    };
    limited(|| exercise(&files, edits == 0, &mut input));
});
