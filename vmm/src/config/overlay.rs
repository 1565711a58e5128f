//! Overlays of disks, and how they are written on a command line.

use std::path::PathBuf;

use tandem_block::qcow2::OverlayPlace;

use super::disk::wrong;
use super::{Error, os_path};

/// The keys of overlays, until all are known. A file called `temp` is `./temp`.
#[derive(Default)]
pub(super) struct OverlayKeys {
    overlay: Option<PathBuf>,
    data_file: Option<PathBuf>,
    directory: Option<PathBuf>,
}

impl OverlayKeys {
    const TEMPORARY: &str = "temp";

    /// Sets what `key` tells of the overlay. Returns whether it tells anything of it.
    pub fn set(&mut self, key: &'static str, value: &[u8]) -> Result<bool, Error> {
        let (path, expected) = match key {
            "overlay" => (&mut self.overlay, "temp or the path of a file"),
            "overlay-data-file" => (&mut self.data_file, "temp or the path of a file"),
            "overlay-dir" => (&mut self.directory, "the path of a directory"),
            _ => return Ok(false),
        };
        if value.is_empty() {
            return Err(wrong(key, value, expected));
        }
        *path = Some(os_path(value.to_owned()));
        Ok(true)
    }

    /// What they say together.
    pub fn place(self) -> Result<Option<OverlayPlace>, Error> {
        let is_temporary = |path: &PathBuf| path.as_os_str() == Self::TEMPORARY;
        let data_file = self.data_file;
        let Some(path) = self.overlay else {
            return match (data_file, self.directory) {
                (Some(_), _) => Err(Error::DiskKeyAlone("overlay-data-file", "overlay")),
                (None, Some(_)) => Err(Error::DiskKeyAlone("overlay-dir", "overlay=temp")),
                (None, None) => Ok(None),
            };
        };
        if !is_temporary(&path) {
            return match (data_file.as_ref().is_some_and(is_temporary), self.directory) {
                (true, _) => Err(Error::DiskKeyAlone(
                    "overlay-data-file=temp",
                    "overlay=temp",
                )),
                (false, Some(_)) => Err(Error::DiskKeyAlone("overlay-dir", "overlay=temp")),
                (false, None) => Ok(Some(OverlayPlace::Kept { path, data_file })),
            };
        }
        if data_file.as_ref().is_some_and(|file| !is_temporary(file)) {
            return Err(Error::DiskKeysExclude(
                "overlay-data-file=PATH",
                "overlay=temp",
            ));
        }
        Ok(Some(OverlayPlace::Temporary {
            directory: self.directory,
            data_file: data_file.is_some(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DiskConfig;

    #[test]
    fn overlays() {
        let overlay = |text: &str| text.parse::<DiskConfig>().unwrap().overlay.unwrap();
        let kept = |path: &str, data_file: Option<&str>| OverlayPlace::Kept {
            path: path.into(),
            data_file: data_file.map(Into::into),
        };
        assert_eq!(overlay("a,overlay=b,,c"), kept("b,c", None));
        assert_eq!(overlay("a,overlay=./temp"), kept("./temp", None));
        let both = overlay("a,format=raw,overlay-data-file=d,overlay=b");
        assert_eq!(both, kept("b", Some("d")));
        let temporary = |directory: Option<&str>, data_file| OverlayPlace::Temporary {
            directory: directory.map(Into::into),
            data_file,
        };
        assert_eq!(overlay("a,overlay=temp"), temporary(None, false));
        let all = overlay("a,overlay-dir=/d,overlay=temp,overlay-data-file=temp");
        assert_eq!(all, temporary(Some("/d"), true));
    }

    #[test]
    fn keys_that_do_not_go_together() {
        let error = |text: &str| text.parse::<DiskConfig>().unwrap_err();
        for (text, message) in [
            (
                "overlay-dir=d",
                "key overlay-dir has no meaning without overlay=temp",
            ),
            (
                "overlay=b,overlay-dir=d",
                "key overlay-dir has no meaning without overlay=temp",
            ),
            (
                "overlay-data-file=d",
                "key overlay-data-file has no meaning without overlay",
            ),
            (
                "overlay=b,overlay-data-file=temp",
                "key overlay-data-file=temp has no meaning without overlay=temp",
            ),
            (
                "overlay=temp,overlay-data-file=d",
                "keys overlay-data-file=PATH and overlay=temp exclude each other",
            ),
            (
                "overlay=temp,readonly=on",
                "keys readonly=on and overlay exclude each other",
            ),
        ] {
            let found = error(&format!("a,{text}")).to_string();
            assert_eq!(found, format!("disk {message}"), "{text}");
        }
    }
}
