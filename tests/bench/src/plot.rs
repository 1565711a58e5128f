//! Plots, as SVG.

use std::path::Path;

use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;
use serde_json::{Value, json};

const SIZE: (u32, u32) = (800, 480);

/// How figures depend on something.
pub struct Plot {
    /// Name of its file, without `.svg`.
    pub name: &'static str,
    pub title: &'static str,
    pub x: &'static str,
    pub y: &'static str,
    /// Whether the steps up the scale are powers.
    pub is_log_y: bool,
    /// What the marks along the bottom say.
    pub marks: fn(f64) -> String,
    pub curves: Vec<(String, Vec<(f64, f64)>)>,
}

impl Plot {
    pub fn json(&self) -> Value {
        let curves = self
            .curves
            .iter()
            .map(|(name, points)| json!({ "name": name, "points": points }));
        json!({
            "name": self.name,
            "x": self.x,
            "y": self.y,
            "curves": curves.collect::<Vec<_>>(),
        })
    }

    /// Writes it to a file of its name in `directory`.
    pub fn draw(&self, directory: &Path) {
        let path = directory.join(format!("{}.svg", self.name));
        let area = SVGBackend::new(&path, SIZE).into_drawing_area();
        area.fill(&WHITE).unwrap();
        let (x, y) = (self.range(|point| point.0), self.range(|point| point.1));
        let x = x.0..x.1;
        if self.is_log_y {
            self.chart(&area, x, (y.0 * 0.8..y.1 * 1.25).log_scale());
        } else {
            self.chart(&area, x, y.0.min(0.0)..y.1 * 1.1);
        }
        area.present().unwrap();
    }

    fn range(&self, of: impl Fn(&(f64, f64)) -> f64) -> (f64, f64) {
        let points = self.curves.iter().flat_map(|curve| &curve.1).map(of);
        points.fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), value| {
            (min.min(value), max.max(value))
        })
    }

    /// Steps along the bottom double what they stand for.
    fn chart<Y>(
        &self,
        area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
        x: std::ops::Range<f64>,
        y: Y,
    ) where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(70)
            .build_cartesian_2d(x.log_scale().base(2.0), y)
            .unwrap();
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .x_label_formatter(&|value| (self.marks)(*value))
            .label_style(("sans-serif", 13))
            .draw()
            .unwrap();
        for (number, (name, points)) in self.curves.iter().enumerate() {
            let color = Palette99::pick(number).to_rgba();
            let line = LineSeries::new(points.iter().copied(), color.stroke_width(2));
            chart
                .draw_series(line.point_size(3))
                .unwrap()
                .label(name.as_str())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .label_font(("sans-serif", 13))
            .position(SeriesLabelPosition::UpperLeft)
            .draw()
            .unwrap();
    }
}

/// A number of bytes that is a power of two.
pub fn bytes(value: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let step = (value.log2() / 10.0).floor().clamp(0.0, 4.0);
    format!(
        "{:.0} {}",
        value / 1024_f64.powf(step),
        units[step as usize]
    )
}

pub fn number(value: f64) -> String {
    format!("{value:.0}")
}
