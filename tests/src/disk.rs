//! Disk images of each kind, and what QEMU's tools say of them.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Context, Result};
use crate::process::{command, run, shown, stdout};
use crate::suite::Bench;

/// Where the guest's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// In the image file.
    Internal,
    /// In a data file, `data_file_raw=off`.
    External,
    /// In a data file, `data_file_raw=on`.
    ExternalRaw,
    /// In a data file, `data_file_layout=packed`, which is Tandem's own.
    Packed,
}

/// Who makes an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// QEMU.
    QemuImg,
    /// Tandem.
    TandemImg,
}

/// A qcow2 image of a case.
pub struct Image<'a> {
    bench: &'a Bench,
    kind: Kind,
    /// The image file.
    pub path: PathBuf,
    /// The data file beside it, unless the kind is [`Kind::Internal`].
    pub data_file: Option<PathBuf>,
}

impl<'a> Image<'a> {
    /// Has `qemu-img` make the image `name` in the case's scratch directory.
    pub fn new(bench: &'a Bench, name: &str, kind: Kind, size: &str) -> Result<Self> {
        Self::create(bench, name, kind, Maker::QemuImg, "", size)
    }

    /// Makes the image `name` in the case's scratch directory. `options` are further creation
    /// options (`-o`), empty or ending with a comma.
    pub fn create(
        bench: &'a Bench,
        name: &str,
        kind: Kind,
        maker: Maker,
        options: &str,
        size: &str,
    ) -> Result<Self> {
        let data_file = (kind != Kind::Internal).then(|| bench.scratch(&format!("{name}.data")));
        let placement = match kind {
            Kind::Internal => "compat=1.1".into(),
            Kind::External => format!("data_file={name}.data,data_file_raw=off"),
            Kind::ExternalRaw => format!("data_file={name}.data,data_file_raw=on"),
            Kind::Packed => format!("data_file={name}.data,data_file_layout=packed"),
        };
        let path = bench.scratch(name);
        let program = match maker {
            Maker::QemuImg => PathBuf::from("qemu-img"),
            Maker::TandemImg => bench.tandem_img(),
        };
        bench.run(
            bench
                .tool(program)
                .args([
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-o",
                    &format!("{options}{placement}"),
                ])
                .args([name, size]),
        )?;
        Ok(Image {
            bench,
            kind,
            path,
            data_file,
        })
    }

    /// Where its data is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How the disk is stored (`qemu-img map --output=json`).
    pub fn map(&self) -> Result<Value> {
        let map = stdout(
            self.bench
                .tool(self.judge())
                .args(["map", "-f", "qcow2", "--output=json"])
                .arg(&self.path),
        )?;
        serde_json::from_slice(&map).context(format!("reading the map of {:?}", self.path))
    }

    /// Whoever of the two programs knows this kind of image.
    fn judge(&self) -> PathBuf {
        match self.kind {
            Kind::Packed => self.bench.tandem_img(),
            _ => PathBuf::from("qemu-img"),
        }
    }

    /// `qemu-img check` finds neither errors nor leaks.
    pub fn check(&self) -> Result<()> {
        self.bench.run(
            self.bench
                .tool(self.judge())
                .args(["check", "-f", "qcow2"])
                .arg(&self.path),
        )
    }

    /// `qemu-img check` finds no errors; clusters may have leaked.
    pub fn check_but_leaks(&self) {
        let mut check = self.bench.tool("qemu-img");
        let output = check
            .args(["check", "-f", "qcow2"])
            .arg(&self.path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        self.bench.log(&format!("$ {}\n{said}", shown(&check)));
        // 3: leaked clusters, and nothing worse.
        assert!(
            matches!(output.status.code(), Some(0 | 3)),
            "qemu-img check: {}",
            output.status
        );
    }

    /// The whole disk as QEMU reads it, in a raw file.
    pub fn convert(&self) -> Result<PathBuf> {
        let raw = self.path.with_extension("converted");
        run(self
            .bench
            .tool(self.judge())
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .args([&self.path, &raw]))?;
        Ok(raw)
    }

    /// The SHA-256 of each file that can hold the guest's data whole: QEMU's raw copy, and with
    /// `data_file_raw=on` the data file itself.
    pub fn assert_sha256(&self, kind: Kind, expected: &str) -> Result<()> {
        let converted = self.convert()?;
        assert_eq!(
            sha256(&converted)?,
            expected,
            "the disk as qemu-img convert reads it"
        );
        if let (Kind::ExternalRaw, Some(data_file)) = (kind, &self.data_file) {
            assert_eq!(sha256(data_file)?, expected, "the raw data file");
        }
        Ok(())
    }
}

/// The SHA-256 of a file.
pub fn sha256(path: &Path) -> Result<String> {
    let output = stdout(command("sha256sum").arg(path))?;
    let text = String::from_utf8_lossy(&output);
    Ok(text
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}
