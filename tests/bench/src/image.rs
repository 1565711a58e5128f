//! The disks that are measured.

use std::fs;
use std::path::{Path, PathBuf};

use tandem_block::qcow2::{BitmapEditor, CreateOptions, DataFileLayout, OpenOptions, create};
use tandem_block::{ImageFormat, Preallocation};

/// How an image has its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// In a data file that is a raw disk.
    Raw,
    External,
    Internal,
    Packed,
    /// In the image, over a backing file.
    Overlay,
    /// The same, over a raw disk that is one hole.
    OverHole,
}

impl Kind {
    /// Those that all rows are about.
    pub const ALL: [Self; 5] = [
        Self::Raw,
        Self::External,
        Self::Internal,
        Self::Packed,
        Self::Overlay,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw data file",
            Self::External => "external",
            Self::Internal => "internal",
            Self::Packed => "packed",
            Self::Overlay => "overlay",
            Self::OverHole => "overlay of a sparse raw disk",
        }
    }

    pub fn has_data_file(self) -> bool {
        matches!(self, Self::Raw | Self::External | Self::Packed)
    }
}

/// Makes an image in the new directory `dir`, and returns its path.
pub fn image(dir: &Path, kind: Kind, size: u64) -> PathBuf {
    image_with(dir, kind, size, Preallocation::Off)
}

/// As [`image`], with so much of it preallocated.
pub fn image_with(dir: &Path, kind: Kind, size: u64, preallocation: Preallocation) -> PathBuf {
    fs::create_dir(dir).unwrap();
    let path = dir.join("image");
    let mut options = CreateOptions {
        size,
        preallocation,
        data_file: kind.has_data_file().then(|| dir.join("data")),
        data_file_raw: kind == Kind::Raw,
        ..CreateOptions::default()
    };
    match kind {
        Kind::Packed => options.data_file_layout = DataFileLayout::Packed,
        Kind::Overlay => {
            // qcow2-rs takes a relative name for one in the current directory.
            let base = dir.join("base");
            let of_base = CreateOptions {
                size,
                ..CreateOptions::default()
            };
            create(&base, &of_base).unwrap();
            options.backing_file = Some(base);
            options.backing_format = Some(ImageFormat::Qcow2);
        }
        Kind::OverHole => {
            let base = dir.join("base");
            fs::File::create(&base).unwrap().set_len(size).unwrap();
            options.backing_file = Some(base);
            options.backing_format = Some(ImageFormat::Raw);
        }
        _ => {}
    }
    create(&path, &options).unwrap();
    path
}

/// Has the image follow changes in so many persistent bitmaps.
pub fn add_bitmaps(path: &Path, count: usize) {
    let mut editor = BitmapEditor::open(path, &OpenOptions::default()).unwrap();
    for i in 0..count {
        editor.add(i.to_string().as_bytes(), None).unwrap();
    }
    editor.commit().unwrap();
}
