//! The block engine and QEMU's tools on the same images.

mod bitmaps;
mod careful_repairs;
mod compressed;
mod devices;
mod discards;
mod extents;
mod faults;
mod live;
mod live_bitmaps;
mod locks;
mod packed;
mod peers;
mod qemu;
mod random;
mod refusals;
mod repairs;
mod resize;
mod shapes;
mod snapshots;
mod threads;
mod widths;
