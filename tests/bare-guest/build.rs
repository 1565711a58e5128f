//! Has the guest linked as a program that stands alone, at a fixed address.

fn main() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/link.ld");
    println!("cargo::rerun-if-changed={script}");
    let arguments = ["-nostdlib", "-nostartfiles", "-static", "-no-pie"];
    for argument in arguments {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rustc-link-arg-bins=-Wl,--script={script}");
}
