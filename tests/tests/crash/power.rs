//! What is on disk after a power failure.

use crate::storage::{Change, Event, SECTOR, What, Which, apply_write};
use crate::workload::Random;

/// The content of both files.
#[derive(Clone)]
pub struct Files {
    pub image: Vec<u8>,
    pub data: Vec<u8>,
}

impl Files {
    fn get(&mut self, which: Which) -> &mut Vec<u8> {
        match which {
            Which::Image => &mut self.image,
            Which::Data => &mut self.data,
        }
    }

    /// These, which are synced, with a random part of what is `pending`.
    pub fn crash(&self, pending: &[Change], random: &mut Random) -> Self {
        let mut state = self.clone();
        // None, all, each of them or not, or each sector of them or not.
        let mode = random.below(6);
        for Change { file, what } in pending {
            let content = state.get(*file);
            match (mode, what) {
                (0, _) => {}
                (1, _) => what.apply(content),
                (4.., What::Write { offset, bytes }) => tear(content, *offset, bytes, random),
                _ => {
                    if random.below(2) == 0 {
                        what.apply(content);
                    }
                }
            }
        }
        state
    }

    /// Takes an event of the log into account, where power has not failed; `pending` is what is not
    /// known to be on disk.
    pub fn follow(&mut self, event: &Event, pending: &mut Vec<Change>) {
        match event {
            Event::Change(change) => pending.push(change.clone()),
            Event::Sync { file } => {
                for change in pending.extract_if(.., |change| change.file == *file) {
                    change.what.apply(self.get(change.file));
                }
            }
            Event::Begun { .. } | Event::Resized { .. } | Event::Flushed { .. } => {}
        }
    }
}

/// Applies some of the sectors of a write.
fn tear(content: &mut Vec<u8>, offset: u64, bytes: &[u8], random: &mut Random) {
    let mut at = 0;
    while at < bytes.len() {
        let position = offset + at as u64;
        let in_sector = SECTOR - position as usize % SECTOR;
        let n = in_sector.min(bytes.len() - at);
        if random.below(2) == 0 {
            apply_write(content, position, &bytes[at..at + n]);
        }
        at += n;
    }
}
