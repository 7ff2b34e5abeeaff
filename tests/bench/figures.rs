//! The figures of one run: as JSON for programs, as a table for people.

use std::{fs, io::ErrorKind, path::Path};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
struct Figure {
    name: String,
    value: f64,
    unit: String,
    against: Option<String>,
    ratio: Option<f64>,
}

#[derive(Debug, Default)]
pub(crate) struct Figures(Vec<Figure>);

impl Figures {
    /// Adds a figure beside the value that it is compared with, in the same unit.
    pub(crate) fn add(&mut self, name: &str, value: f64, unit: &str, against: &str, other: f64) {
        self.push(Figure {
            name: name.into(),
            value: rounded(value),
            unit: unit.into(),
            against: Some(format!("{against}: {} {unit}", rounded(other))),
            ratio: Some(rounded(value / other)),
        });
    }

    /// Shows a figure at once: of a run that is broken off, it is all that is left.
    fn push(&mut self, figure: Figure) {
        let Figure { name, value, unit, against, ratio } = &figure;
        match (against, ratio) {
            (Some(against), Some(ratio)) => {
                eprintln!("  {name}: {value} {unit} ({ratio} x {against})");
            }
            _ => eprintln!("  {name}: {value} {unit}"),
        }
        self.0.push(figure);
    }

    /// Adds a figure without a comparison.
    pub(crate) fn alone(&mut self, name: &str, value: f64, unit: &str) {
        let (value, unit) = (rounded(value), unit.to_owned());
        self.push(Figure { name: name.into(), value, unit, against: None, ratio: None });
    }

    /// Tells the bounds that were missed, and adds their number. A bound is what was found, and the most that it
    /// may be; of what may not be less, both are negative. Misses fail no run: a bench measures, on any machine.
    pub(crate) fn bounds(&mut self, part: &str, bounds: &[(&str, f64, f64)]) {
        let missed = bounds.iter().filter(|(_, found, most)| found > most);
        let missed = missed.inspect(|(what, found, most)| {
            let (found, bound) = (rounded(found.abs()), rounded(most.abs()));
            let side = if *most < 0.0 { "least" } else { "most" };
            eprintln!("MISSED: {what}: {found}, and {bound} at {side} was wanted");
        });
        #[expect(clippy::cast_precision_loss, reason = "a count of a few")]
        let missed = missed.count() as f64;
        self.alone(&format!("{part}_bounds_missed"), missed, &format!("of {}", bounds.len()));
    }

    /// Writes target/bench/results.json.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let dir = path.parent().context("a file in a directory")?;
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        fs::write(path, serde_json::to_vec_pretty(&self.0)?)
            .with_context(|| path.display().to_string())
    }

    /// Writes them into the results of an earlier run, in the place of those with the same names.
    pub(crate) fn merge(self, path: &Path) -> Result<()> {
        let mut all = match fs::read(path) {
            Ok(bytes) => serde_json::from_slice::<Vec<Figure>>(&bytes)
                .with_context(|| format!("{}: remove it", path.display()))?,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        all.retain(|old| !self.0.iter().any(|new| new.name == old.name));
        all.extend(self.0);
        Self(all).write(path)
    }

    pub(crate) fn print(&self) {
        for Figure { name, value, unit, against, ratio } in &self.0 {
            let ratio = ratio.map_or_else(String::new, |ratio| format!("{ratio} x"));
            let against = against.as_deref().unwrap_or_default();
            println!("{name:<34} {value:>10} {unit:<10} {ratio:>9}  {against}");
        }
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Returns the median.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
