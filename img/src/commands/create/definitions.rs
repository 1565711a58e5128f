//! The options that images are created with.

use crate::options::{self, Definition, Kind, Options, Value};
use tandem_block::ImageFormat;

const fn option(
    name: &'static str,
    kind: Kind,
    default: Option<&'static str>,
    help: &'static str,
) -> Definition {
    Definition {
        name,
        kind,
        default,
        help,
    }
}

/// The options of qcow2 in the order in which they are shown.
const QCOW2: &[Definition] = &[
    option(
        "encryption",
        Kind::Switch,
        None,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    option(
        "encrypt.format",
        Kind::Text,
        None,
        "Encrypt the image, format choices: 'aes', 'luks'",
    ),
    option(
        "encrypt.key-secret",
        Kind::Text,
        None,
        "ID of secret providing qcow AES key or LUKS passphrase",
    ),
    option(
        "encrypt.cipher-alg",
        Kind::Text,
        None,
        "Name of encryption cipher algorithm",
    ),
    option(
        "encrypt.cipher-mode",
        Kind::Text,
        None,
        "Name of encryption cipher mode",
    ),
    option(
        "encrypt.ivgen-alg",
        Kind::Text,
        None,
        "Name of IV generator algorithm",
    ),
    option(
        "encrypt.ivgen-hash-alg",
        Kind::Text,
        None,
        "Name of IV generator hash algorithm",
    ),
    option(
        "encrypt.hash-alg",
        Kind::Text,
        None,
        "Name of encryption hash algorithm",
    ),
    option(
        "encrypt.iter-time",
        Kind::Number,
        None,
        "Time to spend in PBKDF in milliseconds",
    ),
    option(
        "cluster_size",
        Kind::Size,
        Some("65536"),
        "qcow2 cluster size",
    ),
    option(
        "extended_l2",
        Kind::Switch,
        Some("off"),
        "Extended L2 tables",
    ),
    option(
        "preallocation",
        Kind::Text,
        None,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
    ),
    option(
        "compression_type",
        Kind::Text,
        Some("zlib"),
        "Compression method used for image cluster compression",
    ),
    option("size", Kind::Size, None, "Virtual disk size"),
    option(
        "compat",
        Kind::Text,
        None,
        "Compatibility level (v2 [0.10] or v3 [1.1])",
    ),
    option(
        "backing_file",
        Kind::Text,
        None,
        "File name of a base image",
    ),
    option(
        "backing_fmt",
        Kind::Text,
        None,
        "Image format of the base image",
    ),
    option(
        "base_stamp",
        Kind::Switch,
        None,
        "Open the image only while its backing file is as it is now",
    ),
    option(
        "data_file",
        Kind::Text,
        None,
        "File name of an external data file",
    ),
    option(
        "data_file_raw",
        Kind::Switch,
        None,
        "The external data file must stay valid as a raw image",
    ),
    option(
        "data_file_layout",
        Kind::Text,
        None,
        "How data lies in the data file (allowed values: standard, packed)",
    ),
    option(
        "data_file_reuse",
        Kind::Text,
        None,
        "What becomes of a data file that exists (allowed values: replace, refuse, keep)",
    ),
    option(
        "lazy_refcounts",
        Kind::Switch,
        Some("off"),
        "Postpone refcount updates",
    ),
    option(
        "refcount_bits",
        Kind::Number,
        Some("16"),
        "Width of a reference count entry in bits",
    ),
    option(
        "nocow",
        Kind::Switch,
        None,
        "Turn off copy-on-write (valid only on btrfs)",
    ),
    option(
        "extent_size_hint",
        Kind::Size,
        None,
        "Extent size hint for the image file, 0 to disable",
    ),
];

/// The options of raw in the order in which they are shown.
const RAW: &[Definition] = &[
    option("size", Kind::Size, None, "Virtual disk size"),
    option(
        "nocow",
        Kind::Switch,
        None,
        "Turn off copy-on-write (valid only on btrfs)",
    ),
    option(
        "preallocation",
        Kind::Text,
        None,
        "Preallocation mode (allowed values: off, falloc, full)",
    ),
    option(
        "extent_size_hint",
        Kind::Size,
        None,
        "Extent size hint for the image file, 0 to disable",
    ),
];

/// Options that disks have from the file below them; `preallocation` is qcow2's own, too.
const FILE_OPTIONS: [&str; 3] = ["preallocation", "nocow", "extent_size_hint"];

/// The options of a format.
pub fn definitions(format: ImageFormat) -> &'static [Definition] {
    match format {
        ImageFormat::Raw => RAW,
        ImageFormat::Qcow2 => QCOW2,
    }
}

/// The help on the options of a format; those of files are known `with_file` only.
pub fn help(format: ImageFormat, with_file: bool) -> String {
    let definitions = definitions(format);
    if with_file {
        return format!("Supported options:\n{}", options::describe(definitions));
    }
    let own: Vec<_> = definitions
        .iter()
        .filter(|definition| match definition.name {
            "preallocation" => format == ImageFormat::Qcow2,
            name => !FILE_OPTIONS.contains(&name),
        })
        .copied()
        .collect();
    format!(
        "Supported {} options:\n{}\nThe protocol level may support further options.\n\
         Specify the target filename to include those options.\n",
        format.name(),
        options::describe(&own)
    )
}

/// The version of qcow2 that has the compatibility level `compat`.
pub fn version(compat: &str) -> Option<u32> {
    match compat {
        "0.10" | "v2" => Some(2),
        "1.1" | "v3" => Some(3),
        _ => None,
    }
}

/// Refuses to encrypt images.
pub fn refuse_encryption(options: &Options) -> Result<(), String> {
    let is_asked = |definition: &&Definition| match options.get(definition.name) {
        None | Some(Value::Switch(false)) => false,
        Some(_) => definition.name.starts_with("encrypt"),
    };
    match QCOW2.iter().find(is_asked) {
        Some(Definition { name, .. }) => Err(format!(
            "Option '{name}' is not supported: images cannot be encrypted"
        )),
        None => Ok(()),
    }
}

/// Whether qcow2 images can be created with an option called `name`.
pub fn is_qcow2_option(name: &str) -> bool {
    QCOW2.iter().any(|definition| definition.name == name)
}
