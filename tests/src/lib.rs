//! The lab: what Tandem's tests and its demo share.
//!
//! `cargo test` runs the tests of this package that are in `tests/`: those that need no guest, and
//! those with a guest that has no operating system (`bare-guest`). Those that need a real Linux
//! guest are the *guest suite* (`cargo run -p tandem-tests --bin guest-suite`):
//! a table of [cases] that boot Debian's stock kernel under `tandem run`, on disks made by
//! `qemu-img` and `tandem-img`, and compare what the guest saw with what QEMU's tools see.
//!
//! ```text
//!   guest-suite ── /dev/kvm can boot the stock kernel ──► cases ──► tandem run ──► guest
//!       │                                                   ▲
//!       └── else ──► QEMU (TCG, AMD SVM) ──► guest-suite ───┘
//! ```
//!
//! Where the machine's `/dev/kvm` is missing or cannot run a stock kernel, the same program runs in
//! an [emulated machine](emulated): QEMU's TCG emulates an AMD processor with nested paging, and
//! the kernel in it offers a `/dev/kvm` with the semantics of the real one. Which way is taken is
//! decided by [trying](guest::probe). Cases of `tandem serve` [need no KVM](suite::Case::without_kvm):
//! their guests run under QEMU's emulator, outside of that machine.
//!
//! | module | what it has |
//! | --- | --- |
//! | [`lab`] | the kernel, its modules and busybox, as `tests/setup` unpacks them |
//! | [`tree`] | a file tree, written as an initrd or as an ext4 file system |
//! | [`emulated`] | the emulated AMD machine |
//! | [`guest`] | a Linux guest under `tandem run` |
//! | [`disk`] | disk images of each kind, and what QEMU's tools say of them |
//! | [`control`] | a client of the control socket, and a reader of the metrics |
//! | [`cases`] | the cases of the guest suite |
//! | [`suite`] | the runner |
//! | [`page`] | commands of the documentation, performed as they are written there |
//! | [`stock`] | Debian systems with their own initrds and root file systems |
//! | [`scratch`] | directories for tests |

pub mod cases;
pub mod control;
pub mod demo;
pub mod disk;
pub mod emulated;
pub mod error;
pub mod guest;
pub mod lab;
pub mod page;
pub mod process;
pub mod scratch;
pub mod stock;
pub mod suite;
pub mod tree;
