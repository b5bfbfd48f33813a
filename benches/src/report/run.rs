//! The file format of a run.
//!
//! Pure.

use std::collections::BTreeMap;

use serde::Deserialize;

/// A run: its conditions and all its samples, in the order in which they were taken.
#[derive(Debug)]
pub struct Run {
    pub(super) conditions: Conditions,
    pub(super) samples: Vec<Sample>,
}

/// A file that is not a run.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A line that is not one of the two kinds.
    #[error("line {number}: {source}")]
    Line {
        /// Counted from 1.
        number: usize,
        /// The reason.
        source: serde_json::Error,
    },
    /// The conditions are absent or not in the first line, or more than one line has them.
    #[error("the first line, and only that line, must be of the kind \"run\"")]
    Conditions,
    /// The chart could not be drawn.
    #[error("cannot draw the chart of {work}: {reason}")]
    Chart {
        /// The name of the work.
        work: String,
        /// The error of the plotting library.
        reason: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Line {
    Run(Box<Conditions>),
    Sample(Sample),
}

#[derive(Debug, Deserialize)]
pub(super) struct Conditions {
    pub(super) started: String,
    pub(super) commit: String,
    pub(super) machine: Machine,
    pub(super) congestion_control: String,
    pub(super) idle: Idle,
    pub(super) seconds: f64,
    pub(super) repetitions: u32,
    pub(super) contenders: Vec<Contender>,
    pub(super) works: Vec<Work>,
    pub(super) versions: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Machine {
    pub(super) kernel: String,
    pub(super) processor: String,
    pub(super) processors: u32,
    pub(super) memory_gib: f64,
}

/// The other load of the machine before the first sample.
#[derive(Debug, Deserialize)]
pub(super) struct Idle {
    pub(super) busy_processors: f64,
    pub(super) waited_seconds: f64,
}

#[derive(Debug, Deserialize)]
pub(super) struct Contender {
    pub(super) name: String,
    /// Whether it is this project's, which the charts show in another colour.
    pub(super) ours: bool,
}

/// One kind of work.
#[derive(Debug, Deserialize)]
pub struct Work {
    /// The name on the command line and in file names.
    pub name: String,
    /// One line of description.
    pub what: String,
    /// Whether the front page shows it.
    pub headline: bool,
    /// The figures of its samples; the first is the principal one.
    pub figures: Vec<Figure>,
}

impl Work {
    /// Whether a chart shows any of its figures.
    pub fn has_chart(&self) -> bool {
        self.figures.iter().any(|figure| figure.charted)
    }
}

/// One figure of a work.
#[derive(Debug, Deserialize)]
pub struct Figure {
    /// The name in the samples.
    pub key: String,
    /// The heading, with the unit.
    pub label: String,
    /// The direction of improvement.
    pub better: Better,
    /// Whether the chart shows it.
    pub charted: bool,
    /// Whether the chart shows the ratio to `direct` instead of the value.
    pub relative: bool,
}

/// The direction in which a figure improves.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// A larger value is better.
    More,
    /// A smaller value is better.
    Less,
}

#[derive(Debug, Deserialize)]
pub(super) struct Sample {
    pub(super) repetition: u32,
    pub(super) work: String,
    pub(super) contender: String,
    #[serde(default)]
    pub(super) figures: BTreeMap<String, f64>,
    /// The check that failed, if one did.
    pub(super) invalid: Option<String>,
    /// Processor time of other processes during the sample, in processors.
    pub(super) foreign_processors: f64,
}

impl Run {
    /// Parses the text of a run's file.
    ///
    /// # Errors
    /// When a line does not follow the format.
    pub fn parse(text: &str) -> Result<Run, ReportError> {
        let mut conditions = None;
        let mut samples = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            match serde_json::from_str(line).map_err(|source| ReportError::Line { number, source })? {
                Line::Run(found) if number == 1 => conditions = Some(*found),
                Line::Run(_) => return Err(ReportError::Conditions),
                Line::Sample(sample) => samples.push(sample),
            }
        }
        Ok(Run { conditions: conditions.ok_or(ReportError::Conditions)?, samples })
    }

    /// The works of the run that have samples.
    pub fn works(&self) -> impl Iterator<Item = &Work> {
        self.conditions.works.iter().filter(|work| self.samples.iter().any(|sample| sample.work == work.name))
    }
}
