use super::*;
use crate::control::test_common::control;
use rustix::event::Timespec;
use rustix::pipe::pipe;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;

/// Longer than any test takes.
const NEVER: Option<Duration> = None;

fn lines(text: &str) -> Vec<Value> {
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

fn open(path: &Path) -> Result<MetricsOutput> {
    MetricsOutput::open(&MetricsTarget::File(path.to_owned()))
}

#[test]
fn lines_go_to_the_end_of_a_file() {
    let (control, dir) = control();
    let path = dir.path().join("metrics");
    for round in 1..=2 {
        let log = MetricsLog::start(open(&path).unwrap(), NEVER, control.clone()).unwrap();
        log.reporter().report();
        log.reporter().report();
        log.finish();
        let lines = lines(&std::fs::read_to_string(&path).unwrap());
        assert_eq!(lines.len(), round * 2);
        for line in lines {
            assert!(line["timestamp_ms"].as_u64().unwrap() > 1_600_000_000_000);
            assert_eq!(line["state"], "running");
            assert_eq!(line["dropped_lines"], 0);
            assert_eq!(line["disks"][1]["name"], "vdb");
        }
    }
}

#[test]
fn lines_come_at_intervals() {
    let (control, _dir) = control();
    let (reader, writer) = pipe().unwrap();
    let target = MetricsTarget::Descriptor(writer.as_raw_fd());
    let output = MetricsOutput::open(&target).unwrap();
    drop(writer);
    let interval = Some(Duration::from_millis(1));
    let log = MetricsLog::start(output, interval, control).unwrap();
    let mut reader = BufReader::new(File::from(reader));
    for _ in 0..3 {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(lines(&line).len(), 1);
    }
    // One that is closed is no trouble.
    drop(reader);
    log.reporter().report();
    log.finish();
}

#[test]
fn a_reader_who_does_not_read_costs_lines() {
    let (control, _dir) = control();
    let (reader, writer) = pipe().unwrap();
    let output = MetricsOutput(writer.try_clone().unwrap().into());
    let log = MetricsLog::start(output, NEVER, control).unwrap();
    let reporter = log.reporter();
    // When the pipe is full, a line waits for room, and most of the others are too many.
    let at_once = Some(&Timespec::default());
    while poll(&mut [PollFd::new(&writer, PollFlags::OUT)], at_once).unwrap() == 1 {
        reporter.report();
    }
    drop(writer);
    for _ in 0..100 {
        reporter.report();
    }
    let mut reader = BufReader::new(File::from(reader));
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let dropped = lines(&line)[0]["dropped_lines"].as_u64().unwrap();
        // There may be a few from before it was full.
        if dropped >= 100 - MAX_WAITING as u64 {
            break;
        }
        reporter.report();
    }
    log.finish();
}

/// A reader who is late gets the lines that wait, as many as there are.
#[test]
fn the_end_waits_for_lines_to_be_written() {
    let (control, _dir) = control();
    let (reader, writer) = pipe().unwrap();
    let output = MetricsOutput(writer.try_clone().unwrap().into());
    let log = MetricsLog::start(output, NEVER, control).unwrap();
    // Held by the thread as well.
    let dropped = log.reporter.dropped.clone();
    let at_once = Some(&Timespec::default());
    while poll(&mut [PollFd::new(&writer, PollFlags::OUT)], at_once).unwrap() == 1 {
        log.reporter.report();
    }
    drop(writer);
    // One line waits for room, by then, and these for the line, as many as can.
    thread::sleep(Duration::from_millis(20));
    for _ in 0..100 {
        log.reporter.report();
    }
    let late = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        io::read_to_string(File::from(reader)).unwrap()
    });
    log.finish();
    assert_eq!(Arc::strong_count(&dropped), 1, "the thread goes on");
    assert!(lines(&late.join().unwrap()).len() > MAX_WAITING);
}

#[test]
fn the_end_does_not_wait_for_a_reader_for_ever() {
    let (control, _dir) = control();
    let (_reader, writer) = pipe().unwrap();
    let log = MetricsLog::start(MetricsOutput(File::from(writer)), NEVER, control).unwrap();
    while log.reporter.dropped.load(Ordering::Relaxed) == 0 {
        log.reporter().report();
    }
    log.finish();
}

#[test]
fn a_named_pipe_needs_no_reader() {
    let (control, dir) = control();
    let path = dir.path().join("pipe");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
    let log = MetricsLog::start(open(&path).unwrap(), NEVER, control).unwrap();
    log.reporter().report();
    // It comes later, and goes, and another one comes.
    for _ in 0..2 {
        let mut reader = BufReader::new(File::open(&path).unwrap());
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(lines(&line).len(), 1);
        drop(reader);
        log.reporter().report();
    }
    log.finish();
}

#[test]
fn what_is_no_place_for_metrics_is_refused() {
    let (_control, dir) = control();
    let message = open(&dir.path().join("b")).unwrap_err().to_string();
    assert!(message.contains("something else than metrics"), "{message}");
    let message = open(&dir.path().join("no/file")).unwrap_err().to_string();
    assert!(message.contains("/no/file'"), "{message}");
    let open = |descriptor| MetricsOutput::open(&MetricsTarget::Descriptor(descriptor));
    let message = open(i32::MAX).unwrap_err().to_string();
    assert!(message.contains("fd=2147483647"), "{message}");
    let file = File::open(dir.path().join("a")).unwrap();
    let message = open(file.as_raw_fd()).unwrap_err().to_string();
    assert!(message.contains("for reading only"), "{message}");
}
