//! `--disk`, which several subcommands have.

use std::ffi::OsString;

use clap::builder::{OsStringValueParser, TypedValueParser};
use tandem_vmm::DiskConfig;

/// Reads what follows `--disk`.
pub fn disk_parser() -> impl TypedValueParser<Value = DiskConfig> {
    OsStringValueParser::new().try_map(|text: OsString| DiskConfig::parse(&text))
}

/// For `--help`.
pub const DISK_KEYS: &str = "\
Disk keys:
  format=qcow2|raw   Format of the image (default qcow2). It is never guessed: a guest can write a
                     qcow2 header into its raw disk.
  readonly=on|off    Keep the guest from writing (default off)
  cache=MODE         Caches between the guest and the medium: writeback (default; the host's page cache),
                     none (O_DIRECT), writethrough and directsync (the same, and each write is durable
                     when it completes), unsafe (nothing is ever synced)
  locking=on|force-share|off
                     Keep other programs off the disk's files, QEMU's among them (default on); read it
                     though others may write; or take no locks
  data-file=PATH     External data file, instead of the one that the qcow2 header names
  follow=WHERE       Where the names of a data file or a backing file in a qcow2 image may lead:
                     image-directory (default), and what is below it; anywhere; or nothing
  backing-format=raw|qcow2
                     Format of the backing file, where the image does not tell it
  overlay=PATH|temp  The image is only read, and shared with others who read it; what the guest writes
                     goes to an overlay: temp is gone at the end, PATH is made on the image, or is an
                     overlay of it already
  overlay-data-file=PATH|temp
                     External data file of the overlay (default: its data is in the overlay)
  overlay-dir=DIR    Directory whose file system holds overlay=temp (default TMPDIR, or else /var/tmp)
  l2-cache-size=SIZE Memory for L2 tables of a qcow2 image, as in 16M (default 4M, which maps 32 GiB
                     in clusters of 64 KiB); taken as it is needed
  serial=ID          Serial number that the guest sees: 1 to 20 printable ASCII characters
  queues=N           Queues, each with a thread of its own: 1 to 32 (default for run: one for each CPU,
                     up to 16; for serve: 16)
  threads=N          Threads for requests that wait for the host's disk, in all queues together:
                     1 to 256 (default 16); they are started as they are needed
  iops=N             Requests in a second, on average; those beyond wait
  iops-burst=N       Requests at once after a pause (default a tenth of iops)
  bw=SIZE            Bytes read, written and zeroed in a second, on average, as in 100M; requests beyond
                     wait
  bw-burst=SIZE      Bytes at once after a pause (default a tenth of bw)
  poll=MICROSECONDS  How long a queue's thread looks for requests before it waits to be called: 0 to
                     10000 (default 0: not at all). That is quicker, and costs processor time
  A comma that belongs to a path is written twice: 'a,,b.qcow2' is the file a,b.qcow2.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_tells_every_key() {
        let lines = DISK_KEYS.lines().filter_map(|line| line.strip_prefix("  "));
        let told = lines.filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()));
        let mut told: Vec<_> = told
            .filter_map(|line| Some(line.split_once('=')?.0))
            .collect();
        told.sort_unstable();
        let mut keys = DiskConfig::KEYS.to_vec();
        keys.sort_unstable();
        assert_eq!(told, keys);
        for key in keys {
            let error = DiskConfig::parse(format!("x,{key}=").as_ref()).unwrap_err();
            assert!(!error.to_string().starts_with("unknown"), "{error}");
        }
    }
}
