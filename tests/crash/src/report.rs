//! Tables of what has been explored.

use crate::power::Tally;

/// Prints a line for each of `rows`, and their sum.
pub fn print(rows: &[(String, Tally)]) {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line = |name: &str, columns: [String; 6]| {
        let columns = columns.map(|column| format!("{column:>12}")).concat();
        println!("{name:width$}{columns}");
    };
    let heads = [
        "workloads",
        "crash points",
        "states",
        "exhaustive",
        "by QEMU too",
        "violations",
    ];
    line("", heads.map(|head| format!(" {head}")));
    let numbers = |tally: &Tally| {
        [
            tally.workloads,
            tally.points,
            tally.states,
            tally.exhaustive,
            tally.by_qemu,
            tally.violations,
        ]
        .map(|number| number.to_string())
    };
    let mut sum = Tally::default();
    for (name, tally) in rows {
        line(name, numbers(tally));
        sum += *tally;
    }
    line("all", numbers(&sum));
}
