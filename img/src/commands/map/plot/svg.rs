//! The picture as one SVG file, for light and dark backgrounds.

use std::fmt::Write;

use super::{Class, PLACES, Plot, ticks};
use crate::size;

const WIDTH: f64 = 1080.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 24.0;
const PLOT_WIDTH: f64 = WIDTH - LEFT - RIGHT;
const LEGEND: f64 = 52.0;
const LEGEND_LINE: f64 = 24.0;
const BAR_HEIGHT: f64 = 140.0;
const AXIS_HEIGHT: f64 = 46.0;
const PLACES_TITLE: f64 = 34.0;
const PLACES_HEIGHT: f64 = 300.0;

const STYLE: &str = "
text{font:13px system-ui,'DejaVu Sans',sans-serif;fill:#1f2328}
.title{font-size:17px;font-weight:600}.small{font-size:12px;fill:#59636e}
.end{text-anchor:end}.middle{text-anchor:middle}
.page{fill:#fff}.frame{fill:none;stroke:#8c959f}.grid{stroke:#8c959f;stroke-opacity:.35}
.data{fill:#0969da}.compressed{fill:#bf5b00}.below1{fill:#1a8f5c}.below2{fill:#8250df}
.below3{fill:#bf3989}.zero{fill:#c3c9d0}.unallocated{fill:#f1f3f5}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.page{fill:#0d1117}
.frame{stroke:#6e7681}.data{fill:#4493f8}.compressed{fill:#f0883e}.below1{fill:#3fb950}
.below2{fill:#ab7df8}.below3{fill:#f778ba}.zero{fill:#4a525c}.unallocated{fill:#1c2128}}
";

/// Draws `plot`.
pub fn draw(plot: &Plot) -> String {
    let has_places = !plot.places.is_empty();
    let (legend, top) = legend(plot);
    let bars_end = top + BAR_HEIGHT + AXIS_HEIGHT;
    let height = match has_places {
        true => bars_end + PLACES_TITLE + PLACES_HEIGHT + AXIS_HEIGHT,
        false => bars_end,
    };
    let title = escape(&plot.title);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n\
         <text class=\"title\" x=\"{LEFT}\" y=\"32\">{title}</text>\n"
    );
    svg += &legend;
    svg += &bars(plot, top);
    svg += &x_axis(plot, top, BAR_HEIGHT);
    if has_places {
        svg += &places(plot, bars_end + PLACES_TITLE);
    }
    svg + "</svg>\n"
}

fn name(class: Class) -> &'static str {
    match class {
        Class::Data => "data",
        Class::Compressed => "compressed",
        Class::Below1 => "below1",
        Class::Below2 => "below2",
        Class::Below3 => "below3",
        Class::Zero => "zero",
        Class::Unallocated => "unallocated",
    }
}

/// The legend, and where the picture below it begins.
fn legend(plot: &Plot) -> (String, f64) {
    let mut svg = String::new();
    let (mut x, mut y) = (LEFT, LEGEND);
    for (class, bytes, percent) in plot.legend() {
        let text = format!("{} {} ({percent:.1} %)", class.label(), size::human(bytes));
        let width = 44.0 + 7.0 * text.len() as f64;
        if x + width > WIDTH - RIGHT {
            (x, y) = (LEFT, y + LEGEND_LINE);
        }
        let name = name(class);
        for class in [name, "frame"] {
            svg += &format!(
                "<rect class=\"{class}\" x=\"{x:.0}\" y=\"{y}\" width=\"14\" height=\"14\" rx=\"2\"/>"
            );
        }
        svg += &format!(
            "<text x=\"{:.0}\" y=\"{}\">{text}</text>\n",
            x + 20.0,
            y + 12.0
        );
        x += width;
    }
    (svg, y + 40.0)
}

/// A bar for each column, divided by what its bytes are.
fn bars(plot: &Plot, top: f64) -> String {
    let count = plot.columns.len();
    let x = |column: usize| LEFT + PLOT_WIDTH * column as f64 / count as f64;
    let mut paths = vec![String::new(); Class::ALL.len()];
    let mut first = 0;
    while first < count {
        let counts = plot.columns[first];
        let sum = counts.iter().sum::<u64>().max(1) as f64;
        let shares = counts.map(|bytes| (bytes as f64 / sum * BAR_HEIGHT * 10.0).round());
        let alike = |counts: &[u64; Class::ALL.len()]| {
            let sum = counts.iter().sum::<u64>().max(1) as f64;
            counts.map(|bytes| (bytes as f64 / sum * BAR_HEIGHT * 10.0).round()) == shares
        };
        let run = plot.columns[first..]
            .iter()
            .take_while(|c| alike(c))
            .count();
        let (left, width) = (x(first), x(first + run) - x(first));
        let mut bottom = top + BAR_HEIGHT;
        for (path, (share, bytes)) in paths.iter_mut().zip(shares.into_iter().zip(counts)) {
            if bytes == 0 {
                continue;
            }
            // The least of it can be seen.
            let height = (share / 10.0).max(1.0);
            bottom -= share / 10.0;
            let upper = bottom.max(top);
            let _ = write!(
                path,
                "M{left:.1} {upper:.1}h{width:.1}v{height:.1}h-{width:.1}z"
            );
        }
        first += run;
    }
    let mut svg = format!("<g shape-rendering=\"crispEdges\">\n{}", background(top));
    // What there is little of is drawn over what there is much of.
    for (class, path) in Class::ALL.into_iter().zip(paths).rev() {
        if !path.is_empty() {
            let name = name(class);
            svg += &format!("<path class=\"{name}\" d=\"{path}\"/>\n");
        }
    }
    svg += "</g>\n";
    for (percent, y) in [
        (100, top),
        (50, top + BAR_HEIGHT / 2.0),
        (0, top + BAR_HEIGHT),
    ] {
        svg += &format!(
            "<text class=\"small end\" x=\"{}\" y=\"{}\">{percent} %</text>\n",
            LEFT - 8.0,
            y + 4.0
        );
    }
    svg + &frame(top, BAR_HEIGHT)
}

fn background(top: f64) -> String {
    format!(
        "<rect class=\"unallocated\" x=\"{LEFT}\" y=\"{top}\" width=\"{PLOT_WIDTH}\" \
         height=\"{BAR_HEIGHT}\"/>\n"
    )
}

fn frame(top: f64, height: f64) -> String {
    format!(
        "<rect class=\"frame\" x=\"{LEFT}\" y=\"{top}\" width=\"{PLOT_WIDTH}\" \
         height=\"{height}\"/>\n"
    )
}

/// The axis of guest offsets below what begins at `top`.
fn x_axis(plot: &Plot, top: f64, height: f64) -> String {
    let mut svg = String::new();
    let len = (plot.end - plot.start).max(1) as f64;
    let bottom = top + height;
    for tick in ticks(plot.start, plot.end, 8) {
        let x = LEFT + PLOT_WIDTH * (tick - plot.start) as f64 / len;
        svg += &format!(
            "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{top}\" x2=\"{x:.1}\" y2=\"{}\"/>\
             <text class=\"small middle\" x=\"{x:.1}\" y=\"{}\">{}</text>\n",
            bottom + 5.0,
            bottom + 18.0,
            size::human(tick)
        );
    }
    svg + &format!(
        "<text class=\"small middle\" x=\"{:.1}\" y=\"{}\">offset in the disk</text>\n",
        LEFT + PLOT_WIDTH / 2.0,
        bottom + 36.0
    )
}

/// Guest offset against place in the file, for the data of the image itself.
fn places(plot: &Plot, top: f64) -> String {
    let mut path = String::new();
    let (columns, rows) = (PLACES.0 as f64, PLACES.1 as f64);
    let (width, unit) = (PLOT_WIDTH / columns, PLACES_HEIGHT / rows);
    for (i, column) in plot.places.iter().enumerate() {
        let x = LEFT + PLOT_WIDTH * i as f64 / columns;
        let mut row = 0;
        while row < column.len() {
            let run = column[row..].iter().take_while(|is_used| **is_used).count();
            if run > 0 {
                let y = top + PLACES_HEIGHT - (row + run) as f64 * unit;
                let height = run as f64 * unit;
                let _ = write!(path, "M{x:.1} {y:.1}h{width:.1}v{height:.1}h-{width:.1}z");
            }
            row += run.max(1);
        }
    }
    let mut svg = format!(
        "<text x=\"{LEFT}\" y=\"{}\">Offset in the file that holds the data of the image</text>\n\
         <path class=\"data\" d=\"{path}\"/>\n",
        top - 10.0
    );
    for tick in ticks(0, plot.file_end, 6) {
        let y = top + PLACES_HEIGHT * (1.0 - tick as f64 / plot.file_end.max(1) as f64);
        svg += &format!(
            "<line class=\"grid\" x1=\"{}\" y1=\"{y:.1}\" x2=\"{}\" y2=\"{y:.1}\"/>\
             <text class=\"small end\" x=\"{}\" y=\"{:.1}\">{}</text>\n",
            LEFT - 5.0,
            LEFT + PLOT_WIDTH,
            LEFT - 8.0,
            y + 4.0,
            size::human(tick)
        );
    }
    svg += &frame(top, PLACES_HEIGHT);
    svg + &x_axis(plot, top, PLACES_HEIGHT)
}

/// `text` for XML.
fn escape(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .map(|c| match c {
            '&' => "&amp;".to_owned(),
            '<' => "&lt;".to_owned(),
            '>' => "&gt;".to_owned(),
            '"' => "&quot;".to_owned(),
            // No XML may have these.
            '\u{fffe}' | '\u{ffff}' => '\u{fffd}'.to_string(),
            c => c.to_string(),
        })
        .collect()
}
