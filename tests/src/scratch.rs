//! Where tests have files that nobody is to keep.

use std::path::Path;

use tempfile::TempDir;

/// What all tests that run at once need there, and more.
const ROOM: u64 = 2 << 30;

/// A directory in memory, where there is no waiting for a disk, if there is room enough: in a
/// container, `/dev/shm` may be small.
pub fn in_memory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let dir = match rustix::fs::statvfs(memory) {
        Ok(it) if it.f_bavail.saturating_mul(it.f_frsize) >= ROOM => tempfile::tempdir_in(memory),
        _ => tempfile::tempdir(),
    };
    dir.expect("a directory for scratch files")
}
