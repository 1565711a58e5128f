//! What the documentation refers to is there.
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use tandem_vmm::DiskConfig;
use tandem_vmm::control::COMMANDS;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The pages of the repository.
fn pages() -> Vec<PathBuf> {
    let mut pages = Vec::new();
    let mut directories = vec![PathBuf::from(ROOT)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                directories.push(path);
            } else if name.ends_with(".md") {
                pages.push(path);
            }
        }
    }
    pages
}

/// The lines outside of blocks of code.
fn prose(page: &Path) -> Vec<String> {
    let mut is_code = false;
    let text = fs::read_to_string(page).unwrap();
    let lines = text.lines().filter(|line| {
        let is_fence = line.starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    });
    lines.map(str::to_owned).collect()
}

/// The names by which links lead to the headings of a page.
fn anchors(page: &Path) -> BTreeSet<String> {
    let lines = prose(page);
    let headings = lines.iter().filter_map(|line| {
        let title = line.trim_start_matches('#');
        (title.len() < line.len()).then(|| title.trim().to_lowercase())
    });
    let is_kept = |c: &char| c.is_alphanumeric() || "-_ ".contains(*c);
    let anchor = |title: String| title.chars().filter(is_kept).collect::<String>();
    headings
        .map(|title| anchor(title).replace(' ', "-"))
        .collect()
}

#[test]
fn each_link_leads_somewhere() {
    let mut links = 0;
    for page in pages() {
        for line in prose(&page) {
            for part in line.split("](").skip(1) {
                let target = part.split(')').next().unwrap();
                if target.starts_with("https:") {
                    continue;
                }
                links += 1;
                let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
                let to = match file {
                    "" => page.clone(),
                    file => page.parent().unwrap().join(file),
                };
                assert!(to.exists(), "{}: {target}", page.display());
                let is_there = anchor.is_empty() || anchors(&to).contains(anchor);
                assert!(is_there, "{}: {target}", page.display());
            }
        }
    }
    assert!(links > 30, "{links}");
}

/// What the first column of the table that begins with `head` has in code.
fn first_column(page: &str, head: &str) -> BTreeSet<String> {
    let lines = prose(&Path::new(ROOT).join(page));
    let table = lines.iter().skip_while(|line| !line.starts_with(head));
    let table = table.skip(1).take_while(|line| line.starts_with('|'));
    let cells = table.filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    let names = cells.flat_map(|cell| cell.split('`').step_by(2));
    names.map(str::to_owned).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn each_disk_key_is_described() {
    let described = first_column("docs/run.md", "| key |");
    assert_eq!(described, set(DiskConfig::KEYS));
}

#[test]
fn each_control_command_is_described() {
    let described = first_column("docs/control.md", "| `command` |");
    assert_eq!(described, set(COMMANDS));
}
