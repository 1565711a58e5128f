//! `tandem-io`: reads and writes disk images, one command after another, in the language of
//! `qemu-io`.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `table`, `command`, `arguments` | the commands, and how they are called |
//! | `session` | what goes on between them, and opening images |
//! | `request`, `open_image` | what is to be opened; the image that is open |
//! | `transfer`, `report` | reading and writing, and telling of it |
//! | `inspect` | telling what the image is like, and changing it as a whole |
//! | `numbers`, `fault`, `failed` | numbers and mistakes in QEMU's words |

mod arguments;
mod command;
mod failed;
mod fault;
mod inspect;
mod numbers;
mod open_image;
mod report;
mod request;
mod session;
mod table;
mod transfer;

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, IsTerminal, Read};
use std::process::ExitCode;

use clap::Command;

use crate::common_options;
use crate::failure::Failure;
use crate::getopt::{self, Name, Outcome, Parsed, flag, value};
use crate::output;
pub use fault::system_text;
use request::{Request, pairs};
use session::Session;

/// Bytes of a line on standard input that are taken for one command.
const LINE: u64 = 1023;

/// Runs the program, which was called by `name`.
pub fn run(name: OsString, args: &[OsString]) -> ExitCode {
    let name = Name::without_hints(name);
    let parsed = match getopt::parse_program(program(), &name, args) {
        Ok(Outcome::Run(parsed)) if parsed.operands.len() <= 1 => parsed,
        Ok(Outcome::Help(help)) => {
            output::print(&format!("{help}\n"));
            return ExitCode::SUCCESS;
        }
        mistake => {
            if let Err(failure) = mistake {
                output::complain(&failure.message);
            }
            output::print(&format!("{}\n", program().render_help()));
            return ExitCode::FAILURE;
        }
    };
    if parsed.has("version") {
        output::print(&format!(
            "tandem-io version {}\n",
            env!("CARGO_PKG_VERSION")
        ));
        return ExitCode::SUCCESS;
    }
    match work(&parsed) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            output::complain_of(&failure.message);
            ExitCode::from(failure.status)
        }
    }
}

/// The definition of the program.
pub fn program() -> Command {
    Command::new("tandem-io")
        .about(
            "Reads and writes disk images, one command after another, in the language of qemu-io",
        )
        .disable_help_flag(true)
        .disable_version_flag(true)
        .override_usage("tandem-io [OPTIONS]... [-c COMMAND]... [FILENAME]")
        .args([
            getopt::help(),
            flag("version", Some('V'), "Print the version"),
            value(
                "cmd",
                Some('c'),
                "COMMAND",
                "Carry out this command, and read none",
            ),
            common_options::format_option("the image"),
            flag("read-only", Some('r'), "Open the image for reading only"),
            flag(
                "snapshot",
                Some('s'),
                "Leave the image as it is: a temporary one takes what is written",
            ),
            flag("nocache", Some('n'), "Past the page cache, as -t none"),
            flag(
                "copy-on-read",
                Some('C'),
                "Keep what is read from a backing file",
            ),
            flag("misalign", Some('m'), "Use memory that is not aligned"),
            flag("native-aio", Some('k'), "As -i native"),
            value(
                "aio",
                Some('i'),
                "MODE",
                "threads, native or io_uring; native needs -t none or directsync",
            ),
            value(
                "discard",
                Some('d'),
                "MODE",
                "unmap (default) gives discarded space back, ignore does not",
            ),
            value(
                "cache",
                Some('t'),
                "MODE",
                "Cache mode: writethrough (default), writeback, none, directsync, unsafe",
            ),
            value(
                "trace",
                Some('T'),
                "EVENTS",
                "Accepted; there are no trace events",
            ),
            common_options::object_option(),
            common_options::image_opts_option(),
            common_options::force_share_option(),
            common_options::follow_option(),
        ])
        .after_help(
            "Without -c, commands are read from standard input. The exit status is 1 if one of \
             them has failed.\nSee `tandem-io -c help` for the commands.\n\n\
             Examples:\n  \
             tandem-io -c 'write -P 7 1M 64k' -c 'read -P 7 1M 64k' disk.qcow2\n  \
             tandem-io -r -f raw -c 'read -v 0 512' disk.raw\n  \
             tandem-io --image-opts driver=qcow2,file.filename=disk.qcow2 -c map",
        )
}

/// Does what the command line asks for, and tells whether all commands have succeeded.
fn work(args: &Parsed) -> Result<bool, Failure> {
    let mut session = Session {
        name: args.name.clone(),
        opened: None,
        follow: common_options::follow(args)?,
        image_opts: args.has("image-opts"),
        misalign: args.has("misalign"),
        quit: false,
        pending: String::new(),
    };
    let mut request = Request::new(session.follow);
    let mut format = None;
    let program = program();
    for (id, value) in args.all() {
        let value = value.to_string_lossy();
        if id == "format" {
            format = Some(value.into_owned().into());
        } else if id == "trace" {
            let warning = format!("warning: trace event '{value}' does not exist");
            output::complain_line(&args.name.text(&warning));
        } else {
            let option = program.get_opts().find(|option| option.get_id() == id);
            let letter = option.and_then(|option| option.get_short());
            request
                .flag(letter.unwrap_or_default(), &value)
                .map_err(|text| args.name.error(&text))?;
        }
    }
    if format.is_some() && session.image_opts {
        return Err(args
            .name
            .error("--image-opts and -f are mutually exclusive"));
    }
    args.refuse_objects()?;
    if let [operand] = &args.operands[..] {
        let mut list = Vec::new();
        if session.image_opts {
            list = pairs(&operand.to_string_lossy(), &args.name);
        } else {
            request.name = Some(operand.clone());
            request.format = format;
        }
        session.open(request, &list).map_err(|failed| Failure {
            message: failed.message,
            status: 1,
        })?;
    }
    let commands: Vec<_> = args.values("cmd").map(OsStr::to_string_lossy).collect();
    let mut succeeded = true;
    if commands.is_empty() {
        succeeded = interact(&mut session);
    }
    for command in commands {
        if session.quit {
            break;
        }
        succeeded &= command::execute(&mut session, &command);
    }
    if let Err(failed) = session.close() {
        output::complain(&failed.message);
        succeeded = false;
    }
    Ok(succeeded)
}

/// Carries out commands from standard input, and tells whether all have succeeded.
fn interact(session: &mut Session) -> bool {
    let prompt = format!("{}> ", session.name.base());
    let mut succeeded = true;
    while !session.quit {
        output::print_now(&prompt);
        let mut line = Vec::new();
        let stdin = std::io::stdin().lock();
        let is_terminal = stdin.is_terminal();
        let read = stdin.take(LINE).read_until(b'\n', &mut line);
        if !read.is_ok_and(|len| len > 0) {
            if is_terminal {
                output::print("\n");
            }
            break;
        }
        let line = String::from_utf8_lossy(&line);
        let command = line.strip_suffix('\n').unwrap_or(&line);
        succeeded &= command::execute(session, command);
        if is_terminal {
            session.catch_up();
        }
    }
    succeeded
}
