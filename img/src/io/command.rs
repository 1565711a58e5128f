//! Commands: how they are called, and who carries them out.

use super::arguments::Arguments;
use super::failed::Failed;
use super::session::Session;
use super::table::{COMMANDS, MISSING};
use crate::output;

/// What a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// An image that is open.
    Image,
    /// An image that is open for writing.
    WritableImage,
}

/// A command.
pub struct Command {
    /// What it is called.
    pub name: &'static str,
    /// What it is called besides.
    pub alias: Option<&'static str>,
    /// Flags and operands, as in the synopsis.
    pub arguments: Option<&'static str>,
    /// What it does, in a few words.
    pub summary: &'static str,
    /// What `help` tells besides. Empty if the synopsis tells all.
    pub help: &'static str,
    /// Fewest words behind the name, and most if there is a limit.
    pub count: (usize, Option<usize>),
    /// What must be open.
    pub needs: Needs,
    /// Nobody waits for what it does.
    pub is_asynchronous: bool,
    /// Carries it out.
    pub run: fn(&mut Session, &Arguments<'_>) -> Result<(), Failed>,
}

impl Command {
    /// The command called `name`.
    pub fn find(name: &str) -> Option<&'static Self> {
        COMMANDS
            .iter()
            .find(|command| command.name == name || command.alias == Some(name))
    }

    /// The synopsis, under `name`.
    pub fn synopsis(&self, name: &str) -> String {
        let arguments = self.arguments.map(|text| format!("{text} "));
        let arguments = arguments.unwrap_or_default();
        format!("{name} {arguments}-- {}\n", self.summary)
    }

    fn check(&self, session: &Session, given: &Arguments<'_>) -> Result<(), Failed> {
        if self.needs != Needs::Nothing && session.opened.is_none() {
            return Err(Failed::message("no file open, try 'help open'"));
        }
        let (count, (least, most)) = (given.words.len(), self.count);
        if count < least || most.is_some_and(|most| count > most) {
            let expected = match most {
                None => format!("at least {least}"),
                Some(most) if most == least => least.to_string(),
                Some(most) => format!("between {least} and {most}"),
            };
            return Err(Failed::message(&format!(
                "bad argument count {count} to {}, expected {expected} arguments",
                given.name
            )));
        }
        let read_only = |opened: &super::open_image::OpenImage| opened.request.is_read_only();
        if self.needs == Needs::WritableImage && session.opened.as_ref().is_some_and(read_only) {
            return Err(session.error("Block node is read-only"));
        }
        Ok(())
    }
}

/// Carries out `line`, and tells whether that succeeded.
pub fn execute(session: &mut Session, line: &str) -> bool {
    let Some(given) = Arguments::split(line) else {
        return true;
    };
    let Some(command) = Command::find(given.name) else {
        let text = if MISSING.contains(&given.name) {
            format!("Command not supported yet: {}", given.name)
        } else {
            format!("command \"{}\" not found", given.name)
        };
        output::complain_line(&text);
        return false;
    };
    if !command.is_asynchronous {
        session.catch_up();
    }
    let done = command
        .check(session, &given)
        .and_then(|()| (command.run)(session, &given));
    let Err(failed) = done else {
        return true;
    };
    output::print(&failed.output);
    output::complain_of(&failed.message);
    if failed.usage {
        output::print(&command.synopsis(command.name));
    }
    false
}

/// `help`
pub fn help(_: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let Some(name) = given.words.first() else {
        for command in COMMANDS {
            output::print(&command.synopsis(command.name));
        }
        output::print("\nUse 'help commandname' for extended help.\n");
        return Ok(());
    };
    let command =
        Command::find(name).ok_or_else(|| Failed::output(&format!("command {name} not found")))?;
    output::print(&command.synopsis(name));
    output::print(command.help);
    Ok(())
}
