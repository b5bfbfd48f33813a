//! Turns the samples of one `compare` run into tables and charts.
//!
//! A run is a file of JSON lines. The first line holds the conditions of the run and the definitions of its works: their
//! figures, and for each figure its label and whether more or less is better. Every other line is one sample: what one
//! contender reached in one work in one repetition. The harness writes the definitions, so this module has no list of works.
//!
//! Pure. `bin/report.rs` reads and writes the files.

mod chart;
mod overview;
mod run;
mod summary;
mod table;

pub use chart::chart;
pub use overview::{END, START, charts, headline, replace};
pub use run::{Better, Figure, ReportError, Run, Work};
pub use table::{document, tables};
