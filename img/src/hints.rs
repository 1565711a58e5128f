//! What people may want to know beside an error that QEMU's programs print as well.
//!
//! A hint is printed on a terminal alone: what other programs read is as from QEMU's.

use std::fs;

use tandem_block::FileUsers;

/// A line that may help with the error `message`.
pub fn of(message: &str) -> Option<String> {
    let last = message.trim_end().lines().next_back()?;
    let locked = last.strip_prefix("Is another process using the image [");
    if let Some(file) = locked.and_then(|rest| rest.strip_suffix("]?")) {
        let users = FileUsers::of(&fs::metadata(file).ok()?);
        return Some(format!("It is: {}", users.lock_holders()?));
    }
    let is_raw = last.ends_with(": Image is not in qcow2 format");
    is_raw.then(|| "A raw disk has no header; say that it is one with -f raw".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_block::{FileOptions, Raw};

    #[test]
    fn hints_fit_the_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let locked = format!(
            "qemu-img: Could not open 'x': Failed to get \"write\" lock\n\
             Is another process using the image [{}]?\n",
            file.path().display()
        );
        assert_eq!(of(&locked), None);
        let disk = Raw::open_with(file.path(), false, FileOptions::default()).unwrap();
        let hint = of(&locked).unwrap();
        let user = format!("It is: process {} (", std::process::id());
        assert!(hint.starts_with(&user), "{hint}");
        drop(disk);
        let raw = "qemu-img: Could not open 'x': Image is not in qcow2 format\n";
        assert!(of(raw).unwrap().contains("-f raw"));
        for other in ["", "x", "Is another process using the image [/none]?"] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
