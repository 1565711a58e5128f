//! The rows of the table.

mod allocate;
mod boot;
mod cold;
mod device;
mod instructions;
mod large;
mod live;
mod open;
mod requests;
mod sequential;
mod size;
mod threads;
mod tools;
mod writes;

use crate::suite::Suite;

/// A group of lines, or a plot.
pub struct Row {
    pub name: &'static str,
    pub about: &'static str,
    pub run: fn(&mut Suite),
    /// Whether it runs only when it is named, or asked for by an option.
    pub is_extra: bool,
}

const fn row(name: &'static str, about: &'static str, run: fn(&mut Suite)) -> Row {
    Row {
        name,
        about,
        run,
        is_extra: false,
    }
}

const fn extra(name: &'static str, about: &'static str, run: fn(&mut Suite)) -> Row {
    Row {
        is_extra: true,
        ..row(name, about, run)
    }
}

/// All rows, in the order of the table.
pub const ROWS: &[Row] = &[
    row(
        "requests",
        "4 KiB random reads and overwrites of clusters that are there",
        requests::rows,
    ),
    row(
        "large",
        "the same of 1 TiB with the default limit of metadata",
        large::rows,
    ),
    row(
        "sequential",
        "1 MiB at a time, in order and in pieces",
        sequential::rows,
    ),
    row(
        "allocate",
        "first writes, in memory and on a disk",
        allocate::rows,
    ),
    row("copy", "first writes over a backing file", allocate::copies),
    row("threads", "four threads on one image", threads::rows),
    row("device", "requests through a virtqueue", device::rows),
    row("writes", "what a first write has written", writes::rows),
    row("cold", "data that is not in the page cache", cold::rows),
    row("open", "opening disks of 16 TiB", open::rows),
    row("convert", "tandem-img convert", tools::convert),
    row("check", "tandem-img check", tools::check),
    row("bench", "tandem-img bench", tools::bench),
    row(
        "start",
        "from exec to the guest's first instruction, and memory",
        boot::own_share,
    ),
    row(
        "boot",
        "from exec to init, in the emulated machine",
        boot::stock_kernel,
    ),
    row(
        "variants",
        "requests with bitmaps, and without waiting",
        requests::variants,
    ),
    row("backup", "tandem-img backup", tools::backup),
    row("forks", "making overlays", live::forks),
    row("plot-size", "plot: size of the disk", size::plot),
    row("plot-depth", "plot: requests in flight", device::depths),
    row("plot-disks", "plot: number of disks", device::disks),
    row("plot-pieces", "plot: fragmentation", sequential::plot),
    row("plot-backup", "plot: writes beside a backup", live::backup),
    extra(
        INSTRUCTIONS,
        "requests, in instructions (needs valgrind)",
        instructions::rows,
    ),
];

/// The row that an option asks for.
pub const INSTRUCTIONS: &str = "instructions";
