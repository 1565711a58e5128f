//! Commands that tell of the image, and those that change it as a whole.

use super::arguments::Arguments;
use super::failed::Failed;
use super::fault::Fault;
use super::numbers::{bytes, parse_size, parse_size_called};
use super::open_image::OpenImage;
use super::session::Session;
use crate::commands::info::human_specific;
use crate::output;
use tandem_block::{ExtentKind, Preallocation};

/// `length`
pub fn length(session: &mut Session, _: &Arguments<'_>) -> Result<(), Failed> {
    let size = session.opened()?.disk().size();
    output::print(&format!("{}\n", bytes(size as f64)));
    Ok(())
}

/// `info`
pub fn info(session: &mut Session, _: &Arguments<'_>) -> Result<(), Failed> {
    let opened = session.opened()?;
    let (cluster_size, vm_state) = match &opened.info {
        Some(info) => (info.cluster_size, opened.vm_state_start()),
        None => (0, 0),
    };
    let mut text = format!(
        "format name: {}\ncluster size: {}\nvm state offset: {}\n",
        opened.format(),
        bytes(cluster_size as f64),
        bytes(vm_state as f64)
    );
    if let Some(info) = &opened.info {
        text += &human_specific(info);
    }
    output::print(&text);
    Ok(())
}

/// How many of the `len` bytes at `offset` are in the image itself, or are not, and which; none
/// behind its end.
fn allocation(opened: &OpenImage, offset: u64, len: u64) -> Result<(bool, u64), Fault> {
    let disk = opened.disk();
    let len = len.min(disk.size().saturating_sub(offset));
    if len == 0 {
        return Ok((false, 0));
    }
    let extent = disk.extent(offset, len)?;
    Ok((extent.kind != ExtentKind::Unallocated, extent.len))
}

/// `alloc`
pub fn alloc(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let opened = session.opened()?;
    let number = |at: usize| given.words.get(at).map(|text| parse_size(text));
    let start = number(0).unwrap_or(Ok(0))?;
    let count = number(1).unwrap_or(Ok(512))?;
    let (mut at, mut allocated) = (0, 0);
    while at < count {
        let (is_allocated, len) = allocation(opened, start + at, count - at)
            .map_err(|fault| fault.failed("is_allocated"))?;
        if len == 0 {
            break;
        }
        at += len;
        allocated += if is_allocated { len } else { 0 };
    }
    let start = bytes(start as f64);
    output::print(&format!(
        "{allocated}/{at} bytes allocated at offset {start}\n"
    ));
    Ok(())
}

/// `map`
pub fn map(session: &mut Session, _: &Arguments<'_>) -> Result<(), Failed> {
    let opened = session.opened()?;
    let size = opened.disk().size();
    let (mut start, mut end) = (0, 0);
    let mut last = false;
    while end < size {
        let (is_allocated, len) = allocation(opened, end, size - end).map_err(|fault| {
            session.error(&format!(
                "Failed to get allocation status: {}",
                fault.text()
            ))
        })?;
        if end > start && is_allocated != last {
            print_run(start, end, last);
            start = end;
        }
        last = is_allocated;
        end += len;
    }
    if end > start {
        print_run(start, end, last);
    }
    Ok(())
}

fn print_run(start: u64, end: u64, is_allocated: bool) {
    let len = end - start;
    let what = if is_allocated {
        "    allocated"
    } else {
        "not allocated"
    };
    let (shown, at) = (bytes(len as f64), bytes(start as f64));
    output::print(&format!(
        "{shown} ({len:#x}) bytes {what} at offset {at} ({start:#x})\n"
    ));
}

/// `flush`
pub fn flush(session: &mut Session, _: &Arguments<'_>) -> Result<(), Failed> {
    let flushed = session.opened()?.disk().flush();
    flushed.map_err(|e| session.error(&e.to_string()))
}

/// `aio_flush`: nothing is outstanding.
pub fn aio_flush(_: &mut Session, _: &Arguments<'_>) -> Result<(), Failed> {
    Ok(())
}

/// `truncate`
pub fn truncate(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let mut preallocation = Preallocation::Off;
    let (flags, operands) = given.parse("m:");
    for flag in flags {
        let (_, mode) = flag?;
        let text = || session.error(&format!("Invalid preallocation mode '{mode}'"));
        preallocation = Preallocation::from_name(mode).ok_or_else(text)?;
    }
    // QEMU's message names the first word, behind which the flags have been put.
    let is_flag = |word: &&&str| word.starts_with('-') && word.len() > 1;
    let named = given.words.iter().find(is_flag).or(operands.first());
    let named = named.copied().unwrap_or_default();
    let size = parse_size_called(operands.first().copied().unwrap_or_default(), named)?;
    let opened = session.opened()?;
    let fills = matches!(preallocation, Preallocation::Falloc | Preallocation::Full);
    if fills && opened.info.is_none() && size < opened.disk().size() {
        return Err(session.error("Cannot use preallocation for shrinking files"));
    }
    let resized = opened
        .touched_disk()
        .resize_preallocated(size, preallocation);
    resized.map_err(|e| session.error(&e.reason()))
}
