//! Clocks, in nanoseconds, and what a process has in memory.

use std::fs;

/// A clock: nanoseconds since some moment.
pub type Clock = fn() -> f64;

/// Processor time of this thread.
pub fn thread() -> f64 {
    read(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Time that goes by.
pub fn wall() -> f64 {
    read(libc::CLOCK_MONOTONIC)
}

/// Processor time that another process has used.
pub fn of_process(pid: u32) -> f64 {
    let mut clock = 0;
    // SAFETY: `clock` is valid for the C library to write to.
    let error = unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) };
    assert_eq!(error, 0, "the clock of process {pid}");
    read(clock)
}

fn read(clock: libc::clockid_t) -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid for the kernel to write to.
    let result = unsafe { libc::clock_gettime(clock, &mut time) };
    assert_eq!(result, 0, "reading a clock");
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// KiB of memory that process `pid` (or `self`) has of its own: anonymous, or files that it has
/// mapped and changed, or read. Mappings that `is_counted` refuses by their line are left out.
pub fn resident_kib(pid: &str, is_counted: impl Fn(&str) -> bool) -> f64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut counts = false;
    let mut sum = 0.0;
    for line in maps.lines() {
        match line.strip_prefix("Rss:") {
            Some(rss) if counts => {
                let number = rss.trim().trim_end_matches(" kB");
                sum += number.parse::<f64>().unwrap();
            }
            // A mapping begins with a line of its addresses.
            None if line.as_bytes()[0].is_ascii_hexdigit() && line.contains('-') => {
                let first = line.split(' ').next().unwrap_or_default();
                if first.contains('-') {
                    counts = is_counted(line);
                }
            }
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_counts_when_it_is_used_and_its_mapping_is_not_left_out() {
        const LENGTH: usize = 32 << 20;
        let before = resident_kib("self", |_| true);
        let memory = std::hint::black_box(vec![1_u8; LENGTH]);
        let address = memory.as_ptr() as usize;
        let is_elsewhere = |line: &str| {
            let range = line
                .split(' ')
                .next()
                .and_then(|range| range.split_once('-'));
            let (start, end) = range.unwrap();
            let parse = |text| usize::from_str_radix(text, 16).unwrap();
            !(parse(start)..parse(end)).contains(&address)
        };
        let all = resident_kib("self", |_| true);
        let rest = resident_kib("self", is_elsewhere);
        assert!(all - before > 31.0 * 1024.0, "{before} {all}");
        assert!(all - rest > 31.0 * 1024.0, "{rest} {all}");
    }
}
