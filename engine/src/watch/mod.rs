//! Watch.

pub mod diff;
pub mod parse;
pub mod reading;
