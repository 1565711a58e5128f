//! The words of a command, read as the C library's `getopt` reads them.

use super::failed::Failed;

/// A flag and its value, which is empty if it takes none; or what is wrong with it.
pub type Flag<'a> = Result<(char, &'a str), Failed>;

/// A command: its name and the words behind it.
#[derive(Debug)]
pub struct Arguments<'a> {
    /// The name as it was given.
    pub name: &'a str,
    /// What follows it.
    pub words: Vec<&'a str>,
}

impl<'a> Arguments<'a> {
    /// Splits a line at blanks; nothing if it has no words.
    pub fn split(line: &'a str) -> Option<Self> {
        let mut words = line.split(' ').filter(|word| !word.is_empty());
        Some(Self {
            name: words.next()?,
            words: words.collect(),
        })
    }

    /// Tells flags and operands apart. `known` has the letters of the flags, each with a colon
    /// behind it if it takes a value. Flags may follow operands; after a mistake nothing is read.
    pub fn parse(&self, known: &str) -> (Vec<Flag<'a>>, Vec<&'a str>) {
        let (mut flags, mut operands) = (Vec::new(), Vec::new());
        let mut words = self.words.iter().copied();
        while let Some(word) = words.next() {
            match word.strip_prefix('-') {
                Some("-") => operands.extend(words.by_ref()),
                Some(letters) if !letters.is_empty() => {
                    let read = self.letters(letters, known, &mut words, &mut flags);
                    if let Err(failed) = read {
                        flags.push(Err(failed));
                        break;
                    }
                }
                _ => operands.push(word),
            }
        }
        (flags, operands)
    }

    /// Reads `letters` up to one that takes a value: the rest, or the next of `words`.
    fn letters(
        &self,
        letters: &'a str,
        known: &str,
        words: &mut impl Iterator<Item = &'a str>,
        flags: &mut Vec<Flag<'a>>,
    ) -> Result<(), Failed> {
        for (at, letter) in letters.char_indices() {
            let known = known
                .split_once(letter)
                .filter(|_| letter != ':')
                .ok_or_else(|| self.wrong(&format!("invalid option -- '{letter}'")))?;
            if !known.1.starts_with(':') {
                flags.push(Ok((letter, "")));
                continue;
            }
            let value = match &letters[at + letter.len_utf8()..] {
                "" => words.next().ok_or_else(|| {
                    self.wrong(&format!("option requires an argument -- '{letter}'"))
                })?,
                rest => rest,
            };
            flags.push(Ok((letter, value)));
            return Ok(());
        }
        Ok(())
    }

    fn wrong(&self, text: &str) -> Failed {
        Failed {
            message: format!("{}: {text}\n", self.name),
            ..Failed::usage()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> (String, Vec<&str>) {
        let (flags, operands) = Arguments::split(line).unwrap().parse("qP:v");
        let shown = flags.into_iter().map(|flag| match flag {
            Ok((letter, value)) => format!("{letter}{value} "),
            Err(failed) => failed.message,
        });
        (shown.collect(), operands)
    }

    #[test]
    fn flags_and_operands() {
        assert_eq!(
            parse("r -qP5  1 -v -P 6 - 2"),
            ("q P5 v P6 ".into(), vec!["1", "-", "2"])
        );
        assert_eq!(parse("r -- -q"), (String::new(), vec!["-q"]));
        assert_eq!(parse("r -qx -v").0, "q r: invalid option -- 'x'\n");
        assert_eq!(parse("r --q").0, "r: invalid option -- '-'\n");
        assert_eq!(parse("r -:").0, "r: invalid option -- ':'\n");
        assert_eq!(parse("r 1 -P").0, "r: option requires an argument -- 'P'\n");
        assert!(Arguments::split("   ").is_none());
    }
}
