//! What all rows share: where files are, and where lines go.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::measure::{Line, Turns};
use crate::plot::Plot;
use crate::report;

pub struct Settings {
    pub rounds: usize,
    /// A directory of a file system in memory, if there is one.
    pub memory: PathBuf,
    /// A directory of a file system on a disk.
    pub disk: PathBuf,
    /// Of what Cargo has built.
    pub programs: PathBuf,
    /// The kernel and busybox of the guest suite.
    pub lab: PathBuf,
}

pub struct Suite {
    pub settings: Settings,
    pub row: &'static str,
    pub lines: Vec<Line>,
    pub plots: Vec<Plot>,
}

impl Suite {
    /// So many turns for each contender in a round.
    pub fn turns(&self, pieces: usize) -> Turns {
        Turns {
            rounds: self.settings.rounds,
            pieces,
        }
    }

    /// A new directory, whose files are in memory.
    pub fn memory(&self) -> TempDir {
        tempfile::tempdir_in(&self.settings.memory).unwrap()
    }

    /// A new directory, whose files are on a disk.
    pub fn disk(&self) -> TempDir {
        tempfile::tempdir_in(&self.settings.disk).unwrap()
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.settings.programs.join(name)
    }

    /// Takes a line, and prints it.
    pub fn add(&mut self, mut line: Line) {
        line.row = self.row;
        println!("{}", report::markdown(&line));
        self.lines.push(line);
    }

    /// Writes the JSON and the plots.
    pub fn write(&self, json: Option<&Path>, plots: Option<&Path>) -> std::io::Result<()> {
        if let Some(path) = json {
            let lines: Vec<_> = self.lines.iter().map(report::json).collect();
            let plots: Vec<_> = self.plots.iter().map(Plot::json).collect();
            let all = serde_json::json!({
                "machine": crate::machine::description(),
                "rounds": self.settings.rounds,
                "lines": lines,
                "plots": plots,
            });
            std::fs::write(path, format!("{all:#}\n"))?;
        }
        if let Some(directory) = plots {
            std::fs::create_dir_all(directory)?;
            for plot in &self.plots {
                plot.draw(directory);
            }
        }
        Ok(())
    }
}
