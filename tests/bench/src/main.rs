//! Tandem measured next to its peers. `tests/bench/run` builds what is needed and starts this.
//!
//! In each round everybody does the same work in turns, and figures that compare are made of those
//! of one round; the table shows medians of the rounds with their spread. Nothing here is a test: what
//! is missed is told, and the exit status does not depend on it.
//!
//! | module | what it has |
//! | --- | --- |
//! | [`measure`] | turns, medians, goals |
//! | [`report`], [`plot`] | the table, and pictures |
//! | [`target`], [`image`], [`work`] | engines, their images and requests |
//! | [`rows`] | what is measured |

mod boot;
mod child;
mod client;
mod clock;
mod floor;
mod image;
mod machine;
mod measure;
mod one;
mod plot;
mod report;
mod rows;
mod suite;
mod target;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use boot::Boot;
use one::One;
use rows::{INSTRUCTIONS, ROWS, Row};
use suite::{Settings, Suite};

/// Measures Tandem next to its peers, and prints a table in Markdown.
#[derive(Parser)]
#[command(name = "tests/bench/run", disable_version_flag = true)]
struct Arguments {
    #[command(subcommand)]
    part: Option<Part>,
    /// Rounds of which medians are made
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Only these rows; --list tells their names
    #[arg(long, num_args = 1.., value_name = "NAME")]
    only: Vec<String>,
    /// Only instructions, which do not depend on what else the machine does
    #[arg(long, conflicts_with = "only")]
    instructions: bool,
    /// Tell the rows
    #[arg(long)]
    list: bool,
    /// Write all samples to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write plots to this directory
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Where files in the page cache lie
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    memory: PathBuf,
    /// Where files on a disk lie
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    disk: PathBuf,
    /// Where the programs are
    #[arg(long, hide = true, default_value = "target/release")]
    programs: PathBuf,
    /// Where the guest suite's kernel is
    #[arg(long, hide = true, default_value = "target/lab")]
    lab: PathBuf,
}

/// What runs in processes of their own.
#[derive(Subcommand)]
enum Part {
    #[command(hide = true)]
    One(One),
    #[command(hide = true)]
    Boot(Boot),
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if let Some(part) = &arguments.part {
        match part {
            Part::One(one) => one::run(one),
            Part::Boot(boot) => boot::run(boot),
        }
        return ExitCode::SUCCESS;
    }
    if arguments.instructions {
        arguments.only.push(INSTRUCTIONS.to_owned());
    }
    if arguments.list {
        ROWS.iter()
            .for_each(|row| println!("{:<12} {}", row.name, row.about));
        return ExitCode::SUCCESS;
    }
    let wanted = match chosen(&arguments.only) {
        Ok(wanted) => wanted,
        Err(name) => {
            eprintln!("there is no row '{name}'; --list tells which there are");
            return ExitCode::from(2);
        }
    };
    let mut suite = Suite {
        settings: Settings {
            rounds: arguments.rounds.into(),
            memory: arguments.memory,
            disk: arguments.disk,
            programs: arguments.programs,
            lab: arguments.lab,
        },
        row: "",
        lines: Vec::new(),
        plots: Vec::new(),
    };
    println!("{}\n\n{}", machine::description(), report::HEAD);
    for row in wanted {
        suite.row = row.name;
        (row.run)(&mut suite);
    }
    if let Err(error) = suite.write(arguments.json.as_deref(), arguments.svg.as_deref()) {
        eprintln!("writing the results: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// The rows that are named, or all; a name that none has is an error.
fn chosen(names: &[String]) -> Result<Vec<&'static Row>, &String> {
    if names.is_empty() {
        return Ok(ROWS.iter().filter(|row| !row.is_extra).collect());
    }
    let row = |name| ROWS.iter().find(|row| row.name == name).ok_or(name);
    names.iter().map(row).collect()
}
