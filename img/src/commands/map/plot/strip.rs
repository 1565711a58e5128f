//! The picture as a line of characters on a terminal.

use std::io::IsTerminal;

use super::{Class, Plot};
use crate::size;

/// Columns where there is no terminal to ask.
const DEFAULT_WIDTH: usize = 80;
/// As narrow as it gets, and as wide as a line can be read.
const WIDTHS: std::ops::RangeInclusive<usize> = 20..=400;

/// Draws `plot` as wide as the terminal, in colours unless `NO_COLOR` is set.
pub fn draw(plot: &Plot) -> String {
    let stdout = std::io::stdout();
    let is_plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    draw_with(plot, width(&stdout), stdout.is_terminal() && !is_plain)
}

fn width(stdout: &std::io::Stdout) -> usize {
    let asked = rustix::termios::tcgetwinsize(stdout).map(|size| usize::from(size.ws_col));
    match asked {
        Ok(width) if width > 0 => width.clamp(*WIDTHS.start(), *WIDTHS.end()),
        _ => DEFAULT_WIDTH,
    }
}

fn draw_with(plot: &Plot, width: usize, colours: bool) -> String {
    let paint = |class: Class, text: &str| match colours {
        true => format!("\x1b[{}m{text}\x1b[0m", colour(class)),
        false => text.to_owned(),
    };
    let mut text = format!("{}\n", plot.title);
    for cell in 0..width {
        let first = cell * plot.columns.len() / width;
        let end = ((cell + 1) * plot.columns.len() / width).max(first + 1);
        let (class, is_most) = most(&plot.columns[first..end]);
        text += &paint(class, glyph(class, is_most));
    }
    let (start, end) = (size::human(plot.start), size::human(plot.end));
    let gap = width.saturating_sub(start.len() + end.len()).max(1);
    text += &format!("\n{start}{:gap$}{end}\n", "");
    for (class, bytes, percent) in plot.legend() {
        let glyph = paint(class, glyph(class, true));
        let bytes = size::human(bytes);
        text += &format!(
            "{glyph} {:<16} {bytes:>9}  {percent:5.1} %\n",
            class.label()
        );
    }
    text
}

/// What a cell of the strip stands for: data if there is any, and whether that is the most of it.
fn most(columns: &[super::Counts]) -> (Class, bool) {
    let sum = |class: Class| columns.iter().map(|c| c[class as usize]).sum::<u64>();
    let all: u64 = Class::ALL.into_iter().map(sum).sum();
    let with_data = Class::ALL.into_iter().filter(|class| class.holds_data());
    let data = with_data.max_by_key(|class| sum(*class));
    match data.filter(|class| sum(*class) > 0) {
        Some(class) => (class, sum(class) >= all / 2),
        None if sum(Class::Zero) > sum(Class::Unallocated) => (Class::Zero, true),
        None => (Class::Unallocated, true),
    }
}

fn glyph(class: Class, is_most: bool) -> &'static str {
    match class {
        Class::Data if is_most => "█",
        Class::Data => "▒",
        Class::Compressed => "c",
        Class::Below1 => "1",
        Class::Below2 => "2",
        Class::Below3 => "3",
        Class::Zero => "0",
        Class::Unallocated => "·",
    }
}

/// The colour as terminals number them.
fn colour(class: Class) -> &'static str {
    match class {
        Class::Data => "34",
        Class::Compressed => "33",
        Class::Below1 => "32",
        Class::Below2 => "35",
        Class::Below3 => "31",
        Class::Zero | Class::Unallocated => "90",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::map::Part;
    use tandem_block::ExtentKind;

    #[test]
    fn the_strip() {
        let mut plot = Plot::new("disk".to_owned(), 0, 8192);
        let kinds = [
            (ExtentKind::Data, 0),
            (ExtentKind::Compressed, 0),
            (ExtentKind::Zero, 1),
            (ExtentKind::Data, 2),
        ];
        for (i, (kind, depth)) in (0..).zip(kinds) {
            plot.add(&Part {
                start: i * 2048,
                length: 2048,
                depth,
                kind,
                is_hole: false,
                offset: None,
            });
        }
        let text = draw_with(&plot, 20, false);
        assert!(
            text.starts_with("disk\n█████ccccc0000022222\n0 B            8 KiB\n"),
            "{text}"
        );
        assert!(
            text.contains("█ data                 2 KiB   25.0 %\n"),
            "{text}"
        );
        assert!(draw_with(&plot, 20, true).contains("\x1b[34m█\x1b[0m"));
    }
}
