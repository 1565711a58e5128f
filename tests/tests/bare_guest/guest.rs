//! The guest's program, and whether it can run here.

use std::env;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use tandem_tests::process::{command, run};

/// Whether there is a KVM. If not, says so, or fails the test if `TANDEM_REQUIRE_KVM` is 1.
pub fn have_kvm() -> bool {
    let exists = Path::new("/dev/kvm").exists();
    if !exists {
        let is_required = env::var_os("TANDEM_REQUIRE_KVM").is_some_and(|v| v == "1");
        assert!(
            !is_required,
            "TANDEM_REQUIRE_KVM=1, but there is no /dev/kvm"
        );
        // Not by `eprintln!`, whose output is kept back when a test passes.
        let _ = writeln!(io::stderr(), "skipped: there is no /dev/kvm");
    }
    exists
}

/// The guest's program, built from source.
pub static GUEST: LazyLock<PathBuf> = LazyLock::new(|| {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("bare-guest");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bare-guest");
    let mut cargo = command(env!("CARGO"));
    cargo
        .args(["build", "--quiet", "--locked", "--manifest-path"])
        .arg(source.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target);
    // These are for programs of this machine.
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(name);
    }
    run(&mut cargo).unwrap();
    target.join("debug/bare-guest")
});
