//! What the command line asks for: `cases=NAME,… disk=SECTORS:rw|ro:SERIAL …`.

use alloc::vec::Vec;
use core::ffi::CStr;
use core::slice;

/// Offset of `hdr.cmd_line_ptr` in the zero page (Linux boot protocol).
const CMD_LINE_PTR: usize = 0x228;
/// Most bytes of a command line.
const CMD_LINE_SIZE: usize = 2048;

/// Cases to run and disks to expect, in order.
pub struct Plan {
    pub cases: Vec<&'static str>,
    pub disks: Vec<DiskPlan>,
}

/// What a disk is to be like.
pub struct DiskPlan {
    pub sectors: u64,
    pub read_only: bool,
    pub serial: &'static str,
}

impl Plan {
    /// Reads the command line behind the zero page.
    ///
    /// # Safety
    /// `zero_page` is what the boot protocol hands over.
    pub unsafe fn read(zero_page: *const u8) -> Self {
        // SAFETY: the zero page holds the address of the command line, which nobody changes.
        let text = unsafe {
            let address = zero_page.add(CMD_LINE_PTR).cast::<u32>().read();
            slice::from_raw_parts(address as usize as *const u8, CMD_LINE_SIZE)
        };
        let text = CStr::from_bytes_until_nul(text).expect("a command line with an end");
        let words = text.to_str().expect("a command line in UTF-8").split(' ');
        let values = |key| words.clone().filter_map(move |word| word.strip_prefix(key));
        Self {
            cases: values("cases=").flat_map(|list| list.split(',')).collect(),
            disks: values("disk=").map(DiskPlan::parse).collect(),
        }
    }
}

impl DiskPlan {
    fn parse(text: &'static str) -> Self {
        let parts: Vec<_> = text.split(':').collect();
        let [sectors, mode, serial] = parts[..] else {
            panic!("'{text}' is not SECTORS:rw|ro:SERIAL");
        };
        Self {
            sectors: sectors.parse().expect("a number of sectors"),
            read_only: mode == "ro",
            serial,
        }
    }
}
