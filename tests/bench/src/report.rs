//! The table, as Markdown, and the same as JSON.

use serde_json::{Value, json};

use crate::measure::{Line, Role, Summary, Unit, Verdict};

/// The head of the table.
pub const HEAD: &str = "\
| work | bare | Tandem | others | goal | measured | |
| --- | --- | --- | --- | --- | --- | --- |";

/// A figure with three digits or so.
pub fn shown(value: f64, unit: Unit) -> String {
    let scaled = |value: f64, units: &[&str], step: f64| {
        let mut value = value;
        let mut unit = units[0];
        for next in &units[1..] {
            if value.abs() < step {
                break;
            }
            value /= step;
            unit = next;
        }
        format!("{} {unit}", digits(value))
    };
    match unit {
        Unit::Nanoseconds => scaled(value, &["ns", "µs", "ms", "s"], 1000.0),
        Unit::Seconds => scaled(value * 1e9, &["ns", "µs", "ms", "s"], 1000.0),
        Unit::Kib => scaled(value, &["KiB", "MiB", "GiB"], 1024.0),
        Unit::Instructions => scaled(value, &["instr.", "k instr.", "M instr."], 1000.0),
        Unit::Count => digits(value),
    }
}

fn digits(value: f64) -> String {
    match value.abs() {
        abs if abs >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        abs if abs >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A median with its spread.
fn spread(summary: Summary, unit: Unit) -> String {
    let [median, min, max] =
        [summary.median, summary.min, summary.max].map(|value| shown(value, unit));
    if min == max {
        return median;
    }
    format!("{median} ({min} to {max})")
}

/// A line of the table.
pub fn markdown(line: &Line) -> String {
    let median = |samples: &[f64]| shown(Summary::of(samples).median, line.unit);
    let of_others = line
        .series
        .iter()
        .filter(|series| matches!(series.role, Role::Peer | Role::Aside));
    let others: Vec<_> = of_others
        .map(|series| {
            let figure = match (series.floor.as_slice(), line.above_bare(series)) {
                ([_, ..], Some(above)) => format!("{} above bare", median(&above)),
                _ => median(&series.samples),
            };
            format!("{} {figure}", series.name)
        })
        .collect();
    let verdicts = line.verdicts();
    let each = |text: fn(&Verdict) -> String| {
        let texts: Vec<_> = verdicts.iter().map(text).collect();
        texts.join("<br>")
    };
    let mut work = line.work.clone();
    if !line.note.is_empty() {
        work += &format!("<br>{}", line.note);
    }
    format!(
        "| {work} | {} | {} | {} | {} | {} | {} |",
        line.bare().map_or(String::new(), median),
        line.of(Role::Tandem)
            .map_or(String::new(), |series| median(&series.samples)),
        others.join("<br>"),
        each(|verdict| verdict.goal.clone()),
        each(|verdict| spread(verdict.figure, verdict.unit)),
        each(|verdict| if verdict.met { "met" } else { "**missed**" }.to_owned()),
    )
}

/// All that is known of a line.
pub fn json(line: &Line) -> Value {
    let series = line.series.iter().map(|series| {
        json!({
            "name": series.name,
            "role": format!("{:?}", series.role).to_lowercase(),
            "samples": series.samples,
            "bare": series.floor,
        })
    });
    let goals = line.verdicts().into_iter().map(|verdict| {
        json!({
            "goal": verdict.goal,
            "median": verdict.figure.median,
            "min": verdict.figure.min,
            "max": verdict.figure.max,
            "met": verdict.met,
        })
    });
    json!({
        "row": line.row,
        "work": line.work,
        "note": line.note,
        "unit": format!("{:?}", line.unit).to_lowercase(),
        "series": series.collect::<Vec<_>>(),
        "goals": goals.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_a_few_digits() {
        assert_eq!(shown(1534.0, Unit::Nanoseconds), "1.53 µs");
        assert_eq!(shown(30.0, Unit::Nanoseconds), "30 ns");
        assert_eq!(shown(-3.26, Unit::Nanoseconds), "-3.26 ns");
        assert_eq!(shown(-1534.0, Unit::Nanoseconds), "-1.53 µs");
        assert_eq!(shown(0.0042, Unit::Seconds), "4.20 ms");
        assert_eq!(shown(12.0, Unit::Kib), "12 KiB");
        assert_eq!(shown(2048.0, Unit::Kib), "2 MiB");
        assert_eq!(shown(0.953, Unit::Count), "0.95");
    }
}
