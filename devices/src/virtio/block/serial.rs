//! The serial number of a disk.

use std::str::FromStr;

use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

const LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// What a guest gets when it asks a disk for its identity: 1 to 20 printable ASCII bytes.
///
/// Linux shows it in `/sys/block/vda/serial`, and udev makes `/dev/disk/by-id/virtio-…` of it.
///
/// ```
/// use tandem_devices::virtio::block::Serial;
///
/// let serial: Serial = "root-disk".parse()?;
/// # Ok::<(), tandem_devices::virtio::block::InvalidSerial>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial([u8; LEN]);

/// Why a text cannot be the serial number of a disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidSerial {
    /// The text is empty or too long.
    #[error("serial '{text}' has {len} bytes: give 1 to 20", len = text.len())]
    Length {
        /// The text.
        text: String,
    },
    /// The text has a character that is not printable ASCII.
    #[error("serial '{}' has the character '{}': only printable ASCII is allowed",
        text.escape_debug(), character.escape_debug())]
    Character {
        /// The text.
        text: String,
        /// The first such character.
        character: char,
    },
}

impl Serial {
    /// The serial number, padded with NUL.
    pub(super) fn bytes(self) -> [u8; LEN] {
        self.0
    }
}

impl FromStr for Serial {
    type Err = InvalidSerial;

    fn from_str(text: &str) -> Result<Self, InvalidSerial> {
        let is_printable = |c: char| c.is_ascii_graphic() || c == ' ';
        if let Some(character) = text.chars().find(|&c| !is_printable(c)) {
            return Err(InvalidSerial::Character {
                text: text.to_owned(),
                character,
            });
        }
        let mut bytes = [0; LEN];
        match bytes.get_mut(..text.len()) {
            Some(start) if !text.is_empty() => start.copy_from_slice(text.as_bytes()),
            _ => {
                return Err(InvalidSerial::Length {
                    text: text.to_owned(),
                });
            }
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_1_to_20_printable_bytes() {
        let longest: Serial = "12345678901234567890".parse().unwrap();
        assert_eq!(&longest.bytes(), b"12345678901234567890");
        let short: Serial = "a b".parse().unwrap();
        assert_eq!(&short.bytes(), b"a b\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn refuses_with_the_reason() {
        let refusal = |text: &str| text.parse::<Serial>().unwrap_err().to_string();
        assert_eq!(refusal(""), "serial '' has 0 bytes: give 1 to 20");
        assert_eq!(
            refusal("123456789012345678901"),
            "serial '123456789012345678901' has 21 bytes: give 1 to 20"
        );
        assert_eq!(
            refusal("a\nb"),
            "serial 'a\\nb' has the character '\\n': only printable ASCII is allowed"
        );
        assert!(refusal("disque-é").contains("'é'"));
    }
}
